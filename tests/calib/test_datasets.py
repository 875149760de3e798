"""Files in the benchmarks' own layouts and a user's own: found, read, and what is wrong with them named."""

import pickle
import shutil
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
from PIL import Image

from tclkit.calib.benchmarks import benchmark_named
from tclkit.calib.datasets import missing_files, missing_parts, open_benchmark, open_own_data
from tclkit.runtime.errors import InputError
from tclkit.runtime.images import load_image


@pytest.fixture
def voc(mini: ModuleType, tmp_path: Path) -> Path:
    mini.write_voc(tmp_path)
    return tmp_path / "VOCdevkit/VOC2012"


def test_the_split_file_decides(voc: Path, mini: ModuleType) -> None:
    dataset = open_benchmark("voc", voc)
    assert [dataset.name(index) for index in range(len(dataset))] == list(mini.NAMES)
    example = dataset.load(0)
    assert example.image_hwc.shape == (64, 96, 3)
    assert example.truth.shape == (64, 96)
    assert set(np.unique(example.truth)) == {0, 1, 2, 7, 15, 255}  # numbers, not colours of the palette
    assert example.prompts == {"all": None}


@pytest.mark.parametrize("above", ["", "..", "../.."])
def test_its_own_root_or_the_folder_of_all_data_sets(voc: Path, above: str) -> None:
    assert len(open_benchmark("voc20", (voc / above).resolve())) == 3


def test_a_missing_split_file_says_where_it_is_expected(voc: Path) -> None:
    (voc / "ImageSets/Segmentation/val.txt").unlink()
    with pytest.raises(InputError, match=r"no split file: expected .*VOC2012/ImageSets/Segmentation/val.txt"):
        open_benchmark("voc", voc)


def test_what_is_missing_is_said_in_turn(tmp_path: Path, mini: ModuleType) -> None:
    voc = benchmark_named("voc")
    assert missing_parts(voc, tmp_path / "none") == [f"{tmp_path / 'none'} is no folder"]
    expected = tmp_path / "VOCdevkit/VOC2012/JPEGImages"
    assert missing_parts(voc, tmp_path) == [f"no images: expected the folder {expected} (or {tmp_path / 'JPEGImages'})"]
    expected.mkdir(parents=True)
    assert [part.split(":")[0] for part in missing_parts(voc, tmp_path)] == ["no split file", "no label maps"]
    (tmp_path / "VOCdevkit/VOC2012/SegmentationClass").mkdir()
    split = tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt"
    split.parent.mkdir(parents=True)
    split.write_text("\n")
    assert missing_parts(voc, tmp_path) == [f"no images named in {split}"]
    split.write_text("2007_000001\n")
    assert "the first expected is" in missing_parts(voc, tmp_path)[0]
    mini.write_voc(tmp_path)
    assert missing_parts(voc, tmp_path) == []


def test_files_that_a_split_names_but_that_are_not_there(voc: Path) -> None:
    (voc / "JPEGImages/2007_000042.jpg").unlink()
    dataset = open_benchmark("voc", voc)
    assert missing_files(dataset) == [voc / "JPEGImages/2007_000042.jpg"]
    with pytest.raises(InputError, match=r"2007_000042.jpg does not exist"):
        dataset.load(1)


def test_broken_files_are_named(voc: Path) -> None:
    dataset = open_benchmark("voc", voc)
    image, label = voc / "JPEGImages/2007_000042.jpg", voc / "SegmentationClass/2007_000042.png"
    good = image.read_bytes()
    image.write_bytes(good[:-40])
    with pytest.raises(InputError, match=r"2007_000042.jpg is truncated"):
        dataset.load(1)
    image.write_bytes(good)
    Image.new("RGB", (64, 64)).save(label)
    with pytest.raises(
        InputError, match=r"2007_000042.png holds RGB pixels, but a label file holds one number a pixel"
    ):
        dataset.load(1)
    Image.new("L", (60, 64)).save(label)
    with pytest.raises(InputError, match=r"2007_000042.png is 60 x 64 pixels, but .*2007_000042.jpg is 64 x 64"):
        dataset.load(1)
    label.write_bytes(b"no png")
    with pytest.raises(InputError, match=r"2007_000042.png is no image file"):
        dataset.load(1)
    label.write_bytes((voc / "SegmentationClass/2007_000033.png").read_bytes()[:100])
    with pytest.raises(InputError, match=r"2007_000042.png cannot be read"):
        dataset.load(1)
    label.unlink()
    with pytest.raises(InputError, match=r"2007_000042.png does not exist"):
        dataset.load(1)


def test_label_files_of_one_and_of_sixteen_bits(voc: Path) -> None:
    dataset = open_benchmark("voc", voc)
    label = voc / "SegmentationClass/2007_000042.png"
    Image.fromarray(np.full((64, 64), 300, np.uint16)).save(label)
    assert dataset.load(1).truth.max() == 300
    Image.new("1", (64, 64), 1).save(label)
    truth = dataset.load(1).truth
    assert truth.dtype == np.uint8
    assert truth.max() == 1


def test_fingerprints_tell_data_sets_apart(voc: Path) -> None:
    first = open_benchmark("voc", voc)
    assert first.fingerprint() == open_benchmark("voc", voc).fingerprint()
    assert pickle.loads(pickle.dumps(first)).fingerprint() == first.fingerprint()
    assert first.fingerprint() != open_benchmark("voc20", voc).fingerprint()
    label = voc / "SegmentationClass/2007_000042.png"
    before, content = first.fingerprint(), label.read_bytes()
    label.write_bytes(content[:-1] + b"x")  # of the same size
    assert first.fingerprint() != before
    label.unlink()
    assert first.fingerprint() != before
    label.write_bytes(content)
    assert first.fingerprint() == before
    (voc / "ImageSets/Segmentation/val.txt").write_text("2007_000042\n")
    assert first.fingerprint() != open_benchmark("voc", voc).fingerprint()


def test_a_users_own_folder(mini: ModuleType, tmp_path: Path) -> None:
    mini.write_own(tmp_path)
    dataset = open_own_data(tmp_path)
    assert len(dataset) == 3
    assert dataset.benchmark.classes == ("background", "car", "sky")
    assert dataset.benchmark.names == ("car", "sky")
    assert dataset.benchmark.background
    assert set(np.unique(dataset.load(0).truth)) == {0, 1, 2}
    (tmp_path / "other.txt").write_text("void\r\na red car\r\n\r\n", encoding="utf-8-sig")
    other = open_own_data(tmp_path, names=tmp_path / "other.txt").benchmark
    assert (other.classes, other.background) == (("void", "a red car"), False)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ("", "names no class"),
        ("background\n", "names no class"),
        ("Background\n", "names no class"),
        ("\n".join(map(str, range(256))), "names 256 classes, but 255 is the most"),
        ("a\n\nb\n", "line 2 is empty, but it names label 1"),
        ("cat\nCat\n", "line 2: 'Cat' is there twice"),
    ],
)
def test_a_names_file_that_cannot_be_used(mini: ModuleType, tmp_path: Path, names: str, text: str) -> None:
    mini.write_own(tmp_path)
    (tmp_path / "names.txt").write_text(names)
    with pytest.raises(InputError, match=text):
        open_own_data(tmp_path)


def test_as_many_classes_as_labels(mini: ModuleType, tmp_path: Path) -> None:
    mini.write_own(tmp_path)
    (tmp_path / "names.txt").write_text("\n".join(map(str, range(255))))
    assert len(open_own_data(tmp_path).benchmark.classes) == 255


def test_links_are_followed_but_not_round_in_circles(mini: ModuleType, tmp_path: Path) -> None:
    """A link to its own folder, one to the folder above, two that lead to each other, and two to the same place."""
    mini.write_own(tmp_path)
    names = {"shot-0", "shot-1", "shot-2"}
    images, other = tmp_path / "images", tmp_path / "other"
    other.mkdir()
    shutil.copy(images / "shot-0.png", other / "far.png")
    (images / "self").symlink_to(images)
    (images / "sub").mkdir()
    (images / "sub/up").symlink_to("..")
    dataset = open_own_data(tmp_path)
    assert {dataset.name(index) for index in range(len(dataset))} == names
    (images / "one").symlink_to(other)
    (images / "two").symlink_to(other)
    (other / "back").symlink_to(images / "sub")
    dataset = open_own_data(tmp_path)
    assert {dataset.name(index) for index in range(len(dataset))} >= names | {"one/far", "two/far"}
    assert len(dataset) == 5


def test_a_users_own_folder_that_lacks_something(mini: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"images is no folder; own data are DIR/images, DIR/labels"):
        open_own_data(tmp_path)
    mini.write_own(tmp_path)
    (tmp_path / "names.txt").unlink()
    with pytest.raises(InputError, match="one class name a line"):
        open_own_data(tmp_path)
    for path in (tmp_path / "images").iterdir():
        path.unlink()
    (tmp_path / "names.txt").write_text("a\n")
    with pytest.raises(InputError, match="no images below"):
        open_own_data(tmp_path)


@pytest.mark.parametrize("quality", [75, 98])
@pytest.mark.parametrize("subsampling", [0, 2])
def test_photographs_are_decoded_as_mmsegmentation_does(tmp_path: Path, quality: int, subsampling: int) -> None:
    """It reads them with OpenCV; the bytes are the same."""
    image = cv2.resize(np.random.default_rng(0).integers(0, 256, (12, 20, 3)).astype(np.uint8), (201, 123))
    Image.fromarray(image).save(tmp_path / "photo.jpg", quality=quality, subsampling=subsampling)
    expected = cv2.imread(str(tmp_path / "photo.jpg"))[..., ::-1]
    np.testing.assert_array_equal(load_image(tmp_path / "photo.jpg"), expected)
