"""Image files of every common kind, as 8-bit RGB arrays; anything else gets one clear line."""

import contextlib
import io
import logging
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import InputError

logger = logging.getLogger(__name__)

DEFAULT_MAX_PIXELS = 100_000_000
# Pillow also opens PostScript (which runs Ghostscript), video and the like: a robot needs none of those.
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "TIFF", "GIF", "PPM", "JPEG2000")

_MAGIC = {
    b"\xff\xd8": "JPEG",
    b"\x89PNG": "PNG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"RIFF": "WebP",
    b"II*": "TIFF",
    b"MM\0": "TIFF",
}
_WHITE = (255, 255, 255, 255)
_pillow_limit_lock = threading.Lock()


def load_image(
    source: str | Path | bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS, name: str | None = None
) -> NDArray[np.uint8]:
    """Read an image as it should be seen: upright, opaque, 8-bit RGB.

    The EXIF rotation is applied. Grey, palette, CMYK and YCbCr are converted; 16-bit grey is scaled by its full range
    (65535 becomes 255). Transparent pixels are laid over white. Of an animation or a stack of pages the first is taken.
    Colour profiles are ignored, as OpenCV does.

    Args:
        source: a path, or the bytes of an image file.
        max_pixels: a larger image is refused by its header, before any pixel is decoded.
        name: what messages call the image; the path by default.

    Returns:
        (H, W, 3) uint8 RGB, contiguous and writable.

    Raises:
        InputError: the file is missing, empty, truncated, too large or not an image; or its pixel type has no defined
            brightness range (32-bit integers, floats).
    """
    if isinstance(source, bytes):
        return _image_from_stream(io.BytesIO(source), len(source), name or "image", max_pixels)
    if not isinstance(source, (str, Path)):
        raise InputError(
            f"an image file is a path or bytes, found {type(source).__name__}; arrays are used as they are"
        )
    path = Path(source)
    label = name or str(path)
    if path.is_dir():
        raise InputError(f"{label} is a folder, not an image", path=label)
    try:
        with path.open("rb") as stream:
            return _image_from_stream(stream, path.stat().st_size, label, max_pixels)
    except FileNotFoundError as error:
        raise InputError(f"{label} does not exist; check the path", path=label) from error
    except OSError as error:
        raise InputError(f"{label} cannot be read: {error.strerror or error}", path=label) from error


def _image_from_stream(stream: BinaryIO, size_bytes: int, label: str, max_pixels: int) -> NDArray[np.uint8]:
    if size_bytes == 0:
        raise InputError(f"{label} is empty (0 bytes)", path=label)
    with _opened(stream, label) as image:
        check_size(image, label, max_pixels)
        image_format = image.format
        _decode(image, label)
        rgb = _rgb_from_image(_upright(image, label), image_format, label)
        return np.array(rgb, dtype=np.uint8)


def _opened(stream: BinaryIO, label: str) -> Image.Image:
    """Parse the header only."""
    Image.init()
    try:
        with _without_pillow_limit():
            return Image.open(stream, formats=[name for name in FORMATS if name in Image.OPEN])
    except UnidentifiedImageError as error:
        stream.seek(0)
        raise InputError(_unknown_message(label, stream.read(12)), path=label) from error
    except Exception as error:  # the parsers raise all sorts of errors on damaged headers
        raise InputError(f"{label} has a damaged header: {_one_line(error)}", path=label) from error


def _unknown_message(label: str, start: bytes) -> str:
    for magic, kind in _MAGIC.items():
        if start.startswith(magic):
            return f"{label} begins like a {kind} file, but its header is truncated or damaged"
    return (
        f"{label} is not an image of a kind that can be read: it begins with {start!r}. "
        "JPEG, PNG, WebP, BMP, TIFF, GIF, PPM, AVIF and JPEG 2000 can; convert it to one of these"
    )


@contextlib.contextmanager
def _without_pillow_limit() -> Iterator[None]:
    """Let a header through Pillow's own guard, so that ours can say the size and be moved by its parameter.

    Pillow (13.0 and before) knows its limit only as a global of the module.
    """
    with _pillow_limit_lock:
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def check_size(image: Image.Image, label: str, max_pixels: int = DEFAULT_MAX_PIXELS) -> None:
    """Refuse an image by its header, before any pixel is decoded.

    Raises:
        InputError: it has more than `max_pixels`.
    """
    width, height = image.size
    if width * height > max_pixels:
        raise InputError(
            f"{label} is {width} x {height} = {width * height:,} pixels; the limit is {max_pixels:,}. "
            "Scale it down first",
            path=label,
            width=width,
            height=height,
            max_pixels=max_pixels,
        )


def _decode(image: Image.Image, label: str) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata that nothing here uses
            image.load()
    except Exception as error:  # the decoders raise all sorts of errors on damaged data
        raise InputError(f"{label} is truncated or damaged: {_one_line(error)}", path=label) from error


def _upright(image: Image.Image, label: str) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:  # EXIF is free-form; the pixels are good, so go on and say so
        logger.warning("%s: its EXIF data cannot be read (%s), so it is not rotated", label, _one_line(error))
        return image


def _rgb_from_image(image: Image.Image, image_format: str | None, label: str) -> Image.Image:
    # PNG and PPM hold 16 bits at most; Pillow reads them into 32-bit integers, depending on its version.
    if image.mode.startswith("I;16") or (image.mode == "I" and image_format in ("PNG", "PPM")):
        image = _grey_from_16_bit(image)
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floats"
        raise InputError(
            f"{label} holds {kind}, which have no defined brightness range; save it with 8 or 16 bits", path=label
        )
    try:
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, _WHITE), rgba)
        return image.convert("RGB")
    except ValueError as error:
        raise InputError(
            f"{label} has pixels of the kind {image.mode}, which cannot be converted to RGB; save it as RGB", path=label
        ) from error


def _grey_from_16_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.uint32)  # (H, W), 0..65535
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
