"""Shards of the world: their layout, what training reads from them, interruptions, and the labelled scenes."""

import io
import itertools
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import tclkit.tcl.pair_batches as pair_batches
from tclkit.calib.datasets import missing_files, open_own_data
from tclkit.runtime.errors import InputError
from tclkit.runtime.tokenizer import Tokenizer
from tclkit.tcl.distributed import Place
from tclkit.tcl.pair_batches import AugmentationConfig, PairBatches
from tclkit.tcl.pairs import PairReader, PairsConfig
from tclkit.tcl.tokenizer_file import pruned_tokenizer_json
from tclkit.tcl.world import EVALUATION_SEED, PALETTE, Palette, WorldConfig, every_wording, scene
from tclkit.tcl.world_shards import WORLD_FILE, WorldFiles, write_labelled_scenes, write_world_shards

SMALL = WorldConfig(size=32, seed=4)
NEW = Palette(colours=(("pink", (250, 120, 180)), ("light blue", (120, 190, 250))))
PLAIN = AugmentationConfig(size=32, min_crop=1, flip=0, rand_augment=0, colour_jitter=0, erase=0)


def write(folder: Path, **changes: Any) -> WorldFiles:
    settings: dict[str, Any] = {"scenes": 10, "per_shard": 4, "image_format": "png", **changes}
    return write_world_shards(folder, settings.pop("world", SMALL), **settings)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(("palette", "first"), [(PALETTE, 0), (NEW, 7)])
def test_shards_are_as_img2dataset_writes_them(tmp_path: Path, palette: Palette, first: int) -> None:
    made = write(tmp_path / "world", palette=palette, first=first)
    assert made == WorldFiles(folder=tmp_path / "world", scenes=10, written=3, kept=0)
    assert sorted(contents(made.folder)) == ["00000.tar", "00001.tar", "00002.tar", WORLD_FILE]
    number = first
    for shard, count in enumerate((4, 4, 2)):
        with tarfile.open(made.folder / f"{shard:05d}.tar") as archive:
            keys = [f"{shard:05d}{i:04d}" for i in range(count)]
            assert archive.getnames() == [f"{key}.{suffix}" for key in keys for suffix in ("png", "txt", "json")]
            for key in keys:
                files = {suffix: archive.extractfile(f"{key}.{suffix}").read() for suffix in ("png", "txt", "json")}  # type: ignore[union-attr]
                expected = scene(SMALL, number, palette=palette)
                np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(files["png"]))), expected.image)
                assert files["txt"].decode() == expected.caption
                meta = json.loads(files["json"])
                assert meta == {
                    "key": key,
                    "status": "success",
                    "caption": expected.caption,
                    "width": 32,
                    "height": 32,
                    "scene": number,
                    "objects": [palette.names[i] for i in expected.present],
                }
                number += 1


def test_jpeg_is_near_and_the_same_again(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / name, image_format="jpg")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    pairs = PairReader(PairsConfig(sources=[str(tmp_path / "one/*.tar")]))
    by_caption = {scene(SMALL, i).caption: scene(SMALL, i).image for i in range(10)}
    for pair in itertools.islice(pairs, 10):
        difference = np.abs(pair.image_hwc.astype(int) - by_caption[pair.caption.strip()])
        assert difference.mean() < 4
    assert pairs.broken == {}


def test_one_call_goes_on_where_another_was_cut_off(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole").folder
    seen: list[tuple[int, int]] = []

    class StopError(Exception):
        pass

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 8:
            raise StopError

    with pytest.raises(StopError):
        write(tmp_path / "cut", progress=stop)
    before = (tmp_path / "cut/00000.tar").stat().st_mtime_ns
    mended = write(tmp_path / "cut", progress=lambda done, total: seen.append((done, total)))
    assert (mended.written, mended.kept) == (1, 2)
    assert (tmp_path / "cut/00000.tar").stat().st_mtime_ns == before
    assert contents(tmp_path / "cut") == contents(whole)
    assert seen == [(4, 10), (8, 10), (4, 10), (8, 10), (10, 10)]


def test_kill_minus_nine_leaves_whole_shards(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from tclkit.tcl.world import WorldConfig;"
        "from tclkit.tcl.world_shards import write_world_shards;"
        "write_world_shards(Path(sys.argv[1]), WorldConfig(size=64), scenes=3000, per_shard=50)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "world")])
    deadline = time.monotonic() + 60
    while not (tmp_path / "world/00001.tar").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    shards = sorted((tmp_path / "world").glob("*.tar"))
    assert 2 <= len(shards) < 60
    pairs = PairReader(PairsConfig(sources=[str(tmp_path / "world/*.tar")]))
    assert sum(1 for _ in itertools.islice(pairs, 50 * len(shards))) == 50 * len(shards)
    assert pairs.broken == {}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("processes", [1, 2])
def test_readers_see_disjoint_pairs_and_every_one_once_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, processes: int
) -> None:
    folder = write(tmp_path / "world", scenes=48, per_shard=6).folder
    sources = PairsConfig(sources=[str(folder / "{00000..00007}.tar")], seed=2)
    tokenizer = Tokenizer(pruned_tokenizer_json(every_wording()), 24)
    parts = []
    for rank in range(processes):
        monkeypatch.setattr(pair_batches, "current_place", lambda rank=rank: Place(rank, processes))
        batches = PairBatches(sources, PLAIN, tokenizer, 6, workers=workers)
        epochs = []
        for _ in range(2):
            drawn = [batches.next() for _ in range(8 // processes)]
            epochs.append([image.numpy().tobytes() for batch in drawn for image in batch.images_BCHW])
        assert Counter(epochs[0]) == Counter(epochs[1])
        assert epochs[0] != epochs[1]
        assert batches.broken == {}
        parts.append(set(epochs[0]))
    expected = {pair_batches.Augmentation(PLAIN)(scene(SMALL, i).image, 0).numpy().tobytes() for i in range(48)}
    assert sum(len(part) for part in parts) == 48
    assert set.union(*parts) == expected


def test_two_workers_of_one_process_share_the_shards(tmp_path: Path) -> None:
    folder = write(tmp_path / "world", scenes=48, per_shard=6).folder
    tokenizer = Tokenizer(pruned_tokenizer_json(every_wording()), 24)
    batches = PairBatches(PairsConfig(sources=[str(folder / "*.tar")]), PLAIN, tokenizer, 6, workers=2)
    by_turn: list[list[bytes]] = [[], []]
    for turn in range(8):
        by_turn[turn % 2] += [image.numpy().tobytes() for image in batches.next().images_BCHW]
    assert len(set(by_turn[0])) == len(set(by_turn[1])) == 24
    assert not set(by_turn[0]) & set(by_turn[1])


@pytest.mark.parametrize("palette", [PALETTE, NEW])
def test_labelled_scenes_are_what_eval_takes(tmp_path: Path, palette: Palette) -> None:
    seen: list[tuple[int, int]] = []
    made = write_labelled_scenes(
        tmp_path / "labelled", SMALL, scenes=5, palette=palette, progress=lambda *at: seen.append(at)
    )
    assert made == WorldFiles(folder=tmp_path / "labelled", scenes=5, written=5, kept=0)
    assert seen == [(i, 5) for i in range(1, 6)]
    dataset = open_own_data(made.folder)
    assert dataset.benchmark.classes == ("background", *palette.names)
    assert (len(dataset), missing_files(dataset)) == (5, [])
    for i in range(5):
        example, expected = dataset.load(i), scene(replace(SMALL, seed=EVALUATION_SEED), i, palette=palette)
        np.testing.assert_array_equal(example.image_hwc, expected.image)
        np.testing.assert_array_equal(example.truth.astype(int), expected.label_map + 1)
    again = write_labelled_scenes(tmp_path / "labelled", SMALL, scenes=5, palette=palette)
    assert (again.written, again.kept) == (0, 5)


def test_labelled_scenes_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "labelled").mkdir()  # an empty folder is in nobody's way

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_labelled_scenes(tmp_path / "labelled", SMALL, scenes=5, progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["labelled"]
    assert list((tmp_path / "labelled").iterdir()) == []
    assert write_labelled_scenes(tmp_path / "labelled", SMALL, scenes=5).written == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scenes": 0}, r"scenes is 0; it must be in 1\.\."),
        ({"per_shard": 0}, "per_shard is 0"),
        ({"per_shard": 10_001}, "per_shard is 10001"),
        ({"scenes": 100_001, "per_shard": 1}, "make 100,001 shards of 1; raise per_shard"),
        ({"first": -1}, "first is -1"),
        ({"image_format": "gif"}, "image_format is 'gif'; choose jpg or png"),
        ({"world": replace(SMALL, seed=EVALUATION_SEED)}, "nothing may learn from"),
        ({"world": replace(SMALL, max_objects=17), "palette": NEW}, "may hold 17 objects, but 2 colours"),
    ],
)
def test_impossible_shards_are_refused_before_anything_is_written(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        write(tmp_path / "world", **changes)
    assert not (tmp_path / "world").exists()


@pytest.mark.parametrize(
    ("changes", "differ"),
    [
        ({"scenes": 11}, "scenes"),
        ({"per_shard": 5}, "per_shard"),
        ({"first": 1}, "first"),
        ({"image_format": "jpg"}, "image_format"),
        ({"palette": NEW}, "colours"),
        ({"world": replace(SMALL, seed=5), "scenes": 9}, "world and scenes"),
    ],
)
def test_shards_made_otherwise_are_not_mixed_in(tmp_path: Path, changes: dict[str, Any], differ: str) -> None:
    write(tmp_path / "world")
    before = contents(tmp_path / "world")
    with pytest.raises(InputError, match=f"was written with another {differ} .*Choose another folder"):
        write(tmp_path / "world", **changes)
    assert contents(tmp_path / "world") == before


def test_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "00000.tar").write_bytes(b"somebody's")
    with pytest.raises(InputError, match=r"holds other files, and no world\.json"):
        write(tmp_path)
    with pytest.raises(InputError, match=r"holds other files"):
        write_labelled_scenes(tmp_path, SMALL, scenes=2)
    (tmp_path / WORLD_FILE).write_text("[]")
    with pytest.raises(InputError, match="another world and colours"):
        write(tmp_path)
    assert (tmp_path / "00000.tar").read_bytes() == b"somebody's"


@pytest.mark.parametrize(("changes", "message"), [({"scenes": 0}, "scenes is 0"), ({"first": -2}, "first is -2")])
def test_impossible_labelled_scenes_are_refused(tmp_path: Path, changes: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        write_labelled_scenes(tmp_path / "labelled", SMALL, **{"scenes": 2, **changes})


def test_it_needs_no_torch() -> None:
    code = "import tclkit.tcl.world_shards, sys; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
