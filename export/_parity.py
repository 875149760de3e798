"""A new bundle's graphs against the model they come from, through the same code that runs them on a device."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from tclkit.runtime.bundle import Bundle
from tclkit.runtime.errors import ParityError
from tclkit.runtime.onnxruntime_backend import OnnxRuntimeBackend
from tclkit.runtime.tokenizer import Tokenizer
from tclkit.tcl.batches import images_to_tensor
from tclkit.tcl.model import TCL, normalize

_WORDS = ("dog", "green grass", "traffic light", "a red circle and a blue star", "")
_SEED = 20230322

# Largest allowed difference from torch, beside what was measured on the tiny golden model and on a randomly initialised
# ViT-B/16: unit vectors for images, raw embeddings over their largest value (where above 1) for texts, soft masks at
# image size.
TOLERANCES: Mapping[str, Mapping[str, float]] = {
    "float32": {"image": 2e-5, "text": 2e-5, "masks": 2e-5},
    "float16": {"image": 5e-3, "text": 5e-3, "masks": 2e-2},
}


def check_bundle(bundle: Bundle, model: TCL, *, stored: str = "float32") -> dict[str, dict[str, float]]:
    """Run every graph of a bundle in ONNX Runtime and compare it with the model.

    Args:
        bundle: to be checked; its masks graph is checked behind its image graphs, up to soft masks at image size.
        model: what it was made from.
        stored: how the weights are stored, a key of `TOLERANCES`.

    Returns:
        file -> max_abs_error, tolerance, and largest_value of what was compared.

    Raises:
        ParityError: a difference is above its tolerance.
    """
    backend = OnnxRuntimeBackend(bundle)
    tolerances, manifest = TOLERANCES[stored], bundle.manifest
    token_ids_ML = _token_ids(bundle)
    with torch.no_grad():
        text_MD = model.encode_text(torch.from_numpy(token_ids_ML))
        found_MD = backend.encode_text(token_ids_ML)
        checks = {manifest.text: _compared(manifest.text, [found_MD], [text_MD], tolerances["text"])}
        text_ND = normalize(text_MD, -1)
        for entry in manifest.images:
            images = _images(entry.height, entry.width)
            file = entry.files["fp32"]
            features = backend.image_features(images)
            wanted = model.image_features(images_to_tensor(images))
            pairs = [(features.grounded, wanted.grounded_BDhw), (features.kp, wanted.kp_BDhw)]
            found = [array for array, _ in pairs if array is not None]
            expected = [normalize(tensor, 1) for array, tensor in pairs if array is not None]
            checks[file] = _compared(file, found, expected, tolerances["image"])

            masks_BNhw = backend.masks(features, text_ND.numpy(), manifest.kp_w)
            size = (entry.height, entry.width)
            masks = F.interpolate(torch.from_numpy(masks_BNhw), size=size, mode="bilinear", align_corners=False)
            reference = model.generate_masks(images_to_tensor(images), text_ND, kp_w=manifest.kp_w)
            check = _compared(manifest.masks, [masks.numpy()], [reference], tolerances["masks"])
            checks[manifest.masks] = _worse(checks.get(manifest.masks), check)
    return checks


def _compared(
    file: str, found: list[NDArray[np.float32]], expected: list[torch.Tensor], tolerance: float
) -> dict[str, float]:
    error = max(float(np.abs(a - b.numpy()).max()) for a, b in zip(found, expected, strict=True))
    largest = max(float(tensor.abs().max()) for tensor in expected)
    limit = tolerance * max(1.0, largest)
    if not error <= limit:  # NaN fails too
        raise ParityError(
            f"{file} differs from torch by {error:.2e}, allowed is {limit:.1e}. Nothing was written. Export without "
            f"half_weights (--half-weights), or with other versions of torch ({torch.__version__}) and onnxruntime",
            file=file,
            found=error,
            expected=limit,
        )
    return {"max_abs_error": error, "tolerance": limit, "largest_value": largest}


def _worse(first: dict[str, float] | None, second: dict[str, float]) -> dict[str, float]:
    return second if first is None or second["max_abs_error"] > first["max_abs_error"] else first


def _token_ids(bundle: Bundle) -> NDArray[np.int64]:
    """Prompts of several lengths, the longest one filling the context."""
    tokenizer = Tokenizer.from_bundle(bundle)
    vocabulary = bundle.manifest.vocabulary
    words = [*_WORDS, *(vocabulary.words[:3] if vocabulary else ())]
    template = bundle.manifest.templates[0]
    texts = [template.replace("{}", word) for word in words]
    return tokenizer.encode([*texts, " ".join(words * tokenizer.context_length)])


def _images(height: int, width: int) -> NDArray[np.uint8]:
    """Two images, (2, H, W, 3): one of smooth colours, one of noise; with pure black and white in both."""
    random = torch.Generator().manual_seed(_SEED)
    coarse = torch.rand(1, 3, 5, 5, generator=random)
    smooth = F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)
    noise = torch.rand(1, 3, height, width, generator=random)
    pixels = (torch.cat([smooth, noise]) * 1.2 - 0.1).clamp(0, 1) * 255
    array: NDArray[Any] = pixels.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    return array
