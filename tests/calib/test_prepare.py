"""Conversions, from files in the publishers' own layouts."""

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from tclkit.calib.benchmarks import benchmark_named, published_benchmarks
from tclkit.calib.datasets import missing_files, missing_parts, open_benchmark
from tclkit.calib.prepare import coco_object_table, coco_stuff_table, prepare_labels
from tclkit.runtime.errors import InputError


@pytest.fixture
def data(mini: ModuleType, tmp_path: Path) -> Path:
    mini.write_all(tmp_path)
    return tmp_path


@pytest.mark.parametrize("key", sorted(published_benchmarks()))
def test_every_benchmark_is_complete_once_prepared(data: Path, key: str) -> None:
    needs_it = key in ("coco_stuff", "coco_object", "context", "context59", "cityscapes")
    missing = missing_parts(benchmark_named(key), data)
    assert bool(missing) == needs_it
    if needs_it:
        assert f"tclkit data prepare {key} --root DIR" in missing[0]
        with pytest.raises(InputError, match="is not complete"):
            open_benchmark(key, data)
    outcome = prepare_labels(key, data)
    assert bool(outcome.written) == needs_it
    assert outcome.problems == []
    dataset = open_benchmark(key, data)
    assert missing_files(dataset) == []
    assert len(dataset) == (2 if key.startswith("context") else 3)  # one of Context's is for training
    again = prepare_labels(key, data)
    assert (again.written, again.kept) == (0, outcome.written)


@pytest.mark.parametrize("key", sorted(published_benchmarks()))
def test_labels_name_what_is_in_the_picture(mini: ModuleType, data: Path, key: str) -> None:
    """Through file, conversion and reduce-zero: the class at each pixel is the one whose colour is there."""
    prepare_labels(key, data)
    dataset = open_benchmark(key, data)
    for index in range(len(dataset)):
        example = dataset.load(index)
        labels = example.truth.astype(int) - int(dataset.benchmark.reduce_zero_label)
        for number, name in enumerate(dataset.benchmark.classes):
            where = labels == number
            if name in mini.CLASS_COLOURS and where.any():
                distance = np.abs(example.image_hwc[where].astype(int) - mini.CLASS_COLOURS[name]).mean()
                assert distance < 12, name  # JPEG smears the borders of blocks
        present = {
            dataset.benchmark.classes[number]
            for number in np.unique(labels[(labels >= 0) & (labels < len(dataset.benchmark.classes))])
        }
        assert len(present & set(mini.CLASS_COLOURS)) >= 3


def test_the_tables_of_coco() -> None:
    """As GroupViT's and mmsegmentation's conversions, which the published figures were made with."""
    stuff, objects = coco_stuff_table(), coco_object_table()
    assert sorted(set(stuff.tolist())) == [*range(171), 255]
    assert [int(stuff[value]) for value in (0, 10, 11, 12, 89, 90, 91, 181, 182, 255)] == [
        0, 10, 255, 11, 79, 255, 80, 170, 255, 255,
    ]  # fmt: skip
    assert sorted(set(objects.tolist())) == list(range(81))
    assert [int(objects[value]) for value in (0, 12, 89, 91, 181, 255)] == [1, 12, 80, 0, 0, 0]


def write_instances(folder: Path, annotations: list[dict[str, object]]) -> None:
    """COCO's instances_val2017.json for one picture of 6 x 8 pixels."""
    (folder / "annotations").mkdir(parents=True)
    (folder / "images/val2017").mkdir(parents=True)
    Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(folder / "images/val2017/000000000139.jpg")
    image = {"id": 139, "file_name": "000000000139.jpg", "height": 6, "width": 8}
    document = {"info": {}, "images": [image], "annotations": annotations, "categories": []}
    (folder / "annotations/instances_val2017.json").write_text(json.dumps(document))


def test_coco_object_from_instances(tmp_path: Path, mini: ModuleType) -> None:
    """Small objects lie over large ones and over crowds, whatever the order in the file."""
    crowd = np.zeros((6, 8), bool)
    crowd[:, 4:] = True
    small = {"image_id": 139, "category_id": 90, "iscrowd": 0, "area": 4.0, "segmentation": [[1, 1, 3, 1, 3, 3, 1, 3]]}
    large = {
        "image_id": 139, "category_id": 1, "iscrowd": 0, "area": 25.0, "segmentation": [[0, 0, 5, 0, 5, 5, 0, 5]],
    }  # fmt: skip
    many = {
        "image_id": 139, "category_id": 3, "iscrowd": 1, "area": 1.0,
        "segmentation": {"size": [6, 8], "counts": mini.run_lengths(crowd)},
    }  # fmt: skip
    write_instances(tmp_path / "coco_stuff164k", [small, large, many])
    outcome = prepare_labels("coco_object", tmp_path)
    assert (outcome.written, outcome.problems) == (1, [])
    assert "instances_val2017.json" in outcome.source
    expected = np.zeros((6, 8), int)
    expected[:, 4:] = 3
    expected[:5, :5] = 1
    expected[1:3, 1:3] = 80
    with Image.open(tmp_path / "coco_stuff164k/annotations/val2017/000000000139_instanceTrainIds.png") as image:
        np.testing.assert_array_equal(np.asarray(image), expected)


def test_pixel_maps_come_first_and_either_can_be_asked_for(data: Path) -> None:
    assert "annotations/val2017" in prepare_labels("coco_object", data).source
    with pytest.raises(InputError, match="neither is there"):
        prepare_labels("coco_object", data, source="instances")
    with pytest.raises(InputError, match="only coco_object"):
        prepare_labels("cityscapes", data, source="instances")
    with pytest.raises(InputError, match="unknown source 'web'"):
        prepare_labels("coco_object", data, source="web")


def test_a_damaged_annotation_is_named_and_the_others_are_made(tmp_path: Path) -> None:
    bad = {"image_id": 139, "category_id": 1, "iscrowd": 0, "area": 1, "segmentation": {"size": [6, 8], "counts": [3]}}
    write_instances(tmp_path, [bad])
    outcome = prepare_labels("coco_object", tmp_path)
    assert outcome.written == 0
    assert outcome.problems == [("000000000139_instanceTrainIds.png", "run lengths cover 3 pixels, the image has 48")]


def test_maps_of_two_sources_are_not_mixed(data: Path) -> None:
    labels = data / "coco_stuff164k/annotations/val2017"
    (labels.parent / "instances_val2017.json").write_text('{"images": [], "annotations": []}')
    assert prepare_labels("coco_object", data, source="pixelmaps").written == 3
    with pytest.raises(
        InputError, match=r"were made from pixelmaps; to make them from instances, first delete .*Ids.png"
    ):
        prepare_labels("coco_object", data, source="instances")
    again = prepare_labels("coco_object", data)
    assert (again.kept, "annotations/val2017/**" in again.source) == (3, True)
    (labels / "instanceTrainIds.source").unlink()  # made by other means
    with pytest.raises(InputError, match="were made from a source that is not noted"):
        prepare_labels("coco_object", data, source="pixelmaps")
    assert prepare_labels("coco_object", data).source.endswith(
        "(those that were there from a source that is not noted)"
    )
    for path in labels.glob("*_instanceTrainIds.png"):
        path.unlink()
    assert "instances_val2017.json" in prepare_labels("coco_object", data, source="instances").source


def test_auto_goes_on_with_the_source_it_began_with(tmp_path: Path) -> None:
    write_instances(tmp_path, [])
    prepare_labels("coco_object", tmp_path, source="instances")
    Image.new("L", (8, 6)).save(tmp_path / "annotations/val2017/000000000139.png")  # a pixel map, fetched later
    found = prepare_labels("coco_object", tmp_path)
    assert (found.kept, "instances_val2017.json" in found.source) == (1, True)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[1, 1, 6]], "a polygon is numbers x, y"),
        ([["a", "b"]], "a polygon is numbers x, y"),
        ([[1, float("inf"), 2, 2]], "not a finite number"),
        ({"size": 6, "counts": [48]}, "run lengths are for 6"),
        ({"size": [6, 8], "counts": ["a"]}, "run lengths are whole numbers"),
        ({"size": [6, 8], "counts": [[48]]}, "run lengths cover"),
    ],
)
def test_an_odd_annotation_is_named(tmp_path: Path, segmentation: object, message: str) -> None:
    annotation = {"image_id": 139, "category_id": 1, "iscrowd": 0, "area": 1, "segmentation": segmentation}
    write_instances(tmp_path, [annotation])
    ((name, reason),) = prepare_labels("coco_object", tmp_path).problems
    assert name == "000000000139_instanceTrainIds.png"
    assert message in reason


@pytest.mark.parametrize(
    "change", [{"height": None}, {"width": "wide"}, {"width": 0}, {"height": 1e9}, {"height": 1e999}]
)
def test_an_image_of_no_size_is_named(tmp_path: Path, change: dict[str, object]) -> None:
    write_instances(tmp_path, [])
    image = {"id": 139, "file_name": "a.jpg", "height": 6, "width": 8, **change}
    (tmp_path / "annotations/instances_val2017.json").write_text(json.dumps({"images": [image]}))
    with pytest.raises(InputError, match="is not laid out as expected"):
        prepare_labels("coco_object", tmp_path)


@pytest.mark.parametrize("lacking", ["height", "file_name", "phase"])
def test_an_entry_of_context_that_lacks_something(data: Path, lacking: str) -> None:
    path = data / "VOCdevkit/VOC2010/trainval_merged.json"
    document = json.loads(path.read_text())
    del document["images"][0][lacking]
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=f"is not laid out as expected: KeyError '{lacking}'"):
        prepare_labels("context", data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [{"id": 1', "no complete JSON object"),
        ('{"images": [{"no_id": 1}]}', "not laid out as expected: KeyError 'id'"),
        ('{"images": 3}', "not laid out as expected: TypeError"),
    ],
)
def test_a_damaged_annotation_file(tmp_path: Path, text: str, message: str) -> None:
    write_instances(tmp_path, [])
    (tmp_path / "annotations/instances_val2017.json").write_text(text)
    with pytest.raises(InputError, match=message):
        prepare_labels("coco_object", tmp_path)


def test_an_interrupted_conversion_goes_on(data: Path) -> None:
    labels = data / "cityscapes/gtFine/val"
    prepare_labels("cityscapes", data)
    made = sorted(labels.rglob("*_labelTrainIds.png"))
    before = made[0].stat().st_mtime_ns
    made[1].unlink()
    outcome = prepare_labels("cityscapes", data)
    assert (outcome.written, outcome.kept) == (1, 2)
    assert made[0].stat().st_mtime_ns == before
    assert sorted(labels.rglob("*_labelTrainIds.png")) == made


def test_progress_ends_at_the_total(data: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    prepare_labels("coco_stuff", data, progress=lambda *at: seen.append(at))
    assert seen == [("coco_stuff label maps", done, 3) for done in range(4)]


def test_nothing_to_convert(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing to convert: expected .*gtFine/val/\*\*/\*_gtFine_labelIds.png"):
        prepare_labels("cityscapes", tmp_path)
    with pytest.raises(InputError, match=r"made from .*trainval_merged.json .*not there"):
        prepare_labels("context", tmp_path)
    with pytest.raises(InputError, match="is no folder"):
        prepare_labels("context", tmp_path / "elsewhere")
