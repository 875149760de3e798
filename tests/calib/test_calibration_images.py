import json
import logging
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tclkit.calib import CalibrationSet, ImageBatches, select_images
from tclkit.runtime import Segmenter, load_image
from tclkit.runtime.errors import InputError

SIZE = (64, 96)
SAMPLES = Path(__file__).resolve().parents[2] / "runtime" / "samples"


def images_of(batches: ImageBatches) -> list[NDArray[np.uint8]]:
    return [image for batch in batches for image in batch]


def all_bytes(chosen: CalibrationSet) -> set[bytes]:
    return {image.tobytes() for image in (*images_of(chosen.calibration), *images_of(chosen.held_back))}


@pytest.mark.parametrize("fit", ["whole", "stretch"])
def test_images_reach_the_graph_as_in_the_segmenter(fit: str, tmp_path: Path, picture: Any, encoded: Any) -> None:
    for index, (height, width) in enumerate([(200, 300), (300, 200), (128, 128), (50, 40), (500, 130)]):
        (tmp_path / f"{index}.png").write_bytes(encoded(picture(index, height, width)))
    with Segmenter.open("tcl-shapes", backend="onnxruntime") as segmenter:
        paths = sorted(tmp_path.glob("*.png"))
        expected = {segmenter._prepare(load_image(path), fit).fitted[0].inputs[0].tobytes() for path in paths}
        info = segmenter.bundle.manifest
    chosen = select_images(
        tmp_path, size=(128, 128), fit=fit, mean_rgb=info.preprocessing.mean, patch_size=info.model.patch_size
    )
    assert all_bytes(chosen) == expected


def test_batches(photos: Callable[..., Path]) -> None:
    chosen = select_images(photos(12), size=SIZE, count=7, held_back=3, batch_size=3)
    batches = list(chosen.calibration)
    assert [batch.shape for batch in batches] == [(3, *SIZE, 3), (3, *SIZE, 3), (1, *SIZE, 3)]
    assert all(batch.dtype == np.uint8 and batch.flags.writeable for batch in batches)
    assert len(chosen.calibration) == 3
    assert (chosen.calibration.images, chosen.held_back.images) == (7, 3)
    np.testing.assert_array_equal(np.concatenate(batches), np.concatenate(list(chosen.calibration)))


def test_two_passes_at_once_do_not_disturb_each_other(photos: Callable[..., Path]) -> None:
    chosen = select_images(photos(8), size=SIZE, count=5, held_back=3, batch_size=2)
    expected = images_of(chosen.calibration)
    pairs = list(zip(chosen.calibration, chosen.held_back, chosen.calibration, strict=False))
    for start, (first, _, second) in enumerate(pairs):
        np.testing.assert_array_equal(first, np.stack(expected[2 * start : 2 * start + len(first)]))
        np.testing.assert_array_equal(first, second)


def test_the_same_seed_chooses_the_same_images(photos: Callable[..., Path]) -> None:
    folder = photos(40)
    first = select_images(folder, size=SIZE, count=8, held_back=4)
    again = select_images(folder, size=SIZE, count=8, held_back=4, batch_size=1)
    other = select_images(folder, size=SIZE, count=8, held_back=4, seed=1)
    assert first.describe() == again.describe()
    np.testing.assert_array_equal(images_of(first.calibration), images_of(again.calibration))
    assert other.content_hash != first.content_hash


def test_the_hash_is_of_the_pixels_whatever_their_names(
    photos: Callable[..., Path], picture: Any, encoded: Any
) -> None:
    one, other = photos(10), photos(10, "copies")
    for path in other.rglob("*.png"):
        path.rename(path.with_name("renamed-" + path.name))
    ways = {"size": SIZE, "count": 10, "held_back": 0}
    first, second = select_images(one, **ways), select_images(other, **ways)
    assert [i.tobytes() for i in images_of(first.calibration)] != [i.tobytes() for i in images_of(second.calibration)]
    assert first.content_hash == second.content_hash
    assert select_images(one, **{**ways, "size": (96, 64)}).content_hash != first.content_hash
    (other / "renamed-0001.png").write_bytes(encoded(picture(99)))
    assert select_images(other, **ways).content_hash != first.content_hash


def test_held_back_images_are_others_and_stay_when_more_are_asked_for(photos: Callable[..., Path]) -> None:
    folder = photos(40)
    few = select_images(folder, size=SIZE, count=6, held_back=4)
    many = select_images(folder, size=SIZE, count=30, held_back=4)
    held = {image.tobytes() for image in images_of(many.held_back)}
    assert {image.tobytes() for image in images_of(few.held_back)} == held
    assert few.describe()["held_back_hash"] == many.describe()["held_back_hash"]
    assert held.isdisjoint(image.tobytes() for image in images_of(many.calibration))
    assert len(all_bytes(many)) == 34


def test_copies_are_left_out(tmp_path: Path, picture: Any, encoded: Any, caplog: pytest.LogCaptureFixture) -> None:
    for index in range(6):
        (tmp_path / f"{index}.png").write_bytes(encoded(picture(index, 96, 96)))
    (tmp_path / "same.bmp").write_bytes(encoded(picture(0, 96, 96), "BMP"))
    (tmp_path / "near.jpg").write_bytes(encoded(picture(1, 96, 96), "JPEG", quality=80))
    with caplog.at_level(logging.WARNING):
        chosen = select_images(tmp_path, size=SIZE, count=20, held_back=2)
    record = chosen.describe()
    assert (record["images"], record["held_back"], record["found"]) == (4, 2, 8)
    assert (record["duplicates"], record["near_duplicates"], record["unreadable"]) == (1, 1, 0)
    assert "gives 6 different images, 22 were asked for (1 duplicates, 1 near duplicates left out)" in caplog.text


def test_different_scenes_are_no_near_duplicates() -> None:
    record = select_images(SAMPLES, size=(128, 128)).describe()
    assert (record["images"], record["held_back"], record["near_duplicates"]) == (4, 2, 0)


def test_unreadable_images_are_counted_and_announced(
    photos: Callable[..., Path], caplog: pytest.LogCaptureFixture, encoded: Any
) -> None:
    folder = photos(8)
    for index in range(5):
        (folder / f"bad{index}.jpg").write_bytes(b"no image")
    (folder / "thin.png").write_bytes(encoded(np.zeros((1000, 4, 3), np.uint8)))
    with caplog.at_level(logging.WARNING):
        chosen = select_images(folder, size=SIZE, count=20, held_back=2)
    assert chosen.describe()["unreadable"] == 6
    assert chosen.describe()["images"] == 6
    assert "6 image(s) cannot be used and are left out: " in caplog.text
    assert caplog.text.count(".jpg is not an image") <= 3


def test_nothing_readable_names_the_first_reasons(tmp_path: Path) -> None:
    for index in range(5):
        (tmp_path / f"{index}.jpg").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"none of 5 items can be used: (.*\.jpg is not an image.*){3}Give a folder"):
        select_images(tmp_path, size=SIZE)


def test_image_bombs_are_refused(photos: Callable[..., Path], encoded: Any) -> None:
    folder = photos(4)
    (folder / "bomb.png").write_bytes(encoded(np.zeros((100, 100, 3), np.uint8)))
    assert select_images(folder, size=SIZE, max_pixels=9_999).describe()["unreadable"] == 1


@pytest.mark.parametrize(
    ("images", "held_back", "expected"),
    [(3, 16, (2, 1)), (4, 16, (3, 1)), (6, 16, (4, 2)), (30, 16, (20, 10)), (2, 0, (2, 0)), (3, 1, (2, 1))],
)
def test_few_images_are_shared_out(
    images: int, held_back: int, expected: tuple[int, int], photos: Callable[..., Path], caplog: Any
) -> None:
    with caplog.at_level(logging.WARNING):
        chosen = select_images(photos(images), size=SIZE, held_back=held_back)
    assert (chosen.calibration.images, chosen.held_back.images) == expected
    assert f"gives {images} different images, {256 + held_back} were asked for" in caplog.text


@pytest.mark.parametrize(("images", "held_back"), [(1, 0), (1, 16), (2, 16)])
def test_too_few_images_are_refused(images: int, held_back: int, photos: Callable[..., Path]) -> None:
    needed = "2 to calibrate with" + (" and 1 to judge on" if held_back else "")
    with pytest.raises(InputError, match=rf"gives {images} different image\(s\); at least {needed} are needed.*Give a"):
        select_images(photos(images), size=SIZE, held_back=held_back)


def test_a_still_video_is_one_picture(video: Callable[..., Path], picture: Any) -> None:
    frames = [np.clip(picture(0).astype(int) + index % 3, 0, 255).astype(np.uint8) for index in range(30)]
    with pytest.raises(InputError, match=r"gives 1 different image\(s\) \(.*near duplicates left out\)"):
        select_images(video(frames), size=SIZE)


def test_a_video(video: Callable[..., Path], picture: Any) -> None:
    frames = [picture(index) for index in range(40)]
    path = video([frame for frame in frames for _ in range(3)])
    first = select_images(path, size=SIZE, count=12, held_back=4)
    again = select_images(path, size=SIZE, count=12, held_back=4)
    assert first.describe() == again.describe()
    assert (first.calibration.images, first.held_back.images) == (12, 4)
    assert select_images(path, size=SIZE, count=12, held_back=4, seed=3).content_hash != first.content_hash
    assert first.describe()["source"] == {"kind": "video", "name": "drive.avi"}


def test_shards(shard: Callable[..., Path], picture: Any, encoded: Any) -> None:
    path = shard({f"{index}.png": encoded(picture(index)) for index in range(9)} | {"x.png": b"bad"})
    chosen = select_images(path, size=SIZE, count=6, held_back=3)
    assert chosen.describe()["source"] == {"kind": "shards", "name": "shard-0000.tar"}
    assert len(all_bytes(chosen)) == 9


def test_a_damaged_shard_is_announced_and_counted(
    shard: Callable[..., Path], picture: Any, encoded: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shard({f"{index}.png": encoded(picture(index)) for index in range(4)})
    (tmp_path / "shard-0001.tar").write_bytes(b"bad" * 1000)
    with caplog.at_level(logging.WARNING):
        chosen = select_images(str(tmp_path / "shard-*.tar"), size=SIZE)
    assert chosen.describe()["unreadable"] == 1
    assert "shard-0001.tar is no tar file, or a damaged one" in caplog.text


def test_exif_is_applied(photos: Callable[..., Path], tmp_path: Path, picture: Any, encoded: Any) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = picture(0, 96, 64)
    folder = photos(3, first=1)
    (folder / "turned.png").write_bytes(encoded(np.rot90(upright).copy(), exif=exif.tobytes()))
    chosen = select_images(folder, size=(96, 64), held_back=0)
    assert upright.tobytes() in all_bytes(chosen)


def test_the_description_is_json_without_folders(photos: Callable[..., Path], tmp_path: Path) -> None:
    folder = photos(10)
    for source in (folder, f"{folder}/*.png", f"{folder}/**/*.png"):
        chosen = select_images(source, size=SIZE, count=3, held_back=2)
        record = json.loads(json.dumps(chosen.describe()))
        assert str(tmp_path) not in json.dumps(record)
        assert record["source"]["name"] == Path(source).name
        assert record["content_hash"] == chosen.content_hash
        assert record["size"] == list(SIZE)
        assert (record["asked"], record["seed"], record["fit"]) == (3, 0, "whole")


def test_progress(photos: Callable[..., Path]) -> None:
    seen: list[tuple[str, int, int]] = []
    select_images(photos(9), size=SIZE, count=4, held_back=2, progress=lambda *state: seen.append(state))
    assert seen == [("calibration images", done, 6) for done in range(1, 7)]


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"size": (0, 64)}, r"size should be the graph's \(height, width\) in pixels, found \(0, 64\)"),
        ({"count": 1}, "calibration takes 2 images or more, found count 1; try 256"),
        ({"held_back": -1}, "held_back should be 0 or more, found -1"),
        ({"seed": -1}, "seed should be 0 or more, found -1"),
        ({"fit": "slide"}, "calibration images are fitted 'whole' or 'stretch', found 'slide'"),
        ({"batch_size": 0}, "batch_size should be 1 or more"),
    ],
)
def test_arguments_out_of_range(changed: dict[str, Any], text: str, photos: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=text):
        select_images(photos(6), **{"size": SIZE, **changed})


def test_nothing_is_left_in_the_cache_folder(photos: Callable[..., Path], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("TCLKIT_HOME", str(tmp_path / "home"))
    chosen = select_images(photos(6), size=SIZE)
    assert len(all_bytes(chosen)) == 6
    assert [path for path in (tmp_path / "home").rglob("*") if path.is_file()] == []


def test_a_cache_folder_that_cannot_be_written(photos: Callable[..., Path], tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "cache").touch()
    monkeypatch.setenv("TCLKIT_HOME", str(tmp_path))
    with pytest.raises(InputError, match=r"cannot hold the calibration images .*name another folder in TCLKIT_HOME"):
        select_images(photos(6), size=SIZE)


def test_a_full_disk(photos: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def seek(self, place: int) -> None: ...

        def write(self, data: bytes) -> None:
            raise OSError(28, "No space left on device")

        def close(self) -> None: ...

    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: Full())
    with pytest.raises(
        InputError, match=r"do not fit into .*No space left on device.*make room for 18,432 bytes an image"
    ):
        select_images(photos(6), size=SIZE)


def test_memory_does_not_grow_with_the_number_of_images(photos: Callable[..., Path]) -> None:
    folder = photos(128, height=64, width=64)
    select_images(folder, size=(64, 64), count=4, held_back=0)  # what is loaded once is loaded
    peaks: dict[int, list[int]] = {16: [], 128: []}
    for count in [16, 128] * 3:  # other threads of the process are traced too: the least of three counts
        tracemalloc.start()
        chosen = select_images(folder, size=(224, 224), count=count, held_back=0)
        assert sum(len(batch) for batch in chosen.calibration) == count
        peaks[count].append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    one_image = 224 * 224 * 3
    assert min(peaks[128]) - min(peaks[16]) < 8 * one_image < 112 * one_image
