"""Reading pairs: shards, folders, CSV files, what is broken in them, and going on from a position."""

import io
import itertools
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tclkit.runtime.errors import ConfigError, InputError
from tclkit.tcl.pairs import PairReader, PairsConfig, clean_caption


def jpeg(colour: int, side: int = 20) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (side, side), (colour, 0, 0)).save(stream, "JPEG")
    return stream.getvalue()


def write_shard(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    """A tar file as img2dataset writes it."""
    with tarfile.open(path, "w") as archive:
        for name, parts in samples.items():
            for suffix, content in parts.items():
                member = tarfile.TarInfo(f"{name}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def good(number: int) -> dict[str, bytes]:
    meta = json.dumps({"caption": "not this one"}).encode()
    return {"jpg": jpeg(number), "txt": f"picture {number}".encode(), "json": meta}


@pytest.fixture
def shards(tmp_path: Path) -> Callable[..., str]:
    """shards(3, pairs=4): writes three shards of four pairs each; returns their pattern."""

    def write(count: int, pairs: int = 4, name: str = "a") -> str:
        for i in range(count):
            samples = {f"{i:05d}{j:04d}": good(i * pairs + j) for j in range(pairs)}
            write_shard(tmp_path / f"{name}-{i:05d}.tar", samples)
        return str(tmp_path / f"{name}-{{00000..{count - 1:05d}}}.tar")

    return write


def reader(*sources: str | Path, number: int = 0, readers: int = 1, **changes) -> PairReader:
    return PairReader(PairsConfig(sources=list(map(str, sources)), **changes), reader=number, readers=readers)


def captions(pairs: PairReader, count: int) -> list[str]:
    return [pair.caption for pair in itertools.islice(pairs, count)]


def test_an_epoch_has_every_pair_once_and_the_next_another_order(shards):
    pairs = reader(shards(3))
    first, second = captions(pairs, 12), captions(pairs, 12)
    assert sorted(first) == sorted(second) == sorted(f"picture {i}" for i in range(12))
    assert first != second
    assert first != [f"picture {i}" for i in range(12)]


def test_more_shards_than_are_mixed_are_all_read(shards):
    assert len(set(captions(reader(shards(19, pairs=2)), 38))) == 38


def test_the_image_belongs_to_its_caption(shards):
    for pair in itertools.islice(reader(shards(2)), 8):
        assert pair.image_hwc.shape == (20, 20, 3)
        assert abs(int(pair.image_hwc[0, 0, 0]) - int(pair.caption.split()[1])) <= 2


def test_the_seed_decides_the_order(shards):
    pattern = shards(3)
    assert captions(reader(pattern, seed=1), 12) == captions(reader(pattern, seed=1), 12)
    assert captions(reader(pattern, seed=1), 12) != captions(reader(pattern, seed=2), 12)


def test_globs_and_lists_of_names_find_the_same(shards, tmp_path):
    pattern = shards(3)
    whole = captions(reader(pattern), 12)
    assert captions(reader(tmp_path / "*.tar"), 12) == whole
    assert captions(reader(tmp_path / "a-{00000,00001,00002}.tar"), 12) == whole


def test_readers_share_without_duplicates(shards):
    pattern = shards(5, pairs=2)
    parts = [captions(reader(pattern, number=i, readers=2), count) for i, count in ((0, 6), (1, 4))]
    assert sorted(parts[0] + parts[1]) == sorted(f"picture {i}" for i in range(10))


@pytest.mark.parametrize("taken", [0, 1, 5, 12, 13, 30])
def test_a_position_is_gone_on_from(shards, taken):
    pattern = shards(9, pairs=2)
    pairs = reader(pattern)
    captions(pairs, taken)
    position = json.loads(json.dumps(pairs.position))  # plain values only
    rest = captions(pairs, 30)
    other = reader(pattern)
    other.position = position
    assert captions(other, 30) == rest
    assert other.position == pairs.position


def test_a_position_of_other_files_is_refused(shards, tmp_path):
    shards(2)
    pairs = reader(tmp_path / "*.tar")
    captions(pairs, 3)
    write_shard(tmp_path / "b.tar", {"x": good(100)})
    with pytest.raises(InputError, match=r"\*.tar are not those that the run was reading.*--resume never"):
        reader(tmp_path / "*.tar").position = pairs.position
    (tmp_path / "b.tar").unlink()
    write_shard(tmp_path / "a-00001.tar", {f"{i}": good(i) for i in range(90)})
    with pytest.raises(InputError, match="names or sizes differ"):
        reader(tmp_path / "*.tar").position = pairs.position


def test_a_position_of_another_folder_or_csv_file_is_refused(tmp_path):
    (tmp_path / "new").mkdir()
    for i in range(2):
        (tmp_path / f"new/{i}.png").write_bytes(jpeg(i))
        (tmp_path / f"new/{i}.txt").write_text(f"picture {i}")
    (tmp_path / "a.csv").write_text("image,caption\nnew/0.png,zero\n")
    for source, changed in (("new", "new/2.png"), ("a.csv", "a.csv")):
        pairs = reader(tmp_path / source)
        reader(tmp_path / source).position = pairs.position
        (tmp_path / changed).write_text("image,caption\nnew/0.png,zero\nnew/1.png,one\n")
        with pytest.raises(InputError, match=f"{source} are not those"):
            reader(tmp_path / source).position = pairs.position


def test_sources_that_are_moved_are_gone_on_with(shards, tmp_path):
    shards(2)
    pairs = reader(tmp_path / "*.tar")
    captions(pairs, 3)
    position = pairs.position
    rest = captions(pairs, 13)
    (tmp_path / "moved").mkdir()
    for path in tmp_path.glob("*.tar"):
        path.rename(tmp_path / "moved" / path.name)
    other = reader(tmp_path / "moved/*.tar")
    other.position = position
    assert captions(other, 13) == rest


def test_an_older_position_is_taken_with_a_warning(shards, caplog):
    pairs = reader(shards(1))
    position = {key: value for key, value in pairs.position.items() if key != "files"}
    pairs.position = position
    assert "does not say of which files" in caplog.text


def test_weights_say_how_often_a_source_is_drawn(shards, tmp_path):
    one, other = shards(1, name="one"), shards(1, name="two")
    sources = PairsConfig(sources=[one, other], weights=[3.0, 1.0])
    pairs = PairReader(sources)
    captions(pairs, 200)
    drawn = [epoch * 4 + taken for epoch, _, taken in pairs.position["sources"]]
    assert sum(drawn) == 200
    assert drawn[0] / 200 == pytest.approx(0.75, abs=0.08)


def test_a_folder_and_a_csv_file_work_too(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.png").write_bytes(jpeg(i))
        (folder / f"{i}.txt").write_text(f"picture {i}")
    rows = "".join(f'folder/{i}.png,"picture {i}, really",x\n' for i in range(4))
    (tmp_path / "pairs.csv").write_text("Filepath,Caption,other\n" + rows)
    assert sorted(captions(reader(folder), 4)) == [f"picture {i}" for i in range(4)]
    assert sorted(captions(reader(tmp_path / "pairs.csv"), 4)) == [f"picture {i}, really" for i in range(4)]
    parts = [captions(reader(folder, number=i, readers=2), 2) for i in range(2)]
    assert sorted(parts[0] + parts[1]) == [f"picture {i}" for i in range(4)]


def test_names_in_a_folder_may_hold_dots(tmp_path):
    for i, name in enumerate(("IMG.2020", "IMG.2021", "plain")):
        (tmp_path / f"{name}.TIFF").write_bytes(jpeg(i))
        (tmp_path / f"{name}.txt").write_text(f"picture {i}")
        (tmp_path / f"._{name}.TIFF").write_bytes(b"what a Mac leaves")
    pairs = reader(tmp_path)
    assert sorted(captions(pairs, 3)) == [f"picture {i}" for i in range(3)]
    assert not pairs.broken


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_columns_of_a_csv_file_are_found_by_preference(tmp_path, encoding):
    """As in a parquet file: not the first that could be meant. Excel's byte order mark is none of the first name."""
    (tmp_path / "x.png").write_bytes(jpeg(1))
    table = "path,title,url,image,caption\nnone.png,STOCK-123,u,x.png,a dog\n"
    (tmp_path / "a.csv").write_text(table, encoding=encoding)
    assert captions(reader(tmp_path / "a.csv"), 1) == ["a dog"]
    (tmp_path / "b.csv").write_text("image,caption\nx.png,a dog\n", encoding=encoding)
    assert captions(reader(tmp_path / "b.csv"), 1) == ["a dog"]


def test_what_is_broken_is_counted_and_passed_over(tmp_path):
    samples = {
        "text-only": {"txt": b"no picture"},
        "image-only": {"jpg": jpeg(1)},
        "tiny": {"jpg": jpeg(1, side=1), "txt": b"one pixel"},
        "empty": {"jpg": jpeg(1), "txt": b" \n"},
        "signs": {"jpg": jpeg(1), "txt": b"?!..."},
        "latin": {"jpg": jpeg(1), "txt": "Übung".encode("latin-1")},
        "cut": {"jpg": jpeg(1)[:100], "txt": b"half a picture"},
        "other": {"jpg": b"no image at all", "txt": b"something"},
        "good": good(7),
    }
    pairs = reader(write_shard(tmp_path / "a.tar", samples))
    assert captions(pairs, 2) == ["picture 7"] * 2
    epoch, _, taken = pairs.position["sources"][0]
    assert (epoch, pairs.position["number"]) == (1, 9 + taken)
    assert pairs.broken.keys() == {"no image", "no text", "small image", "empty text", "image"}
    captions(pairs, 1)
    first_two = 18 - 2  # all but the good pair of two epochs
    assert first_two <= pairs.broken.total() < first_two + 8


def test_a_shard_cut_in_half_gives_what_stands_before_the_cut(shards, tmp_path):
    pattern = shards(2, pairs=6)
    path = tmp_path / "a-00001.tar"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    pairs = reader(pattern)
    found = set(captions(pairs, 12))
    assert {f"picture {i}" for i in range(6)} < found  # the whole shard, and some of the other
    assert found <= {f"picture {i}" for i in range(12)}
    counted = pairs.broken["shard"]
    assert counted in (1, 2)
    captions(pairs, 24)
    assert pairs.broken["shard"] > counted  # once an epoch


def test_damaged_shards_are_named_once_and_too_many_stop_the_reading(shards, tmp_path, caplog):
    pattern = shards(10)
    for i in (3, 7):
        (tmp_path / f"a-{i:05d}.tar").write_bytes(b"\0\1garbage" * 100)
    pairs = reader(pattern, max_broken=0.2)
    assert len(set(captions(pairs, 100))) == 32
    named = [record.message for record in caplog.records if "is damaged: only 0 pairs" in record.message]
    assert sorted(Path(line.split()[0]).name for line in named) == ["a-00003.tar", "a-00007.tar"]
    with pytest.raises(InputError, match=r"2 of the 10 shards of .* are damaged, more than pairs.max_broken = 0.05"):
        captions(reader(pattern), 100)


def chained_long_names(archive: tarfile.TarFile) -> None:
    for _ in range(1200):
        member = tarfile.TarInfo("././@LongLink")
        member.type, member.size = tarfile.GNUTYPE_LONGNAME, 2
        archive.fileobj.write(member.tobuf(tarfile.GNU_FORMAT) + b"a\0".ljust(512, b"\0"))


def bad_sparse_map(archive: tarfile.TarFile) -> None:
    member = tarfile.TarInfo("0.png")
    member.size = 512
    member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "10"}
    archive.addfile(member, io.BytesIO(b"x" * 512))


def negative_size(archive: tarfile.TarFile) -> None:
    member = tarfile.TarInfo("0.png")
    member.pax_headers = {"size": "-1536"}  # the next header would be this one again, for ever
    archive.addfile(member)


@pytest.mark.parametrize("damage", [chained_long_names, bad_sparse_map, negative_size])
def test_damaged_headers_end_a_shard_and_not_the_training(shards, tmp_path, damage):
    shards(1)
    with tarfile.open(tmp_path / "bad.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        damage(archive)
    pairs = reader(tmp_path / "*.tar")
    assert len(set(captions(pairs, 8))) == 4
    assert [Path(name).name for name in pairs._sources[0].damaged] == ["bad.tar"]


def test_a_sparse_member_is_passed_over(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        member = tarfile.TarInfo("0.png")
        member.type = tarfile.GNUTYPE_SPARSE
        buffer = bytearray(member.tobuf(tarfile.GNU_FORMAT))
        buffer[386:410], buffer[483:495] = b"00000000000\0" + b"00000000012\0", b"00000000012\0"
        buffer[148:156] = b"        "
        buffer[148:156] = b"%06o\0 " % sum(buffer)
        archive.fileobj.write(buffer)
        archive.offset += len(buffer)
    with tarfile.open(tmp_path / "a.tar") as archive:
        assert [member.issparse() for member in archive] == [True]
    content = (tmp_path / "a.tar").read_bytes()[:512] + write_shard(tmp_path / "b.tar", {"x": good(7)}).read_bytes()
    (tmp_path / "a.tar").write_bytes(content)
    pairs = reader(tmp_path / "a.tar")
    assert captions(pairs, 2) == ["picture 7"] * 2
    assert not pairs.broken


def test_cut_anywhere_a_shard_gives_only_whole_images(shards, tmp_path):
    shards(1, pairs=3)
    content = (tmp_path / "a-00000.tar").read_bytes()
    write_shard(tmp_path / "b.tar", {"x": good(100)})
    for size in range(0, len(content), 357):
        (tmp_path / "a-00000.tar").write_bytes(content[:size])
        pairs = reader(tmp_path / "{a-00000,b}.tar")
        for pair in itertools.islice(pairs, 4):
            assert abs(int(pair.image_hwc[0, 0, 0]) - int(pair.caption.split()[1])) <= 2


def test_too_many_broken_pairs_stop_the_reading(tmp_path):
    samples = {f"{i:03d}": good(i) if i % 4 else {"txt": b"no picture"} for i in range(100)}
    path = write_shard(tmp_path / "a.tar", samples)
    with pytest.raises(InputError, match=r"21 of \d+ pairs are broken \(21 of 'no image'\).*max_broken = 0.05"):
        captions(reader(path), 100)
    assert len(captions(reader(path, max_broken=0.3), 75)) == 75


def test_a_source_without_a_pair_is_refused(tmp_path):
    path = write_shard(tmp_path / "a.tar", {"a": {"json": b"{}"}})
    with pytest.raises(InputError, match="holds no image and no text"):
        captions(reader(path), 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none-*.tar", "no file fits"),
        ("a-{00000..00005}.tar", "4 of 6 files of .* do not exist"),
        ("notes.pdf", "is no .tar file"),
        ("none.csv", "does not exist"),
        ("wrong.csv", "has no column image or jpg .* or filepath or path; its columns are a, b"),
        ("empty", "has no pairs"),
    ],
)
def test_sources_that_cannot_be_read_are_refused(shards, tmp_path, name, message):
    shards(2)
    (tmp_path / "notes.pdf").write_text("x")
    (tmp_path / "wrong.csv").write_text("a,b\n1,2\n")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=message):
        reader(tmp_path / name)


def test_fewer_shards_than_readers_are_refused(shards):
    pattern = shards(2)
    with pytest.raises(InputError, match=r"fewer shards than the 3 readers"):
        reader(pattern, number=2, readers=3)


def test_a_position_of_other_sources_is_refused(shards):
    one, other = reader(shards(1)), reader(shards(1), shards(1, name="b"))
    with pytest.raises(InputError, match="the position is one of 1 sources"):
        other.position = one.position


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"sources": []}, "sources"),
        ({"sources": ["a"], "weights": [1.0, 2.0]}, "weights"),
        ({"sources": ["a"], "weights": [0.0]}, "weights"),
        ({"sources": ["a"], "max_broken": 1.0}, "max_broken"),
        ({"sources": ["a"], "min_side": 0}, "min_side"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values, key):
    with pytest.raises(ConfigError, match=key):
        PairsConfig(**values)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  A  Red\tCircle\n", "a red circle"),
        ("cats &amp; dogs", "cats & dogs"),
        ("zero\x00byte", "zero byte"),
        ("schÃ¶n", "schön"),
        ("赤い丸", "赤い丸"),
        ("...", ""),
        ("", ""),
    ],
)
def test_captions_are_cleaned(text, cleaned):
    assert clean_caption(text) == cleaned


def test_images_come_as_bytes(shards):
    pair = next(iter(reader(shards(1))))
    assert pair.image_hwc.dtype == np.uint8
    assert pair.number == 0
