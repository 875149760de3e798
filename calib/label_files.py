"""Label maps on disk: PNG files whose pixel values are class numbers, written and read without a change of value."""

import io
import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from tclkit.runtime.errors import InputError
from tclkit.runtime.files import atomic_file
from tclkit.runtime.images import check_size

LabelMap = npt.NDArray[np.integer]
_NUMBERS = ("P", "L", "1", "I", "I;16", "I;16B", "I;16L")  # Pillow's names of pixels that are one number


def read_label_map(path: Path) -> LabelMap:
    """Read the class numbers of a label file: of a palette file the indices, not the colours.

    Returns:
        (H, W) integers.

    Raises:
        InputError: the file is missing, damaged, no PNG, too large, or holds colours instead of numbers.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata that nothing here uses
            # Of all that Pillow opens PNG alone: PostScript would run Ghostscript.
            with Image.open(io.BytesIO(path.read_bytes()), formats=("PNG",)) as image:
                check_size(image, str(path))  # Pillow's own limit is off while another thread reads a header
                if image.mode not in _NUMBERS:
                    raise InputError(
                        f"{path} holds {image.mode} pixels, but a label file holds one number a pixel (grey or palette "
                        "PNG): convert its colours to class numbers",
                        path=str(path),
                    )
                numbers = np.asarray(image)
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist", path=str(path)) from error
    except UnidentifiedImageError as error:
        raise InputError(f"{path} is no image file of the kind PNG", path=str(path)) from error
    except InputError:
        raise
    except Exception as error:  # Pillow's decoders raise all sorts of errors on damaged files
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputError(f"{path} cannot be read: {' '.join(str(reason).split())}", path=str(path)) from error
    return numbers.astype(np.uint8) if numbers.dtype == np.bool_ else numbers


def write_label_map(path: Path, label_map: LabelMap) -> None:
    """Write class numbers of 0..255 as a grey PNG, whole or not at all."""
    with atomic_file(path) as temporary:
        Image.fromarray(label_map.astype(np.uint8)).save(temporary, "PNG")
