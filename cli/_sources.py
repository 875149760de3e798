"""Which images a command line means: a file, a folder, a quoted glob, or standard input."""

import glob
import sys
from dataclasses import dataclass
from pathlib import Path

from tclkit.runtime.errors import InputError
from tclkit.runtime.image_suffixes import IMAGE_SUFFIXES

STANDARD_INPUT = "-"
OVERLAY_ENDING = "-overlay.png"


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One image to look at.

    name: what to call it in messages and results.
    path: the file; None for standard input.
    """

    name: str
    path: Path | None

    def read(self) -> Path | bytes:
        """What `tclkit.runtime.load_image` takes: the path, or all bytes of standard input."""
        return self.path if self.path is not None else read_standard_input()


def read_standard_input() -> bytes:
    """All bytes of standard input.

    Raises:
        InputError: it is closed.
    """
    if sys.stdin is None:
        raise InputError("standard input is closed: pipe something into it, or name a file instead of -")
    return sys.stdin.buffer.read()


def find_sources(image: str) -> list[Source]:
    """Images that the IMAGE argument stands for, in a stable order.

    A folder stands for the images directly inside it; `**` in a glob reaches down. Overlays of an earlier run are left
    out of both. Folders at the start of a glob that exist as written are no pattern.
    Whether the files are readable images shows when they are read.

    Raises:
        InputError: there is no such file, or nothing that looks like an image in the folder or behind the glob.
    """
    if image == STANDARD_INPUT:
        return [Source(name="standard input", path=None)]
    path = Path(image)
    if not image:
        raise InputError("IMAGE is empty: name a file, a folder, a quoted glob, or - for standard input")
    if path.is_dir():
        return [Source(name=str(found), path=found) for found in _images_in_folder(path)]
    if not path.exists() and glob.has_magic(image):
        return [Source(name=str(found), path=found) for found in _images_behind_glob(image)]
    if not path.exists():
        raise InputError(f"{image}: no such file or folder", image=image)
    return [Source(name=image, path=path)]


def stands_for_many(image: str) -> bool:
    """Whether IMAGE is a folder or a glob, so that results go to a folder even when it holds one image only."""
    path = Path(image)
    return image != STANDARD_INPUT and (path.is_dir() or (not path.exists() and glob.has_magic(image)))


def _images_in_folder(folder: Path) -> list[Path]:
    images = [
        path
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.endswith(OVERLAY_ENDING) and path.is_file()
    ]
    if not images:
        raise InputError(f"{folder}: no images in this folder (looked for {_suffix_list()})", folder=str(folder))
    return images


def _images_behind_glob(pattern: str) -> list[Path]:
    literal = _literal_folder(pattern)
    rest = pattern.removeprefix(literal)
    found = sorted(glob.glob(glob.escape(literal) + rest, recursive=True))  # noqa: PTH207
    images = [path for path in map(Path, found) if path.is_file() and not path.name.endswith(OVERLAY_ENDING)]
    if not images:
        raise InputError(
            f"{pattern}: no file matches this pattern (overlays of earlier runs aside; [[] stands for a [ in a name)",
            pattern=pattern,
        )
    return images


def _literal_folder(pattern: str) -> str:
    """Start of a pattern that is the path of a folder as it stands, "dir[1]/" for one; empty for none."""
    ends = [number for number, sign in enumerate(pattern, start=1) if sign == "/"]
    return next((pattern[:end] for end in reversed(ends) if Path(pattern[:end]).is_dir()), "")


def _suffix_list() -> str:
    return ", ".join(sorted(IMAGE_SUFFIXES))
