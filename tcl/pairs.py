"""Image-text pairs for training: webdataset shards, parquet, CSV and folders, in a seeded order from any position.

A reader is one worker of one process; each reads its own part of every source. Shards are opened a few at a time: their
headers are listed, the pairs of all are mixed, and each is read where it lies. So an order needs no buffer, and where
a reader stands is a few numbers. Row groups of parquet files, which are read whole, are mixed as far as memory allows.
Files must be local.
"""

import csv
import hashlib
import itertools
import json
import logging
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tclkit.calib.image_sources import SHARD_SUFFIX, expand_braces, paths_behind
from tclkit.runtime.errors import ConfigError, InputError
from tclkit.runtime.image_suffixes import IMAGE_SUFFIXES
from tclkit.runtime.images import load_image
from tclkit.runtime.tokenizer import clean_text

from .parquet_pairs import (
    IMAGE_COLUMNS,
    PARQUET_SUFFIX,
    TEXT_COLUMNS,
    Cell,
    RowGroup,
    column_named,
    open_parquet,
)

_log = logging.getLogger(__name__)
_TEXT_SUFFIX = ".txt"
_MAX_IMAGE_BYTES, _MAX_TEXT_BYTES = 64 << 20, 1 << 16
_MIXED_SHARDS = 8  # shards whose pairs are mixed with each other
_MIXED_BYTES = 256 << 20  # of row groups that are in memory together, unless one alone is larger
_BROKEN_ALLOWED = 20  # so many are let pass before their share counts
_DAMAGED_ALLOWED = 1  # of shards


@dataclass(frozen=True, kw_only=True, slots=True)
class PairsConfig:
    """Where pairs come from and which of them are good enough.

    sources: names of shards ("cc3m/{00000..00331}.tar", globs too), folders of images with a .txt beside each, CSV
        files with the columns image and caption, or parquet files ("train-*.parquet") with the same, images as paths
        or as bytes.
    weights: how often each source is drawn from, in proportion; empty: all alike.
    seed: of the order and of the augmentation.
    min_side: images with a shorter side are broken, in pixels.
    max_broken: share of broken pairs, and of a source's damaged shards, 0 or more and below 1, above which training
        stops.
    """

    sources: list[str]
    weights: list[float] = field(default_factory=list)
    seed: int = 0
    min_side: int = 16
    max_broken: float = 0.05

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("pairs.sources is empty; name shards, folders, CSV or parquet files", key="sources")
        if self.weights and (len(self.weights) != len(self.sources) or min(self.weights) <= 0):
            raise ConfigError(
                f"pairs.weights must be one positive number for each of {len(self.sources)} sources, "
                f"not {self.weights!r}. Give as many, as in --set 'pairs.weights={[1] * len(self.sources)}', or none: "
                "--set 'pairs.weights=[]'",
                key="weights",
            )
        if not 0 <= self.max_broken < 1:
            raise ConfigError(
                f"pairs.max_broken must be 0 or more and below 1, not {self.max_broken!r}", key="max_broken"
            )
        if self.min_side < 1:
            raise ConfigError(f"pairs.min_side must be 1 pixel or more, not {self.min_side!r}", key="min_side")


@dataclass(frozen=True, slots=True)
class Pair:
    """An image, (H, W, 3) uint8 RGB, and its cleaned caption; number counts a reader's pairs, broken ones too."""

    image_hwc: NDArray[np.uint8]
    caption: str
    number: int


@dataclass(frozen=True, slots=True)
class _Piece:
    """Bytes in a file: a member of a shard or a whole file."""

    path: Path
    start: int = 0
    size: int = -1

    def read(self, limit: int) -> bytes:
        if self.size > limit:
            raise InputError(f"{self.size:,} bytes are more than the {limit:,} allowed")
        with self.path.open("rb") as stream:
            stream.seek(self.start)
            content = stream.read(self.size if self.size >= 0 else limit + 1)
        if len(content) > limit or len(content) < self.size:
            raise InputError(f"{len(content):,} bytes do not fit the {self.size:,} expected, or the {limit:,} allowed")
        return content


@dataclass(frozen=True, slots=True)
class _Entry:
    """A pair that has not been read; what is missing is None."""

    name: str
    image: _Piece | Cell | None
    text: _Piece | str | None


class PairReader:
    """An endless stream of one reader's pairs, the same for the same numbers, and its position.

    broken: how many pairs were passed over, by reason: "no image", "no text", "image", "small image", "empty text", and
        "shard" for every shard that ends too early, or row group, that cannot be read.
    """

    def __init__(self, config: PairsConfig, *, reader: int = 0, readers: int = 1) -> None:
        """Find the files of every source.

        Args:
            config: see `PairsConfig`.
            reader: which part of every source to read, in 0..readers-1.
            readers: how many parts there are; a source of shards must have at least so many, others as many pairs.

        Raises:
            InputError: a source has no files, or too few shards for so many readers; or pyarrow is needed and missing.
        """
        self._config, self._reader = config, reader
        self._sources = [_open_source(name, config.seed + i, reader, readers) for i, name in enumerate(config.sources)]
        weights = np.array(config.weights or [1.0] * len(self._sources))
        self._shares = weights / weights.sum()
        self.broken: Counter[str] = Counter()
        self._number = 0

    @property
    def position(self) -> dict[str, Any]:
        """Where the stream stands, as plain values; set it to go on there, which needs the same files.

        files: digest of each source's names and sizes. Older positions lack it and are taken unchecked, with a warning.
        """
        states = [source.position for source in self._sources]
        files = [source.files for source in self._sources]
        return {"number": self._number, "sources": states, "files": files, "broken": dict(self.broken)}

    @position.setter
    def position(self, position: Mapping[str, Any]) -> None:
        if len(position["sources"]) != len(self._sources):
            raise InputError(
                f"the position is one of {len(position['sources'])} sources, but there are {len(self._sources)}; "
                "go on with the sources that the run began with"
            )
        if "files" not in position:
            _log.warning(
                "the position does not say of which files it is: pairs are skipped and repeated if they changed"
            )
        for source, files in zip(self._sources, position.get("files", ()), strict=False):
            source.check_files(files)
        self._number, self.broken = position["number"], Counter(position["broken"])
        for source, state in zip(self._sources, position["sources"], strict=True):
            source.position = list(state)

    def __iter__(self) -> Iterator[Pair]:
        """Read on; after a pair `position` is that of the next one.

        Raises:
            InputError: more pairs or shards are broken than the configuration allows, or a source has no pair at all.
        """
        while True:
            choice = np.random.default_rng([self._config.seed, self._reader, self._number]).random()
            chosen = min(int(np.searchsorted(np.cumsum(self._shares), choice, side="right")), len(self._sources) - 1)
            source, number = self._sources[chosen], self._number
            entry = source.next(self.broken)
            source.stop_at_damaged(self._config.max_broken)
            self._number += 1
            try:
                pair = self._read(entry, number)
            except _BrokenError as error:
                self.broken[error.reason] += 1
                self._stop_at_limit(entry.name)
            else:
                yield pair

    def _read(self, entry: _Entry, number: int) -> Pair:
        if entry.image is None:
            raise _BrokenError("no image")
        if entry.text is None:
            raise _BrokenError("no text")
        try:
            text = entry.text if isinstance(entry.text, str) else entry.text.read(_MAX_TEXT_BYTES).decode("utf-8")
            caption = clean_caption(text)
        except (InputError, UnicodeDecodeError, OSError) as error:
            raise _BrokenError("no text") from error
        if not caption:
            raise _BrokenError("empty text")
        try:
            image_hwc = load_image(entry.image.read(_MAX_IMAGE_BYTES), name=entry.name)
        except (InputError, OSError) as error:
            raise _BrokenError("image") from error
        if min(image_hwc.shape[:2]) < self._config.min_side:
            raise _BrokenError("small image")
        return Pair(image_hwc, caption, number)

    def _stop_at_limit(self, name: str) -> None:
        count = self.broken.total() - self.broken["shard"]
        if count > max(_BROKEN_ALLOWED, self._config.max_broken * self._number):
            reasons = ", ".join(f"{amount} of {reason!r}" for reason, amount in sorted(self.broken.items()))
            raise InputError(
                f"{count} of {self._number} pairs are broken ({reasons}), more than pairs.max_broken = "
                f"{self._config.max_broken} allows; the last one is {name}. Look at the data, or raise the limit"
            )


def clean_caption(text: str) -> str:
    """Clean a caption as CLIP cleans prompts; one without a letter or digit becomes empty.

    Raises:
        InputError: not valid Unicode.
    """
    cleaned = clean_text("".join(sign if sign.isprintable() else " " for sign in text))
    return cleaned if any(sign.isalnum() for sign in cleaned) else ""


class _BrokenError(Exception):
    """A pair that cannot be used, and why."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class _Source:
    """Entries of one source, epoch after epoch, each time in another seeded order.

    position: [epoch, first shard of the group that is being read, entries taken of it].
    files: digest of the names and sizes of all its files, whichever reader has them.
    damaged: names of its shards that could not be read to their end.
    """

    def __init__(self, name: str, shards: Sequence["_Shard"], seed: Sequence[int], files: str) -> None:
        self._name, self._shards, self._seed, self.files = name, shards, seed, files
        self.position = [0, 0, 0]
        self._loaded: tuple[int, int] | None = None
        self._group: list[_Entry] = []
        self._mixed = 0  # shards of the group
        self._barren = 0  # shards in a row without an entry
        self.damaged: set[str] = set()

    def check_files(self, files: str) -> None:
        if files != self.files:
            raise InputError(
                f"the files of {self._name} are not those that the run was reading: names or sizes differ, so that "
                "pairs would be skipped and repeated. Bring back the files of then, or begin anew with --resume never",
                source=self._name,
            )

    def stop_at_damaged(self, max_broken: float) -> None:
        if len(self.damaged) > max(_DAMAGED_ALLOWED, max_broken * len(self._shards)):
            raise InputError(
                f"{len(self.damaged)} of the {len(self._shards)} shards of {self._name} that this reader has are "
                f"damaged, more than pairs.max_broken = {max_broken} allows: "
                f"{', '.join(sorted(self.damaged)[:3])}. Fetch them again, leave them out, or raise the limit"
            )

    def next(self, broken: Counter[str]) -> _Entry:
        while True:
            epoch, first, taken = self.position
            if self._loaded != (epoch, first):
                self._load(epoch, first, broken, begun=taken > 0)
            if taken < len(self._group):
                self.position = [epoch, first, taken + 1]
                return self._group[taken]
            first += self._mixed
            self.position = [epoch, first, 0] if first < len(self._shards) else [epoch + 1, 0, 0]

    def _load(self, epoch: int, first: int, broken: Counter[str], *, begun: bool) -> None:
        order = np.random.default_rng([*self._seed, epoch]).permutation(len(self._shards))
        mixed_shards = _as_many_as_fit([self._shards[i] for i in order[first : first + _MIXED_SHARDS]])
        self._group = []  # may be in memory, which the next one needs
        entries: list[_Entry] = []
        for shard in mixed_shards:
            found, whole = shard.entries()
            entries += found
            if whole:
                continue
            if shard.name not in self.damaged:
                _log.warning("%s is damaged: only %d pairs of it can be found", shard.name, len(found))
                self.damaged.add(shard.name)
            if not begun:  # one that is gone on with has been counted
                broken["shard"] += 1
        mixed = np.random.default_rng([*self._seed, epoch, first, 1]).permutation(len(entries))
        self._group, self._loaded, self._mixed = [entries[i] for i in mixed], (epoch, first), len(mixed_shards)
        self._barren = 0 if entries else self._barren + len(mixed_shards)
        if self._barren >= 2 * len(self._shards):  # an epoch from its beginning is among them
            raise InputError(f"{self._name} holds no image and no text; see that it is what you mean")


class _Shard(Protocol):
    """What is listed at once.

    name: for people, and no other shard of the source has it.
    size_bytes: of what its entries keep in memory.
    """

    @property
    def name(self) -> str: ...

    @property
    def size_bytes(self) -> int: ...

    def entries(self) -> tuple[list[_Entry], bool]:
        """What it holds, and whether it could be read to its end."""


def _as_many_as_fit(shards: Sequence[_Shard]) -> Sequence[_Shard]:
    """The first one, and those after it that fit into memory beside it."""
    sizes = itertools.accumulate(shard.size_bytes for shard in shards)
    return shards[: max(1, sum(size <= _MIXED_BYTES for size in sizes))]


@dataclass(frozen=True, slots=True)
class _Listed:
    """The entries of a folder or CSV file that one reader has."""

    name: str
    listed: tuple[_Entry, ...]
    size_bytes: int = 0

    def entries(self) -> tuple[list[_Entry], bool]:
        return list(self.listed), True


@dataclass(frozen=True, slots=True)
class _Rows:
    """A row group of a parquet file."""

    group: RowGroup

    @property
    def name(self) -> str:
        return f"row group {self.group.number} of {self.group.path}"

    @property
    def size_bytes(self) -> int:
        return self.group.size_bytes

    def entries(self) -> tuple[list[_Entry], bool]:
        rows, whole = self.group.rows()
        return [
            _Entry(row.name, _Piece(row.image) if isinstance(row.image, Path) else row.image, row.text) for row in rows
        ], whole


@dataclass(frozen=True, slots=True)
class _Tar:
    """A tar file; of its entries only the places are kept."""

    path: Path
    size_bytes: int = 0

    @property
    def name(self) -> str:
        return str(self.path)

    def entries(self) -> tuple[list[_Entry], bool]:
        pieces: dict[str, dict[str, _Piece]] = {}
        whole = True
        try:
            size = self.path.stat().st_size
            with tarfile.open(self.path, "r:") as archive:
                for member in archive:
                    if member.issparse():  # its bytes do not lie in one piece
                        continue
                    if not 0 <= member.size <= size - member.offset_data:
                        raise tarfile.ReadError("the last member is cut, or its header damaged")
                    if member.isfile():
                        piece = _Piece(self.path, member.offset_data, member.size)
                        _sort_in(pieces, member.name, piece, webdataset=True)
        except Exception:  # tarfile raises all sorts of errors on damaged headers, RecursionError and ValueError too
            whole = False
        return [
            _Entry(f"{self.path.name}/{name}", kinds.get("image"), kinds.get("text")) for name, kinds in pieces.items()
        ], whole


def _sort_in(pieces: dict[str, dict[str, _Piece]], name: str, piece: _Piece, *, webdataset: bool) -> None:
    """A sample is what has the same name up to the last dot; in webdataset's shards, to the first of its last part."""
    folder, slash, file = name.rpartition("/")
    stem, dot, ending = file.partition(".") if webdataset else file.rpartition(".")
    suffix = dot + ending.lower()
    is_hidden = file.startswith(".")
    if not is_hidden and (suffix in IMAGE_SUFFIXES or suffix == _TEXT_SUFFIX):
        pieces.setdefault(folder + slash + stem, {})["text" if suffix == _TEXT_SUFFIX else "image"] = piece


def _open_source(name: str, seed: int, reader: int, readers: int) -> _Source:
    path = Path(name)
    shards: Sequence[_Shard]
    if path.is_dir():
        entries = list(_entries_of_folder(path))
        pieces = (piece for entry in entries for piece in (entry.image, entry.text) if isinstance(piece, _Piece))
        files = _digest((piece.path for piece in pieces), below=path)
        shards = [_listed(path, entries, reader, readers)]
    elif path.suffix.lower() == ".csv":
        shards = [_listed(path, _entries_of_csv(path), reader, readers)]
        files = _digest([path])
    elif path.suffix.lower() == PARQUET_SUFFIX:
        paths = _paths_of(name, PARQUET_SUFFIX)
        shards = [_Rows(group) for group in open_parquet(paths, reader, readers)]
        files = _digest(paths)
    else:
        paths = _paths_of(name, SHARD_SUFFIX)
        shards = [_Tar(path) for path in paths[reader::readers]]
        files = _digest(paths)
        if not shards:
            raise InputError(
                f"{name} has fewer shards than the {readers} readers (processes x workers); each needs one of its own. "
                "Use fewer workers, or split the shards"
            )
    return _Source(name, shards, (seed, reader), files)


def _digest(paths: Iterable[Path], *, below: Path | None = None) -> str:
    """Hex digest of files' sizes and names, which begin below a folder or are bare: a source that is moved keeps it."""
    found = [(path.relative_to(below).as_posix() if below else path.name, path.stat().st_size) for path in paths]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def _paths_of(name: str, suffix: str) -> list[Path]:
    paths = sorted({path for pattern in expand_braces(name) for path in paths_behind(pattern)})
    if not paths:
        raise InputError(f"no file fits {name}; check the pattern", source=name)
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise InputError(f"{len(missing)} of {len(paths)} files of {name} do not exist, {missing[0]} first")
    other = [path for path in paths if path.suffix.lower() != suffix]
    if other:
        raise InputError(f"{other[0]} is no {suffix} file; a source is shards, a folder, a .csv or .parquet files")
    return paths


def _listed(path: Path, entries: Iterable[_Entry], reader: int, readers: int) -> _Listed:
    own = tuple(itertools.islice(entries, reader, None, readers))
    if not own:
        raise InputError(f"{path} has no pairs, or fewer than the {readers} readers (processes x workers)")
    return _Listed(str(path), own)


def _entries_of_folder(folder: Path) -> Iterator[_Entry]:
    pieces: dict[str, dict[str, _Piece]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            _sort_in(pieces, path.relative_to(folder).as_posix(), _Piece(path), webdataset=False)
    for name, kinds in pieces.items():
        yield _Entry(name, kinds.get("image"), kinds.get("text"))


def _entries_of_csv(path: Path) -> Iterator[_Entry]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:  # Excel writes a byte order mark
            rows = csv.DictReader(stream)
            names = [column_named(path, rows.fieldnames or [], wanted) for wanted in (IMAGE_COLUMNS, TEXT_COLUMNS)]
            for row in rows:
                image, text = (row[name] for name in names)
                yield _Entry(image or path.name, _Piece(path.parent / image) if image else None, text)
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; check the path", path=str(path)) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is not a CSV file in UTF-8: {error}", path=str(path)) from error
