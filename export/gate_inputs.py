"""What the gate looks at when nobody says: the sample scenes of the package, and prompts that fit the model."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tclkit import runtime
from tclkit.runtime.bundle import Bundle
from tclkit.runtime.errors import BundleError, ConfigError, InputError
from tclkit.runtime.images import load_image
from tclkit.runtime.onnxruntime_backend import OnnxRuntimeBackend
from tclkit.runtime.preprocess import plan_fit
from tclkit.runtime.prompts import unknown_words
from tclkit.runtime.segmenter import Segmenter
from tclkit.runtime.text_cache import TextCache

from .gates import THRESHOLDS, Gate, GateThresholds, Judged

_SAMPLES = Path(runtime.__file__).parent / "samples"

# fmt: off
_COMMON_THINGS = (
    "person", "car", "bicycle", "dog", "cat", "chair", "table", "cup", "bottle", "book", "door", "window", "floor",
    "wall", "grass", "tree", "sky", "road", "building", "water",
)
# fmt: on


def default_prompts(bundle: Bundle) -> tuple[str, ...]:
    """Prompts to judge with: things that photographs show; for a model of a small world, those it knows."""
    vocabulary = bundle.manifest.vocabulary
    if vocabulary is None:
        return _COMMON_THINGS
    scenes = json.loads((_SAMPLES / "samples.json").read_text(encoding="utf-8"))["scenes"]
    prompts = dict.fromkeys(prompt for scene in scenes for prompt in scene["prompts"])
    return tuple(prompt for prompt in prompts if not unknown_words([prompt], vocabulary.words)) or vocabulary.words


def gate_on(
    bundle: Bundle,
    reference: Judged,
    images: Sequence[NDArray[np.uint8]],
    text_ND: NDArray[np.float32],
    report: Callable[[str, int, int], None],
) -> Gate:
    """The gate of a reference, which is a bundle's float32 graph as a rule, on some batches."""
    return Gate(
        reference,
        images,
        text_ND,
        kp_w=bundle.manifest.kp_w,
        threshold=bundle.manifest.thresholds.background,
        progress=lambda done: report("reference", done, sum(map(len, images))),
    )


def kept_thresholds(bundle: Bundle, precision: str, file: str) -> GateThresholds:
    """Thresholds that a graph was built with, which bundle.json keeps; else those of its precision.

    Raises:
        BundleError: what it keeps are no thresholds.
    """
    kept = bundle.manifest.checks.get(precision, {}).get(file, {}).get("thresholds")
    try:
        return GateThresholds(**kept) if kept else THRESHOLDS[precision]
    except (TypeError, ConfigError) as error:
        message = f"bundle.json of {bundle.name} has no usable thresholds for {file} under 'checks' ({error})"
        raise BundleError(f"{message}. Build it again: tclkit build-engine --{precision}", file=file) from error


def embedded_prompts(bundle: Bundle, prompts: Sequence[str] | None, *, most: int | None) -> NDArray[np.float32]:
    """Embed the prompts to judge with.

    Args:
        bundle: whose text encoder embeds them.
        prompts: None: `default_prompts`, as many as may be.
        most: prompts that the engines take; None: any number.

    Returns:
        (N, D) float32.

    Raises:
        InputError: more prompts were given than the engines take.
    """
    if prompts is not None and most is not None and len(prompts) > most:
        raise InputError(
            f"{len(prompts)} prompts to judge with, but the engines take {most}: give fewer, or build engines for more "
            "(--max-prompts)"
        )
    chosen = list(prompts or default_prompts(bundle))[:most]
    segmenter = Segmenter(bundle, OnnxRuntimeBackend(bundle), cache=TextCache())
    return segmenter.prompts(chosen).embeddings


def prompts_from_file(path: Path) -> tuple[str, ...]:
    """Prompts of a text file, one a line; empty lines and lines that begin with # are left out.

    Raises:
        InputError: it cannot be read, or holds no prompt.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be read as a list of prompts, one a line: {reason}") from error
    prompts = tuple(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
    if not prompts:
        raise InputError(f"{path} holds no prompt; write one a line")
    return prompts


def sample_batches(bundle: Bundle, size: tuple[int, int]) -> list[NDArray[np.uint8]]:
    """The sample scenes of the package, each whole and its middle enlarged, one a batch, at the size of a graph."""
    images = [load_image(path) for path in sorted(_SAMPLES.glob("*.png"))]
    images += [_middle(image) for image in images]
    colour = pad_colour(bundle)
    return [one[None] for image in images for one in plan_fit(image.shape[:2], [size]).inputs(image, colour)]


def pad_colour(bundle: Bundle) -> tuple[int, int, int]:
    """Colour that pads images for a bundle's graphs: its mean colour in bytes."""
    red, green, blue = (min(255, max(0, round(value))) for value in bundle.manifest.preprocessing.mean)
    return red, green, blue


def _middle(image_hwc: NDArray[np.uint8]) -> NDArray[np.uint8]:
    height, width = image_hwc.shape[:2]
    return image_hwc[height // 4 : height - height // 4, width // 4 : width - width // 4]
