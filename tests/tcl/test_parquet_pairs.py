"""Parquet files that these tests write: images in them and beside them, readers, positions, memory, what is broken."""

import io
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import tclkit.tcl.pairs as pairs_module
from tclkit.runtime.errors import InputError
from tclkit.runtime.tokenizer import Tokenizer
from tclkit.tcl.pair_batches import AugmentationConfig, PairBatches
from tclkit.tcl.pairs import PairReader, PairsConfig
from tclkit.tcl.parquet_pairs import open_parquet
from tclkit.tcl.tokenizer_file import pruned_tokenizer_json

WORDS = [f"picture {i}" for i in range(100)]


def jpeg(colour: int, side: int = 20) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (side, side), (colour, 0, 0)).save(stream, "JPEG")
    return stream.getvalue()


def as_struct(folder: Path, i: int) -> dict[str, Any]:
    return {"bytes": jpeg(i), "path": f"{i}.jpg"}


def as_bytes(folder: Path, i: int) -> bytes:
    return jpeg(i)


def as_path(folder: Path, i: int) -> str:
    (folder / "images").mkdir(exist_ok=True)
    (folder / "images" / f"{i}.jpg").write_bytes(jpeg(i))
    return f"images/{i}.jpg"


def as_path_in_struct(folder: Path, i: int) -> dict[str, Any]:
    return {"bytes": None, "path": as_path(folder, i)}


STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """write(12, rows=4): a file of twelve pairs in three row groups; returns its path."""

    def make(count: int, *, rows: int = 4, first: int = 0, name: str = "a.parquet", image: Any = as_struct) -> Path:
        numbers = range(first, first + count)
        images = [image(tmp_path, i) for i in numbers]
        kind = STRUCT if isinstance(images[0], dict) else None
        table = {
            "id": pa.array(numbers),
            "image": pa.array(images, kind),
            "caption": [f"picture {i}" for i in numbers],
        }
        pq.write_table(pa.table(table), tmp_path / name, row_group_size=rows)
        return tmp_path / name

    return make


def reader(*sources: str | Path, number: int = 0, readers: int = 1, **changes: Any) -> PairReader:
    return PairReader(PairsConfig(sources=list(map(str, sources)), **changes), reader=number, readers=readers)


def captions(pairs: PairReader, count: int) -> list[str]:
    return [pair.caption for pair in itertools.islice(pairs, count)]


@pytest.mark.parametrize("image", [as_struct, as_bytes, as_path, as_path_in_struct])
def test_an_epoch_has_every_pair_once(write: Write, image: Any) -> None:
    pairs = reader(write(11, image=image))
    first, second = list(itertools.islice(pairs, 11)), captions(pairs, 11)
    assert sorted(pair.caption for pair in first) == sorted(second) == sorted(WORDS[:11])
    assert [pair.caption for pair in first] not in (second, WORDS[:11])
    for pair in first:
        assert abs(int(pair.image_hwc[0, 0, 0]) - int(pair.caption.split()[1])) <= 2


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        ("jpg", pa.binary()),
        ("Image", pa.large_binary()),
        ("png", pa.binary_view()),
        ("filepath", pa.large_string()),
        ("path", pa.dictionary(pa.int32(), pa.string())),
        ("image", pa.string_view()),
    ],
)
@pytest.mark.parametrize(
    ("text", "text_kind"),
    [("TEXT", pa.string()), ("title", pa.large_string()), ("caption", pa.dictionary(pa.int8(), pa.string()))],
)
def test_columns_of_other_names_and_types(
    tmp_path: Path, column: str, kind: pa.DataType, text: str, text_kind: pa.DataType
) -> None:
    is_path = "string" in str(kind)
    images = pa.array([as_path(tmp_path, i) if is_path else jpeg(i) for i in range(3)])
    made = pa.table({column: images.cast(kind), text: pa.array(WORDS[:3]).cast(text_kind), "url": ["x"] * 3})
    pq.write_table(made, tmp_path / "a.parquet")
    assert sorted(captions(reader(tmp_path / "a.parquet"), 3)) == WORDS[:3]


def test_several_files_are_one_source(write: Write, tmp_path: Path) -> None:
    for i in range(3):
        write(4, first=4 * i, name=f"train-{i}.parquet")
    assert sorted(captions(reader(tmp_path / "train-*.parquet"), 12)) == sorted(WORDS[:12])
    assert sorted(captions(reader(tmp_path / "train-{0..2}.parquet"), 12)) == sorted(WORDS[:12])


@pytest.mark.parametrize(("rows", "readers"), [(2, 3), (4, 2), (100, 3), (5, 4), (1, 13)])
def test_readers_share_without_duplicates(write: Write, rows: int, readers: int) -> None:
    """By row groups where there are enough, else by rows of each."""
    path = write(13, rows=rows)
    found = []
    for number in range(readers):
        pairs = reader(path, number=number, readers=readers)
        own = sum(len(group.rows()[0]) for group in open_parquet([path], number, readers))
        epoch = captions(pairs, own)
        assert sorted(captions(pairs, own)) == sorted(epoch)
        found += epoch
    assert sorted(found) == sorted(WORDS[:13])


@pytest.mark.parametrize("taken", [0, 1, 5, 17, 18, 40])
@pytest.mark.parametrize("limit", [0, 3000, 1 << 30])
def test_a_position_is_gone_on_from(write: Write, monkeypatch: pytest.MonkeyPatch, taken: int, limit: int) -> None:
    monkeypatch.setattr(pairs_module, "_MIXED_BYTES", limit)
    path = write(18, rows=2)
    pairs = reader(path)
    captions(pairs, taken)
    position = json.loads(json.dumps(pairs.position))
    rest = captions(pairs, 30)
    other = reader(path)
    other.position = position
    assert captions(other, 30) == rest
    assert other.position == pairs.position


def test_as_many_row_groups_are_mixed_as_fit(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(12, rows=4)
    sizes = [group.size_bytes for group in open_parquet([path], 0, 1)]
    assert all(4 * len(jpeg(0)) < size < 8 * len(jpeg(0)) for size in sizes)
    for limit, together in ((0, 4), (sizes[0] * 2 + 500, 8), (sum(sizes), 12)):
        monkeypatch.setattr(pairs_module, "_MIXED_BYTES", limit)
        pairs = reader(path)
        first = captions(pairs, 1)[0]
        source = pairs._sources[0]
        assert len(source._group) == together, limit
        assert first in {entry.text for entry in source._group}
        assert sorted([first, *captions(pairs, 11)]) == sorted(WORDS[:12])


def test_workers_read_what_one_process_would(write: Write) -> None:
    """Forked after pyarrow has been used."""
    tokenizer = Tokenizer(pruned_tokenizer_json(WORDS[:12]), 12)
    plain = AugmentationConfig(size=16, min_crop=1, flip=0, rand_augment=0, colour_jitter=0, erase=0)
    sources = PairsConfig(sources=[str(write(12, rows=3))])
    batches = PairBatches(sources, plain, tokenizer, 3, workers=2)
    texts = [row[row > 0].tolist() for _ in range(4) for row in batches.next().token_ids_BL]
    assert sorted(texts) == sorted(row[row > 0].tolist() for row in tokenizer.encode(WORDS[:12]))


def test_memory_is_that_of_the_mixed_groups(tmp_path: Path) -> None:
    """256 MB of images through a reader that may hold two groups of 8 MB; measured in a process of its own."""
    noise = [bytes(1 << 20) for _ in range(8)]
    schema = pa.schema([("image", pa.binary()), ("caption", pa.string())])
    with pq.ParquetWriter(tmp_path / "big.parquet", schema, compression="NONE", use_dictionary=False) as writer:
        for i in range(32):
            writer.write_table(pa.table({"image": noise, "caption": [f"picture {i}"] * 8}, schema))
    program = (
        "import sys, pyarrow as pa\n"
        "import tclkit.tcl.pairs as m\n"
        "m._MIXED_BYTES = 17 << 20\n"
        "source = m._open_source(sys.argv[1], 0, 0, 1)\n"
        "seen = [len(source.next(m.Counter()).image.read(1 << 21)) for _ in range(256)]\n"
        "print(sum(seen) >> 20, pa.default_memory_pool().max_memory() >> 20)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "big.parquet"], capture_output=True, text=True, check=True
    )
    seen_mb, peak_mb = map(int, run.stdout.split())
    assert seen_mb == 256
    assert peak_mb < 32, "two groups, and the pages of the one that is being read"


def test_what_is_broken_is_counted_and_passed_over(tmp_path: Path) -> None:
    rows: list[tuple[Any, Any]] = [
        (None, "no picture"),
        ({"bytes": None, "path": None}, "no picture either"),
        ({"bytes": jpeg(1), "path": None}, None),
        ({"bytes": jpeg(1), "path": None}, "?!"),
        ({"bytes": jpeg(1, side=1), "path": None}, "one pixel"),
        ({"bytes": jpeg(1)[:100], "path": None}, "half a picture"),
        ({"bytes": b"", "path": None}, "nothing"),
        ({"bytes": None, "path": "none.jpg"}, "not there"),
        ({"bytes": jpeg(7), "path": None}, "picture 7"),
    ]
    images, texts = zip(*rows, strict=True)
    pq.write_table(pa.table({"image": pa.array(images, STRUCT), "caption": texts}), tmp_path / "a.parquet")
    pairs = reader(tmp_path / "a.parquet")
    assert captions(pairs, 2) == ["picture 7"] * 2
    captions(pairs, 1)
    assert pairs.broken.keys() == {"no image", "no text", "empty text", "small image", "image"}
    assert 16 <= pairs.broken.total() <= 24
    with pytest.raises(InputError, match=r"\d+ of \d+ pairs are broken.*max_broken.*a.parquet: row \d of group 0"):
        captions(pairs, 10)


def test_a_damaged_row_group_is_counted_and_the_others_are_read(write: Write) -> None:
    path = write(12, rows=4)
    metadata = pq.ParquetFile(path).metadata
    content = bytearray(path.read_bytes())
    start = metadata.row_group(1).column(1).data_page_offset
    content[start : start + 40] = b"\xff" * 40
    path.write_bytes(content)
    pairs = reader(path)
    assert set(captions(pairs, 16)) == {*WORDS[:4], *WORDS[8:12]}
    assert pairs.broken == {"shard": 2}


def refused(path: Path, message: str, **changes: Any) -> None:
    with pytest.raises(InputError, match=message):
        reader(path, **changes)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"a": [1], "caption": ["x"]}, "no column image or jpg .* its columns are a, caption"),
        ({"image": [b"x"], "words": ["x"]}, "no column caption or text or title"),
        ({"image": [1.5], "caption": ["x"]}, "column image of .* holds double, but an image is a path, bytes"),
        ({"image": [[b"x"]], "caption": ["x"]}, "holds list<"),
        ({"image": [{"url": "x"}], "caption": ["x"]}, "holds struct<url: string>"),
        ({"image": [b"x"], "caption": [["x", "y"]]}, "column caption of .* holds list<.*not one text a row"),
        ({"image": [b"x"], "caption": [None]}, "holds null"),
    ],
)
def test_tables_without_pairs_are_refused(tmp_path: Path, table: dict[str, Any], message: str) -> None:
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    refused(tmp_path / "a.parquet", message)


def test_files_that_are_none_are_refused(write: Write, tmp_path: Path) -> None:
    path = write(4)
    refused(tmp_path / "none.parquet", "1 of 1 files of .* do not exist")
    refused(tmp_path / "none-*.parquet", "no file fits")
    refused(path, "fewer than the 5 readers", number=4, readers=5)
    path.write_bytes(path.read_bytes()[:200])
    refused(path, "a.parquet is no parquet file, or one that was cut.*Fetch it again")
    pq.write_table(pa.table({"image": pa.array([], pa.binary()), "caption": pa.array([], pa.string())}), path)
    refused(path, "has no pairs, or fewer")


def test_without_pyarrow_the_remedy_is_named(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(4)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(path, r'needs pyarrow: pip install "\.\[parquet\]"')


def test_pyarrow_is_loaded_for_parquet_only() -> None:
    code = "import tclkit.tcl.pairs, sys; print('pyarrow' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
