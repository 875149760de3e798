"""Where calibration images come from: a folder, a glob, a video, webdataset shards or a text list.

A source offers candidates in an order that depends on the seed and on the images' names alone, never on the order in
which the file system lists them. Nothing is decoded here but the frames of a video, which have to be read in a row.
"""

import functools
import glob
import hashlib
import heapq
import itertools
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from tclkit.runtime.errors import InputError
from tclkit.runtime.image_suffixes import IMAGE_SUFFIXES
from tclkit.runtime.images import DEFAULT_MAX_PIXELS, load_image

SourceKind = Literal["folder", "glob", "video", "shards", "list"]

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".mjpeg", ".ts", ".wmv", ".ogv"}
)
LIST_SUFFIXES = frozenset({".txt", ".lst", ".list"})
SHARD_SUFFIX = ".tar"
REMEDY = (
    "Give a folder of images, a quoted glob ('photos/**/*.jpg'), a video, webdataset shards ('shard-{0000..0009}.tar') "
    "or a text file with one image path a line"
)

_OVERLAY_ENDING = "-overlay.png"  # what `tclkit segment` writes beside the images
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_CHOICE = re.compile(r"\{([^{}]*,[^{}]*)\}")
_MAX_SHARDS = 100_000
_MAX_MEMBER_BYTES = 64 << 20
_MAX_LIST_LINE = 4096
# So many candidates are looked at for every image wanted before giving up: a folder of a million copies of one picture
# should not be read to its end.
_LOOKS_PER_IMAGE = 16
# Frames read for every frame wanted, because neighbours in time are often one picture.
_FRAMES_PER_IMAGE = 2

_Ranked = tuple[bytes, str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One image that may be taken.

    name: what messages call it.
    rank: its place in the seeded order; smaller comes first.
    read: returns the image, (H, W, 3) uint8 RGB; raises InputError.
    """

    name: str
    rank: bytes
    read: Callable[[], NDArray[np.uint8]]


@dataclass(kw_only=True, slots=True)
class ImageSource:
    """Candidates of one source.

    kind: what sort of source it is.
    name: last part of its path, for records that must not hold folders of one machine.
    candidates: to be iterated once.
    takes: so many images are kept before the final, seeded choice; more than wanted where the order of `candidates` is
        not the seeded one.
    found: items in the source; complete once `candidates` is exhausted.
    problems: parts of the source that could not be read, one line each.
    """

    kind: SourceKind
    name: str
    candidates: Iterable[Candidate] = ()
    takes: int
    found: int = 0
    problems: list[str] = field(default_factory=list)


def open_source(source: str | Path, *, wanted: int, seed: int = 0, max_pixels: int = DEFAULT_MAX_PIXELS) -> ImageSource:
    """Find out what a calibration source is and offer its images in a seeded order.

    Args:
        source: a folder (searched through; links to folders are not followed), a glob, a video, one or several .tar
            shards (by glob or braces), or a text file of image paths relative to its own folder.
        wanted: images that will be asked for; at most 16 times as many candidates are offered.
        seed: another seed, another order.
        max_pixels: larger images are refused when they are read.

    Raises:
        InputError: there is no such source, it is of no known kind, or nothing in it looks like an image.
    """
    text = os.fspath(source)
    if text.startswith("~/"):  # no shell has seen a quoted glob
        text = str(Path(text).expanduser())
    if not text.strip():
        raise InputError(f"no calibration images are named. {REMEDY}")
    opener = _Opener(text, wanted, seed, max_pixels)
    try:
        return opener.open()
    except OSError as error:
        raise InputError(f"{text} cannot be read: {error.strerror or error}", source=text) from error


class _Opener:
    """One call of `open_source`: its arguments, and one method a kind of source."""

    def __init__(self, text: str, wanted: int, seed: int, max_pixels: int) -> None:
        self._text, self._wanted, self._seed, self._max_pixels = text, wanted, seed, max_pixels
        self._limit = _LOOKS_PER_IMAGE * wanted

    def open(self) -> ImageSource:
        path = Path(self._text)
        if path.is_dir():
            return self._from_folder(path)
        if path.is_file():
            return self._from_file(path)
        if path.exists():
            raise InputError(f"{self._text} is neither a file nor a folder. {REMEDY}", source=self._text)
        if glob.has_magic(self._text) or "{" in self._text:
            return self._from_pattern()
        raise InputError(f"{self._text} does not exist; check the path. {REMEDY}", source=self._text)

    def _from_file(self, path: Path) -> ImageSource:
        suffix = path.suffix.lower()
        if suffix == SHARD_SUFFIX:
            return self._from_shards([path])
        if suffix in LIST_SUFFIXES:
            return self._from_list(path)
        if suffix in VIDEO_SUFFIXES:
            return self._from_video(path)
        if suffix in IMAGE_SUFFIXES:
            raise InputError(f"{path} is one image; calibration takes many. {REMEDY}", source=self._text)
        if path.name.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
            raise InputError(f"{path} is compressed; unpack it to a .tar file first", source=self._text)
        raise InputError(
            f"{path} is of no kind that calibration can read (its ending is {suffix!r}). {REMEDY}", source=self._text
        )

    def _from_folder(self, folder: Path) -> ImageSource:
        source = self._source("folder", folder.resolve().name)
        others: set[str] = set()
        names = _images_below(folder, source.problems, others)
        self._take_files(source, ((name, folder / name) for name in names))
        if not source.found:
            hint = "".join(
                f" It holds {suffix} files: name them themselves, '{folder}/*{suffix}'."
                for suffix in sorted(others & (VIDEO_SUFFIXES | {SHARD_SUFFIX}))
            )
            raise InputError(
                f"{folder}: no images in this folder (looked for {', '.join(sorted(IMAGE_SUFFIXES))})."
                f"{hint} {REMEDY}{_reasons(source.problems)}",
                source=self._text,
            )
        return source

    def _from_pattern(self) -> ImageSource:
        patterns = expand_braces(self._text)
        paths = list(dict.fromkeys(itertools.chain.from_iterable(map(paths_behind, patterns))))
        if not any(path.exists() for path in paths):
            raise InputError(f"{self._text}: no file matches this pattern. {REMEDY}", source=self._text)
        images = [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES]
        if images:
            source = self._source("glob", Path(self._text).name)
            base = _fixed_part(self._text)
            self._take_files(source, ((_relative_name(path, base), path) for path in images))
            return source
        shards = [path for path in paths if path.suffix.lower() == SHARD_SUFFIX]
        if shards:
            return self._from_shards(shards)
        if len(paths) == 1 and paths[0].is_file():
            return self._from_file(paths[0])
        raise InputError(
            f"{self._text} matches {len(paths)} files, but neither images nor .tar shards; of videos and lists one is "
            f"read at a time. {REMEDY}",
            source=self._text,
        )

    def _from_list(self, path: Path) -> ImageSource:
        source = self._source("list", path.name)
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is no UTF-8 text. {REMEDY}", source=self._text) from error
        names = dict.fromkeys(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
        if not names:
            raise InputError(f"{path} names no image: write one path a line", source=self._text)
        for name in names:
            if len(name) > _MAX_LIST_LINE or "\0" in name:
                raise InputError(f"{path} holds a line that is no path: {name[:40]!r}...", source=self._text)
        self._take_files(source, ((name, path.parent / name) for name in names))
        return source

    def _from_shards(self, paths: list[Path]) -> ImageSource:
        source = self._source("shards", Path(self._text).name)
        several_folders = len({path.parent for path in paths}) > 1
        members = (
            (self._rank(f"{path if several_folders else path.name}/{name}"), name, (path, offset, size))
            for path in paths
            for name, offset, size in _image_members(path, source.problems)
        )
        chosen = heapq.nsmallest(self._limit, _counted(members, source))
        if not source.found:
            raise InputError(
                f"{self._text}: no images in the shard(s); calibration reads members that end in "
                f"{', '.join(sorted(IMAGE_SUFFIXES))}{_reasons(source.problems)}",
                source=self._text,
            )
        source.candidates = (self._member_candidate(*item) for item in chosen)
        return source

    def _member_candidate(self, rank: bytes, name: str, place: tuple[Path, int, int]) -> Candidate:
        path, offset, size = place
        label = f"{path.name}: {_printable(name)}"

        def read() -> NDArray[np.uint8]:
            if size > _MAX_MEMBER_BYTES:
                raise InputError(f"{label} is {size:,} bytes; the limit is {_MAX_MEMBER_BYTES:,}")
            try:
                with path.open("rb") as stream:
                    stream.seek(offset)
                    data = stream.read(size)
            except OSError as error:
                raise InputError(f"{label} cannot be read: {error.strerror or error}") from error
            return load_image(data, max_pixels=self._max_pixels, name=label)

        return Candidate(name=label, rank=rank, read=read)

    def _from_video(self, path: Path) -> ImageSource:
        capture = _opened_video(path)
        source = self._source("video", path.name)
        try:
            width, height = (int(capture.get(p)) for p in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
            if width * height > self._max_pixels:
                raise InputError(f"{path} has frames of {width} x {height} pixels; the limit is {self._max_pixels:,}")
            frames = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        finally:
            capture.release()
        source.found = frames if frames > 0 else _count_frames(path)
        if source.found < 1:
            raise InputError(f"{path} holds no frame that can be decoded. {REMEDY}", source=self._text)
        source.takes = _FRAMES_PER_IMAGE * self._wanted
        places = spread_frames(source.found, source.takes, self._seed)
        source.candidates = self._video_candidates(path, places, source.problems)
        return source

    def _video_candidates(self, path: Path, places: list[int], problems: list[str]) -> Iterator[Candidate]:
        """Frames in the order of time: jumping to and fro is slow, and inexact in many recordings."""
        capture = _opened_video(path)
        try:
            position = 0
            for place in places:
                while position <= place and capture.grab():
                    position += 1
                if position <= place:
                    problems.append(f"{path.name}: says it has more frames, but ends after {position}")
                    return
                name = f"{path.name}: frame {place}"
                yield Candidate(
                    name=name, rank=self._rank(f"frame {place}"), read=functools.partial(_frame, capture, name)
                )
        finally:
            capture.release()

    def _take_files(self, source: ImageSource, files: Iterable[tuple[str, Path]]) -> None:
        ranked = ((self._rank(name), name, path) for name, path in files)
        chosen = heapq.nsmallest(self._limit, _counted(ranked, source), key=lambda item: item[:2])
        source.candidates = (self._file_candidate(*item) for item in chosen)

    def _file_candidate(self, rank: bytes, name: str, path: Path) -> Candidate:
        def read() -> NDArray[np.uint8]:
            if path.exists() and not path.is_file():  # a pipe would be waited on for ever
                raise InputError(f"{path} is no file")
            return load_image(path, max_pixels=self._max_pixels)

        return Candidate(name=name, rank=rank, read=read)

    def _source(self, kind: SourceKind, name: str) -> ImageSource:
        return ImageSource(kind=kind, name=_printable(name), takes=self._wanted)

    def _rank(self, name: str) -> bytes:
        return hashlib.sha256(f"{self._seed}\n{name}".encode("utf-8", "surrogateescape")).digest()


def spread_frames(frames: int, count: int, seed: int) -> list[int]:
    """Choose frames of a video: one in each of `count` even stretches of time, at a seeded place within it.

    Returns:
        Ascending frame numbers in 0..frames-1; all of them if there are no more than `count`.
    """
    if frames <= count:
        return list(range(frames))
    edges = [stretch * frames // count for stretch in range(count + 1)]
    places = np.random.default_rng(seed).random(count)
    return [start + int(place * (end - start)) for start, end, place in zip(edges[:-1], edges[1:], places, strict=True)]


def _images_below(folder: Path, problems: list[str], others: set[str]) -> Iterator[str]:
    """Names of images, relative to the folder, with forward slashes; all endings met are put into `others`."""

    def report(error: OSError) -> None:
        problems.append(f"{error.filename} cannot be read: {error.strerror}")

    for root, folders, files in os.walk(folder, onerror=report):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            others.add(Path(name).suffix.lower())
            if _is_image_name(name):
                yield Path(root, name).relative_to(folder).as_posix()


def _is_image_name(name: str) -> bool:
    """Hidden files, as macOS leaves them beside images, and tclkit's own overlays are none."""
    return (
        Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith(".") and not name.endswith(_OVERLAY_ENDING)
    )


def _image_members(path: Path, problems: list[str]) -> Iterator[tuple[str, int, int]]:
    """(name, offset of the bytes, size in bytes) of the images in an uncompressed tar file.

    Only the headers are read. Names are used for the order and in messages, never as paths.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # else every header stays in memory
                if member.isreg() and not member.issparse() and _is_image_name(Path(member.name).name):
                    yield member.name, member.offset_data, member.size
    except OSError as error:
        problems.append(f"{path.name} cannot be read: {error.strerror or error}")
    except Exception as error:  # tarfile raises all sorts of errors on damaged headers
        problems.append(f"{path.name} is no tar file, or a damaged one: {_printable(str(error))}")


def _opened_video(path: Path) -> cv2.VideoCapture:
    capture = cv2.VideoCapture(str(path))
    if not capture.isOpened():
        raise InputError(
            f"{path} cannot be opened as a video: it is damaged, or this OpenCV has no decoder for it. Re-encode it "
            f"(ffmpeg -i IN -c:v libx264 OUT.mp4), or extract frames (ffmpeg -i IN -vf fps=1 frames/%06d.jpg)",
            source=str(path),
        )
    return capture


def _count_frames(path: Path) -> int:
    capture = _opened_video(path)
    try:
        return sum(1 for _ in iter(capture.grab, False))
    finally:
        capture.release()


def _frame(capture: cv2.VideoCapture, name: str) -> NDArray[np.uint8]:
    read, frame_bgr = capture.retrieve()
    if not read or frame_bgr is None or frame_bgr.ndim != 3:
        raise InputError(f"{name} cannot be decoded")
    return cv2.cvtColor(frame_bgr, cv2.COLOR_BGR2RGB).astype(np.uint8, copy=False)


def expand_braces(pattern: str) -> list[str]:
    """Braces of shard names, as webdataset writes them: {0000..0012} and {train,val}."""
    done: list[str] = []
    waiting = [pattern]
    while waiting:
        text = waiting.pop(0)
        if match := _RANGE.search(text):
            first, last = (int(number) for number in match.groups())
            width = len(match[1]) if match[1].startswith("0") else 0
            parts = [f"{number:0{width}d}" for number in range(first, min(last, first + _MAX_SHARDS) + 1)]
        elif match := _CHOICE.search(text):
            parts = match[1].split(",")
        else:
            done.append(text)
            continue
        waiting += [text[: match.start()] + part + text[match.end() :] for part in parts]
        if len(waiting) + len(done) > _MAX_SHARDS:
            raise InputError(f"{pattern} stands for more than {_MAX_SHARDS:,} files", source=pattern)
    return done


def paths_behind(pattern: str) -> list[Path]:
    """Files behind a glob; a name without glob signs stands for itself, there or not, so that a gap is told."""
    if not glob.has_magic(pattern):
        return [Path(pattern)]
    return [path for path in map(Path, glob.glob(pattern, recursive=True)) if path.is_file()]  # noqa: PTH207


def _fixed_part(pattern: str) -> Path:
    """The folders before the first part with a sign in it."""
    parts = Path(pattern).parts
    return Path(*itertools.takewhile(lambda part: not (glob.has_magic(part) or "{" in part), parts[:-1]))


def _relative_name(path: Path, base: Path) -> str:
    return (path.relative_to(base) if path.is_relative_to(base) else path).as_posix()


def _counted(items: Iterable[_Ranked], source: ImageSource) -> Iterator[_Ranked]:
    for item in items:
        source.found += 1
        yield item


def _reasons(problems: list[str]) -> str:
    return "".join(f"; {problem}" for problem in problems[:3])


def _printable(text: str) -> str:
    clean = "".join(character if character.isprintable() else "?" for character in text)
    return clean if len(clean) <= 80 else clean[:77] + "..."
