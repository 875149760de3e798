import pickle
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from tclkit.runtime import open_bundle
from tclkit.runtime.errors import InputError
from tclkit.tcl.config import EvaluationConfig, load_config
from tclkit.tcl.world import EVALUATION_SEED, OBJECT_NAMES, PALETTE, Palette, WorldConfig, scene
from tclkit.tcl.world_dataset import ALL, PRESENT, WorldDataset, evaluation_world


def test_scenes_are_those_of_the_final_evaluation() -> None:
    config = load_config("tcl-shapes")
    world = evaluation_world(open_bundle("tcl-shapes").manifest)
    assert world == replace(config.world, seed=config.evaluation.seed)
    assert EvaluationConfig().seed == EVALUATION_SEED
    example = WorldDataset(world=world, count=3).load(2)
    expected = scene(world, 2)
    np.testing.assert_array_equal(example.image_hwc, expected.image)
    np.testing.assert_array_equal(example.truth.astype(int), expected.label_map + 1)
    assert example.prompts == {PRESENT: expected.present, ALL: None}


def test_classes_are_the_background_and_the_names() -> None:
    dataset = WorldDataset(world=WorldConfig(seed=1), count=2)
    assert dataset.benchmark.classes == ("background", *OBJECT_NAMES)
    assert (len(dataset), dataset.name(1)) == (2, "scene 1")
    assert dataset.fingerprint() == replace(dataset, count=5).fingerprint()
    assert dataset.fingerprint() != WorldDataset(world=WorldConfig(seed=2)).fingerprint()


def test_a_palette_gives_the_names_and_another_fingerprint() -> None:
    palette = Palette(colours=(("pink", (250, 120, 180)), ("cyan", (0, 220, 230))))
    plain, coloured = (WorldDataset(world=WorldConfig(seed=1), palette=one) for one in (PALETTE, palette))
    assert coloured.benchmark.classes == ("background", *palette.names)
    assert "(16 names" in coloured.benchmark.title
    assert coloured.load(0).truth.max() <= 16
    assert pickle.loads(pickle.dumps(coloured)) == coloured
    journals = "3bf881ef8a371b3b84569e9bc1961e4fbe36acef5828d67ff9d0c8d83b85aacd"  # of version 0.1.0
    assert WorldDataset(world=WorldConfig()).fingerprint() == journals
    assert coloured.fingerprint() != plain.fingerprint()


def test_a_model_of_unknown_origin_gets_scenes_of_its_size(tiny_bundle_folder: object) -> None:
    assert evaluation_world(open_bundle(str(tiny_bundle_folder)).manifest) == WorldConfig(size=64, seed=EVALUATION_SEED)


def test_scenes_that_were_trained_on_are_refused() -> None:
    manifest = open_bundle("tcl-shapes").manifest
    seen = {"configs": {"train": {"world": {"seed": EVALUATION_SEED}}}}
    with pytest.raises(InputError, match="trained on the very scenes"):
        evaluation_world(replace(manifest, provenance=seen))


def test_no_scenes() -> None:
    with pytest.raises(InputError, match="1 scene or more"):
        WorldDataset(world=WorldConfig(), count=0)


def test_it_needs_no_torch() -> None:
    code = "import tclkit.tcl.world_dataset, sys; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
