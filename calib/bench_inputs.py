"""What a benchmark feeds a model: one picture as JPEG bytes, and as many different prompts as are asked for."""

import io
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tclkit.runtime.errors import InputError
from tclkit.runtime.images import load_image
from tclkit.runtime.manifest import Vocabulary
from tclkit.runtime.prompts import PromptSet

_FRAME_WIDTH, _FRAME_HEIGHT = 1280, 720
_JPEG_QUALITY = 90
_ATTRIBUTES = (
    "red", "green", "blue", "yellow", "white", "black", "brown", "grey", "orange", "pink",
    "small", "large", "old", "new", "wooden", "metal", "round", "flat", "broken", "shiny",
)  # fmt: skip
_THINGS = (
    "person", "dog", "cat", "car", "bicycle", "bus", "truck", "tree", "grass", "road",
    "building", "house", "door", "window", "table", "chair", "sofa", "bed", "lamp", "book",
    "bottle", "cup", "plate", "bowl", "knife", "fork", "spoon", "bag", "box", "shoe",
    "hat", "shirt", "ball", "kite", "boat", "bridge", "river", "rock", "flower", "fence",
    "sign", "bench", "clock", "phone", "screen", "keyboard", "robot", "tool", "wheel", "sky",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Picture:
    """The picture a benchmark works on.

    source: what it is, for people.
    encoded: bytes of an image file, JPEG unless it is the user's own of another kind.
    image_hwc: (H, W, 3) uint8, decoded.
    """

    source: str
    encoded: bytes
    image_hwc: NDArray[np.uint8]


def open_picture(path: str | Path | None) -> Picture:
    """The user's own picture, or 1280 x 720 pixels of the sample scenes as a JPEG of quality 90.

    Raises:
        InputError: the file cannot be read as an image.
    """
    if path is None:
        encoded, source = _sample_frame(), f"sample scenes, {_FRAME_WIDTH} x {_FRAME_HEIGHT} JPEG"
        return Picture(source=source, encoded=encoded, image_hwc=load_image(encoded, name=source))
    image_hwc = load_image(path)  # first, for its messages
    height, width = image_hwc.shape[:2]
    return Picture(
        source=f"{Path(path).name}, {width} x {height}", encoded=Path(path).read_bytes(), image_hwc=image_hwc
    )


def _sample_frame() -> bytes:
    folder = resources.files("tclkit.runtime") / "samples"
    listed = json.loads((folder / "samples.json").read_text(encoding="utf-8"))["scenes"]
    scenes = [load_image((folder / scene["file"]).read_bytes(), name=scene["file"]) for scene in listed]
    half = len(scenes) // 2
    rows = [np.concatenate(row, axis=1) for row in (scenes[:half], scenes[half:])]
    frame = Image.fromarray(np.concatenate(rows)).resize((_FRAME_WIDTH, _FRAME_HEIGHT), Image.Resampling.BILINEAR)
    stream = io.BytesIO()
    frame.save(stream, "JPEG", quality=_JPEG_QUALITY)
    return stream.getvalue()


def prompt_texts(count: int, vocabulary: Vocabulary | None) -> list[str]:
    """Different short prompts, of a model's own words where it knows a few only.

    Args:
        count: how many.
        vocabulary: of the model; None for one that knows words in general.

    Raises:
        InputError: so many different prompts cannot be made of these words.
    """
    if vocabulary is None:
        made = [*_phrases(_ATTRIBUTES, _THINGS), *_phrases(_ATTRIBUTES, _ATTRIBUTES, _THINGS)]
    else:
        words = tuple(dict.fromkeys(vocabulary.words))
        made = [*words, *_phrases(words, words), *_phrases(words, words, words)]
    if count > len(made):
        raise InputError(
            f"{count} different prompts were asked for, but of this model's words {len(made)} can be made. Ask for "
            f"{len(made)} at most",
            count=count,
            most=len(made),
        )
    return made[:count]


def _phrases(*choices: Sequence[str]) -> list[str]:
    """Every choice of one word each, none twice; neighbours in the list differ in their first word."""
    parts = itertools.product(*reversed(choices))
    return [" ".join(reversed(words)) for words in parts if len(set(words)) == len(words)]


def with_random_rest(embedded: PromptSet, names: Sequence[str], seed: int) -> PromptSet:
    """Embedded prompts filled up with random directions: what compares them does the same work for any direction.

    Args:
        embedded: the first of the prompts.
        names: of all N prompts.
        seed: of the directions.
    """
    missing = len(names) - len(embedded.names)
    if missing <= 0:
        kept = len(names)
        return PromptSet(names=tuple(names), embeddings=embedded.embeddings[:kept], key=embedded.key)
    random_ND = np.random.default_rng(seed).standard_normal((missing, embedded.embeddings.shape[1]), np.float32)
    random_ND /= np.linalg.norm(random_ND, axis=1, keepdims=True)
    return PromptSet(names=tuple(names), embeddings=np.concatenate([embedded.embeddings, random_ND]), key=embedded.key)
