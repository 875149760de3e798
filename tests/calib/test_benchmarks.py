"""The eight benchmarks equal the authors' protocol, down to the tokens of every prompt."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tclkit.calib.benchmarks import IGNORED, benchmark_named, published_benchmarks
from tclkit.runtime import PROTOCOL_TEMPLATES, Tokenizer, open_bundle
from tclkit.runtime.errors import InputError
from tclkit.runtime.preprocess import LONG_SIDE_LIMIT
from tclkit.tcl.tokenizer_file import clip_tokenizer_json

KEYS = ("voc", "voc20", "context", "context59", "coco_stuff", "coco_object", "cityscapes", "ade20k")


@pytest.fixture(scope="module")
def protocol(golden: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((golden / "protocol.json").read_text(encoding="utf-8"))
    return loaded


@pytest.mark.parametrize("key", KEYS)
def test_every_value_is_the_authors(protocol: dict[str, Any], key: str) -> None:
    expected, found = protocol["benchmarks"][key], benchmark_named(key)
    assert list(found.names) == expected["prompt_class_names"]
    assert list(found.classes) == expected["classes"]
    assert len(found.classes) == expected["num_classes"]
    assert f"./data/{found.root}" == expected["data_root"]
    assert (found.images, found.labels, found.split) == (
        expected["img_dir"],
        expected["ann_dir"],
        expected["split_file"],
    )
    suffixes = {"img_suffix": found.image_suffix, "seg_map_suffix": found.label_suffix}
    assert suffixes == expected["suffixes"]
    assert found.background == expected["with_bg"]
    assert found.reduce_zero_label == expected["reduce_zero_label"]
    assert found.threshold == expected["bg_thresh_no_pamr"]
    assert found.threshold_pamr == expected["bg_thresh_pamr"]
    assert found.kp_w == expected["kp_w"]
    assert [found.long_side, found.short_side] == expected["img_scale"]
    assert [found.window] * 2 == expected["crop_size"]
    assert [found.stride] * 2 == expected["stride"]
    assert found.published(pamr=True) == expected["published_miou_with_pamr"]
    assert found.published(pamr=False) == expected["published_miou_without_pamr"]
    assert found.title == expected["name"]


def test_there_are_eight_with_the_common_values(protocol: dict[str, Any]) -> None:
    common = protocol["common"]
    assert tuple(published_benchmarks()) == tuple(sorted(KEYS, key=list(protocol["benchmarks"]).index))
    assert (
        {one.templates for one in published_benchmarks().values()}
        == {tuple(common["templates"])}
        == {PROTOCOL_TEMPLATES}
    )
    assert common["ignore_index"] == IGNORED
    assert {one.long_side for one in published_benchmarks().values()} == {LONG_SIDE_LIMIT}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(clip_tokenizer_json(), 77)


@pytest.mark.parametrize("key", KEYS)
def test_tokens_of_every_prompt_are_the_authors(tokenizer: Tokenizer, golden: Path, key: str) -> None:
    texts = benchmark_named(key).texts()
    ids = tokenizer.encode([text for row in texts for text in row], truncate=False, pad_to=77)
    with np.load(golden / "protocol_tokens.npz") as tokens:
        np.testing.assert_array_equal(ids.reshape(len(texts), 9, 77), tokens[key])


def test_a_name_goes_into_the_templates_as_it_stands() -> None:
    ade = benchmark_named("ade20k")
    assert ade.texts()[ade.names.index("bed ")][0] == "itap of a bed ."
    coco = benchmark_named("coco_stuff")
    assert coco.texts()[coco.names.index("hot dog")][-1] == "a photo of hot dogs."


@pytest.mark.parametrize("key", KEYS)
def test_classes_have_different_names(key: str) -> None:
    assert len({name.strip() for name in benchmark_named(key).classes}) == len(benchmark_named(key).classes)


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(InputError, match=r"no benchmark 'ade'; did you mean 'ade20k'.*cityscapes"):
        benchmark_named("ade")


def test_what_a_bundle_cannot_follow_is_said(tiny_bundle_folder: Path) -> None:
    manifest = open_bundle(tiny_bundle_folder).manifest
    assert benchmark_named("voc").deviations(manifest) == ["windows are not 448x448: tiny has image graphs for 64x64"]
    assert "no KP branch" in benchmark_named("voc").deviations(replace(manifest, kp_w=0.0))[1]
    (entry,) = manifest.images
    assert benchmark_named("voc").deviations(replace(manifest, images=(replace(entry, height=448, width=448),))) == []
