"""Parquet files of image-text pairs, as Hugging Face data sets and img2dataset write them, read a row group at a time.

An image is a path, relative to the file; its bytes; or the struct of both that Hugging Face writes. pyarrow reads the
files and is imported when one is opened. Files must be local.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tclkit.runtime.errors import InputError
from tclkit.runtime.extras import install_command

if TYPE_CHECKING:
    import pyarrow as pa

PARQUET_SUFFIX = ".parquet"
# What a table's columns may be called, the first choice first, of CSV files too; jpg ... webp are img2dataset's.
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "filepath", "path")
TEXT_COLUMNS = ("caption", "text", "title")


@dataclass(frozen=True, slots=True)
class Cell:
    """The bytes of an image in a column that has been read."""

    column: "pa.ChunkedArray"
    row: int

    def read(self, limit: int) -> bytes:
        """Copy them.

        Raises:
            InputError: there are more than `limit`.
        """
        content: bytes = self.column[self.row].as_py()
        if len(content) > limit:
            raise InputError(f"{len(content):,} bytes are more than the {limit:,} allowed")
        return content


@dataclass(frozen=True, slots=True)
class Row:
    """A pair that has not been decoded; what is missing is None."""

    name: str
    image: Cell | Path | None
    text: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class RowGroup:
    """One row group of a file, or one reader's part of it.

    path, number: the file, and which of its groups.
    columns: names of the image and the text column.
    size_bytes: of both columns in memory, once read.
    part, parts: the rows part, part + parts, ... are read.
    """

    path: Path
    number: int
    columns: tuple[str, str]
    size_bytes: int
    part: int = 0
    parts: int = 1

    def rows(self) -> tuple[list[Row], bool]:
        """Its rows in order, and whether it could be read; one that is damaged has none."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            # Without pyarrow's threads: readers are processes, often forked ones, that share the CPUs already.
            with pq.ParquetFile(self.path, pre_buffer=False) as file:
                table = file.read_row_group(self.number, columns=list(self.columns), use_threads=False)
        except (pa.ArrowException, OSError):
            return [], False
        own = range(self.part, table.num_rows, self.parts)
        if self.parts > 1:
            table = table.take(pa.array(own, pa.int64()))
        contents, paths = _contents_and_paths(table.column(self.columns[0]))
        texts = table.column(self.columns[1])
        found = []
        for i, row in enumerate(own):
            image: Cell | Path | None = None
            if contents is not None and contents[i].is_valid:
                image = Cell(contents, i)
            elif paths is not None and (path := paths[i].as_py()):
                image = self.path.parent / path
            found.append(Row(f"{self.path.name}: row {row} of group {self.number}", image, texts[i].as_py()))
        return found, True


def open_parquet(paths: Sequence[Path], reader: int, readers: int) -> list[RowGroup]:
    """Find one reader's row groups of some files; where there are fewer groups than readers, its rows of each.

    Args:
        paths: the files.
        reader: which part to read, in 0..readers-1; no pair is in two.
        readers: how many parts there are.

    Returns:
        Row groups in the order of the files; images and texts are read when they are asked for.

    Raises:
        InputError: pyarrow is not installed, a file cannot be read, lacks a column or holds something else in it, or
            there are fewer pairs than readers.
    """
    groups = [group for path in paths for group in _row_groups(path)]
    if len(groups) >= readers:
        return [group for group, _ in groups[reader::readers]]
    own = [_part_of(group, reader, readers) for group, count in groups if count > reader]
    if not own:
        raise InputError(f"{paths[0]} has no pairs, or fewer than the {readers} readers (processes x workers)")
    return own


def _part_of(group: RowGroup, part: int, parts: int) -> RowGroup:
    return RowGroup(
        path=group.path,
        number=group.number,
        columns=group.columns,
        size_bytes=group.size_bytes // parts,
        part=part,
        parts=parts,
    )


def _row_groups(path: Path) -> list[tuple[RowGroup, int]]:
    """Row groups of a file and their numbers of rows, from its footer; empty ones are left out."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise InputError(
            f"reading {path} needs pyarrow: {install_command('parquet')}",
            path=str(path),
        ) from error
    try:
        with pq.ParquetFile(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{path} is no parquet file, or one that was cut: {error}. Fetch it again, or leave it out", path=str(path)
        ) from error
    columns = (column_named(path, schema.names, IMAGE_COLUMNS), column_named(path, schema.names, TEXT_COLUMNS))
    _check_types(path, schema, columns)
    found = []
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        chunks = [group.column(i) for i in range(group.num_columns)]
        size = sum(one.total_uncompressed_size for one in chunks if one.path_in_schema.split(".")[0] in columns)
        if group.num_rows:
            found.append((RowGroup(path=path, number=number, columns=columns, size_bytes=size), group.num_rows))
    return found


def column_named(path: Path, columns: Sequence[str], wanted: Sequence[str]) -> str:
    """The column of a table that is the first choice, whatever the order in the file.

    Raises:
        InputError: there is none of the wanted.
    """
    by_name = {name.strip().lower(): name for name in columns}
    for name in wanted:
        if name in by_name:
            return by_name[name]
    raise InputError(f"{path} has no column {' or '.join(wanted)}; its columns are {', '.join(columns) or 'none'}")


def _check_types(path: Path, schema: "pa.Schema", columns: tuple[str, str]) -> None:
    image, text = columns
    image_type, text_type = schema.field(image).type, schema.field(text).type
    is_readable = any(_is_bytes(kind) or _is_text(kind) for kind in _parts_of(image_type).values())
    if not is_readable:
        raise InputError(
            f"the column {image} of {path} holds {image_type}, but an image is a path, bytes, or a struct of both",
            path=str(path),
        )
    if not _is_text(text_type):
        raise InputError(f"the column {text} of {path} holds {text_type}, not one text a row", path=str(path))


def _contents_and_paths(
    images: "pa.ChunkedArray",
) -> tuple["pa.ChunkedArray | None", "pa.ChunkedArray | None"]:
    """The column of bytes and that of paths; None for one that is not there."""
    import pyarrow.compute as pc
    import pyarrow.types as kinds

    is_struct = kinds.is_struct(images.type)
    contents = paths = None
    for name, kind in _parts_of(images.type).items():
        column = pc.struct_field(images, name) if is_struct else images
        if _is_bytes(kind):
            contents = column
        elif _is_text(kind):
            paths = column
    return contents, paths


def _parts_of(kind: "pa.DataType") -> dict[str, "pa.DataType"]:
    """Types of a struct's fields that an image can be in; of another type itself."""
    import pyarrow.types as kinds

    if not kinds.is_struct(kind):
        return {"": kind}
    return {field.name: field.type for field in kind if field.name in ("bytes", "path")}


def _is_bytes(kind: "pa.DataType") -> bool:
    import pyarrow.types as kinds

    checks = (kinds.is_binary, kinds.is_large_binary, kinds.is_binary_view)
    return any(check(kind) for check in checks)


def _is_text(kind: "pa.DataType") -> bool:
    import pyarrow.types as kinds

    if kinds.is_dictionary(kind):
        kind = kind.value_type
    return any(check(kind) for check in (kinds.is_string, kinds.is_large_string, kinds.is_string_view))
