"""What every backend refuses: arrays and files that its graphs would fail on, or worse, compute with."""

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from .backends import Features
from .bundle import Bundle
from .errors import BundleError, InputError

Size = tuple[int, int]


def check_images(bundle: Bundle, images_BHWC: object, sizes: Collection[Size]) -> Size:
    """Refuse what is not a batch of images, uint8 (B, H, W, 3), of one of the sizes that a backend has graphs for.

    Returns:
        Their size (H, W).

    Raises:
        InputError: names what was found, and the sizes.
    """
    images_BHWC = _checked("images", images_BHWC, np.uint8, ("B", "H", "W", 3))
    size = (images_BHWC.shape[1], images_BHWC.shape[2])
    check_image_size(bundle, size, sizes)
    return size


def check_image_size(bundle: Bundle, size: Size, sizes: Collection[Size]) -> None:
    """Refuse an image size (H, W) that is none of `sizes`, those of the bundle.

    Raises:
        InputError: it is none of them; names them.
    """
    if size not in sizes:
        have = ", ".join(f"{height}x{width}" for height, width in sizes)
        message = f"images are {size[0]}x{size[1]}, {bundle.name} has image graphs for {have}"
        raise InputError(f"{message}. Resize them, or export this size: tclkit export --size {size[0]}x{size[1]}")


def check_features(bundle: Bundle, features: Features) -> None:
    """Refuse features in the host's memory that are not this bundle's; their grids have to fit each other.

    That is looked at to the number, for OpenVINO computes with grids that do not fit, and says nothing.

    Raises:
        InputError: as said.
    """
    width, scale = bundle.manifest.model.embed_dim, bundle.manifest.model.mask_scale
    grounded_BDhw = _checked("features", features.grounded, np.float32, ("B", width, "h", "w"))
    if bundle.manifest.has_kp:
        batch, _, rows, columns = grounded_BDhw.shape
        _checked("KP features", features.kp, np.float32, (batch, width, rows // scale, columns // scale))


def check_prompts(bundle: Bundle, text_ND: object, kp_w: float) -> None:
    """Refuse text embeddings of another model, and a share of the KP branch outside [0, 1] or without such a branch.

    Raises:
        InputError: as said.
    """
    _checked("text embeddings", text_ND, np.float32, ("N", bundle.manifest.model.embed_dim))
    if not 0 <= kp_w <= 1:
        raise InputError(f"kp_w should be in [0, 1], found {kp_w}")
    if kp_w > 0 and not bundle.manifest.has_kp:
        remedy = "Use kp_w 0, or export the bundle with a KP branch"
        raise InputError(f"{bundle.name} has no KP branch, but kp_w is {kp_w}. {remedy}")


def check_token_ids(bundle: Bundle, token_ids_ML: object) -> None:
    """Refuse texts that are too long, or hold a token the model does not know: OpenVINO would embed it as zeros.

    Raises:
        InputError: as said.
    """
    found_ML = _checked("token ids", token_ids_ML, np.int64, ("M", "L"))
    context, known = bundle.manifest.model.context_length, bundle.manifest.model.vocab_size
    if found_ML.shape[1] > context:
        raise InputError(f"token ids are {found_ML.shape[1]} long, {bundle.name} reads at most {context}")
    if found_ML.min() < 0 or found_ML.max() >= known:
        raise InputError(f"token ids are {found_ML.min()} to {found_ML.max()}, {bundle.name} knows 0 to {known - 1}")


def check_interface(path: str, what: str, found: Sequence[set[str]], expected: Collection[str]) -> None:
    """Refuse a graph with other inputs or outputs than a bundle's have.

    Args:
        path: of the graph.
        what: "inputs" or "outputs".
        found: the names of each; after fusion one tensor may have several.
        expected: one name for each.

    Raises:
        BundleError: names both.
    """
    if len(found) != len(expected) or not all(any(name in names for names in found) for name in expected):
        shown = ", ".join(sorted("/".join(sorted(names)) for names in found))
        raise BundleError(
            f"{path} should have the {what} {', '.join(sorted(expected))}, found {shown}. "
            "Export the bundle again: tclkit export CHECKPOINT -o FOLDER",
            file=path,
        )


def _checked(what: str, array: object, dtype: type, shape: tuple[str | int, ...]) -> NDArray[np.generic]:
    """The array, if it is one of this dtype and shape; a text in the shape stands for any size from 1."""
    wanted = f"{np.dtype(dtype).name} ({', '.join(map(str, shape))})"
    if not isinstance(array, np.ndarray):
        raise InputError(f"{what} should be a numpy array, {wanted}, found {type(array).__name__}")
    fits = array.ndim == len(shape) and all(
        found == want if isinstance(want, int) else found >= 1 for found, want in zip(array.shape, shape, strict=True)
    )
    if array.dtype != dtype or not fits:
        raise InputError(f"{what} should be {wanted}, found {array.dtype.name} {array.shape}")
    return array
