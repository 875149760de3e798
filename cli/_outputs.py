"""Where overlays go, decided for all images before the first is computed: nothing is lost, no input is overwritten."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tclkit.runtime.errors import InputError

from ._sources import OVERLAY_ENDING, Source

OVERLAY_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
DEFAULT_FOLDER = Path("tclkit-overlays")


def plan_overlays(sources: Sequence[Source], output: Path | None, *, many: bool) -> list[Path]:
    """Overlay file of each source, in order.

    One image goes to `output` itself, or into it when it is a folder; without `output` to NAME-overlay.png in the
    current folder. Several go into the folder `output` (default: tclkit-overlays), below it as their sources lie below
    their common folder.

    Raises:
        InputError: an overlay would overwrite one of the sources, or `output` is a file but a folder is needed.
    """
    if many:
        folder = output if output is not None else DEFAULT_FOLDER
        _refuse_file_as_folder(folder, len(sources))
        planned = [folder / name for name in _overlay_names(sources)]
    elif output is None or _names_folder(output):
        planned = [(output or Path()) / f"{_stem(sources[0])}{OVERLAY_ENDING}"]
    else:
        _refuse_unknown_suffix(output)
        planned = [output]
    _refuse_overwriting(sources, planned)
    return planned


def require_output_folder(folder: Path, option: str = "-o") -> None:
    """Refuse a folder that results could not be written into, before they are computed. Nothing is made yet.

    Raises:
        InputError: it, or a folder above it, is a file or may not be written; names the option to change.
    """
    nearest = next(place for place in (folder, *folder.parents) if place.exists())
    if not nearest.is_dir():
        raise InputError(f"{nearest} is a file, but the results need a folder: give another with {option}")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"the folder {nearest} may not be written: give another place with {option}")


def require_output_file(file: Path, option: str) -> None:
    """Refuse a file that could not be written, before what goes into it is computed.

    Raises:
        InputError: it is a folder, or see `require_output_folder`.
    """
    if file.is_dir():
        raise InputError(f"{file} is a folder: give a file with {option}, such as {file / 'report.md'}")
    require_output_folder(file.parent, option)


def _names_folder(output: Path) -> bool:
    return output.is_dir() or (not output.suffix and not output.exists())


def _stem(source: Source) -> str:
    return source.path.stem if source.path is not None else "stdin"


def _overlay_names(sources: Sequence[Source]) -> list[Path]:
    paths = [Path(os.path.abspath(source.path or source.name)) for source in sources]  # noqa: PTH100 (links stay)
    common = Path(os.path.commonpath([path.parent for path in paths]))
    below = [path.relative_to(common) for path in paths]
    # The suffix stays where another image has the short name, short (photo.jpg beside photo.png) or in full
    # (photo.jpg.png beside photo.jpg), so that all overlays live.
    taken = Counter(name for path in below for name in {path.with_suffix(""), path})
    return [
        path.with_name((path.stem if taken[path.with_suffix("")] == 1 else path.name) + OVERLAY_ENDING)
        for path in below
    ]


def _refuse_file_as_folder(folder: Path, count: int) -> None:
    if folder.is_file() or (not folder.exists() and folder.suffix.lower() in OVERLAY_SUFFIXES):
        raise InputError(f"{folder} names a file, but the overlays of {count} image(s) need a folder: -o FOLDER")


def _refuse_unknown_suffix(output: Path) -> None:
    if output.suffix.lower() not in OVERLAY_SUFFIXES:
        raise InputError(f"{output}: an overlay is written as one of {', '.join(OVERLAY_SUFFIXES)}")


def _refuse_overwriting(sources: Sequence[Source], planned: Sequence[Path]) -> None:
    inputs = {source.path.resolve(): source.name for source in sources if source.path is not None}
    for overlay in planned:
        if overlay.resolve() in inputs:
            raise InputError(f"{overlay} is an input and is not overwritten: give another -o")
