"""Validation against the evaluation of an exported bundle, in training, over processes, and what goes wrong."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from tclkit.calib import EvaluationSettings, evaluate
from tclkit.calib.datasets import Dataset, FolderDataset
from tclkit.export import export_bundle
from tclkit.runtime.errors import InputError
from tclkit.runtime.tokenizer import Tokenizer
from tclkit.tcl import TCL, TCLConfig, save_checkpoint, torch_contender
from tclkit.tcl.arithmetic import Arithmetic
from tclkit.tcl.batches import WorldBatches
from tclkit.tcl.config import load_config
from tclkit.tcl.grounder_training import GrounderStage
from tclkit.tcl.tokenizer_file import pruned_tokenizer_json, vocabulary_size
from tclkit.tcl.validation import VALIDATION_SEED, ValidationScore, open_validation, validate
from tclkit.tcl.world import EVALUATION_SEED, OBJECT_NAMES, Palette, WorldConfig, every_wording

TEMPLATES = ("a {}.", "a picture of a {}.")
WORDS = [*every_wording(), "a car person road sky tree wall bicycle aeroplane boat cat dog"]
SIZE = 32


@pytest.fixture(scope="module")
def tokenizer_json() -> str:
    return pruned_tokenizer_json(WORDS)


@pytest.fixture
def model(tokenizer_json: str, make_tiny_tcl: Callable[..., TCL]) -> TCL:
    return make_tiny_tcl(vocabulary_size(tokenizer_json), context_length=32)


@pytest.fixture(scope="module")
def exported(tokenizer_json: str, make_tiny_tcl: Callable[..., TCL], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with tcl.pt and its bundle."""
    folder = tmp_path_factory.mktemp("exported")
    extra = {"tokenizer_json": tokenizer_json, "templates": list(TEMPLATES), "image_size": SIZE}
    model = make_tiny_tcl(vocabulary_size(tokenizer_json), context_length=32)
    save_checkpoint(folder / "tcl.pt", model, extra=extra)
    export_bundle(folder / "tcl.pt", folder / "bundle")
    return folder


@pytest.fixture
def own(mini: ModuleType, tmp_path: Path) -> Path:
    mini.write_own(tmp_path / "own")
    return tmp_path / "own"


def measured(model: TCL, tokenizer_json: str, dataset: Dataset, **changes: Any) -> ValidationScore:
    return validate(model, tokenizer_json, dataset, **{"image_size": SIZE, "templates": TEMPLATES, **changes})


@pytest.mark.parametrize("name", ["folder", "shapes", "voc20"])
@pytest.mark.parametrize("pamr", [False, True])
def test_it_is_what_the_exported_bundle_scores(
    model: TCL, tokenizer_json: str, exported: Path, own: Path, mini: ModuleType, tmp_path: Path, name: str, pamr: bool
) -> None:
    if name == "voc20":
        mini.write_voc(tmp_path / "data")
    data = {"folder": own, "voc20": tmp_path / "data"}.get(name)
    dataset = open_validation(name, data, world=WorldConfig(size=48), scenes=3)
    settings = EvaluationSettings(
        model=str(exported / "bundle"),
        backend="onnxruntime",
        pamr=pamr,
        contenders=(torch_contender(exported / "tcl.pt"),),
    )
    expected = evaluate(dataset, settings, folder=tmp_path / "counts")
    found = measured(model, tokenizer_json, dataset, pamr=pamr)
    assert (found.total, found.counted, found.left_out) == (3, 3, ())
    assert (found.key, found.threshold, found.kp_w) == (name, expected.scoring.threshold, expected.scoring.kp_w)
    for view, counts in found.counts.items():
        np.testing.assert_array_equal(counts, expected.results["torch"][view].counts)
        graphs = expected.results["fp32"][view].scores
        assert found.scores[view].miou * 100 == pytest.approx(graphs.miou * 100, abs=0.1)
        assert found.scores[view].pixel_accuracy == pytest.approx(graphs.pixel_accuracy, abs=0.001)
    last = list(found.scores.values())[-1]
    assert found.miou == last.miou * 100
    assert found.unknown_pixels == expected.unknown_pixels
    assert found.seconds > 0


def test_settings_reach_the_model(model: TCL, tokenizer_json: str, own: Path) -> None:
    dataset = open_validation("folder", own)
    plain = measured(model, tokenizer_json, dataset)
    changed = {
        "threshold": measured(model, tokenizer_json, dataset, threshold=0.2),
        "kp_w": measured(model, tokenizer_json, dataset, kp_w=0.9),
        "image_size": measured(model, tokenizer_json, dataset, image_size=(64, 48)),
        "templates": measured(model, tokenizer_json, dataset, templates=("there is {}",)),
        "limit": measured(model, tokenizer_json, dataset, limit=1),
    }
    for name, score in changed.items():
        assert (score.counts["all"] != plain.counts["all"]).any(), name
    assert (changed["threshold"].threshold, changed["kp_w"].kp_w) == (0.2, 0.9)
    assert (changed["limit"].total, changed["limit"].counted) == (1, 1)
    for same in ({"windows_per_run": 3}, {"loaders": 1}):
        again = measured(model, tokenizer_json, dataset, **same)
        assert np.abs(again.counts["all"] - plain.counts["all"]).sum() <= 0.001 * plain.counts["all"].sum(), same


def test_a_model_that_attends_to_neighbours_is_measured_so(model: TCL, tokenizer_json: str, own: Path) -> None:
    dataset = open_validation("folder", own)
    plain = measured(model, tokenizer_json, dataset, kp_w=0.9)
    model.use_kp_attention("neighbours")
    assert (measured(model, tokenizer_json, dataset, kp_w=0.9).counts["all"] != plain.counts["all"]).any()
    assert model.kp_attention == "neighbours"


def test_training_goes_on_as_without(tokenizer_json: str, own: Path) -> None:
    """Bit-equal weights, optimiser and generator after steps of both stages, with precision bf16 too."""
    overrides = [
        *("world.size=32", "curriculum.small_size=16", "clip.image_size=32", "clip.embed_dim=16"),
        *("clip.vision_width=32", "clip.vision_layers=2", "clip.vision_head_width=16", "clip.text_width=16"),
        *("clip.text_heads=1", "clip.text_layers=1", "grounder_training.steps=6", "grounder_training.batch_size=4"),
        *("grounder_training.warmup_steps=2", "grounder.decoder_only_steps=2", "grounder.initial_gate=0.5"),
    ]
    dataset = open_validation("folder", own)

    def trained(precision: str, *, validated: bool) -> dict[str, torch.Tensor]:
        config = load_config("tcl-shapes", [*overrides, f"precision={precision}"])
        torch.manual_seed(3)
        clip = replace(config.clip, vocab_size=vocabulary_size(tokenizer_json))
        model = TCL(TCLConfig(clip=clip, decoder_blocks=1))
        tokenizer = Tokenizer(tokenizer_json, clip.context_length)
        stage = GrounderStage(
            config.grounder_training,
            config.grounder,
            config.losses,
            model,
            WorldBatches(config.world, tokenizer, 4),
            Arithmetic("cpu", config.precision),
        )
        for step in range(4):
            losses = stage.losses(step)
            if validated:  # even between forward and backward
                before = [part.training for part in model.modules()]
                measured(model, tokenizer_json, dataset)
                assert [part.training for part in model.modules()] == before
                assert model.training
            stage.optimizer.zero_grad(set_to_none=True)
            torch.stack(list(losses.values())).sum().backward()
            stage.optimizer.step()
        return {**model.state_dict(), "random": torch.get_rng_state()}

    for precision in ("fp32", "bf16"):
        plain, validated = (trained(precision, validated=choice) for choice in (False, True))
        assert plain.keys() == validated.keys()
        for name, value in plain.items():
            assert torch.equal(value, validated[name]), (precision, name)


def test_autocast_around_it_changes_nothing(model: TCL, tokenizer_json: str, own: Path) -> None:
    dataset = open_validation("folder", own)
    plain = measured(model, tokenizer_json, dataset)
    with torch.autocast("cpu", torch.bfloat16):
        inside = measured(model, tokenizer_json, dataset)
    np.testing.assert_array_equal(inside.counts["all"], plain.counts["all"])


def test_images_that_cannot_be_used_are_named(model: TCL, tokenizer_json: str, own: Path) -> None:
    dataset = open_validation("folder", own)
    assert isinstance(dataset, FolderDataset)
    whole = measured(model, tokenizer_json, dataset)
    broken = dataset.samples[1]
    broken.image.write_bytes(b"no image")
    seen: list[tuple[int, int]] = []
    score = measured(model, tokenizer_json, dataset, progress=lambda done, total: seen.append((done, total)))
    ((name, reason),) = score.left_out
    assert (name, score.counted, score.total) == (broken.name, 2, 3)
    assert str(broken.image) in reason
    assert score.counts["all"].sum() < whole.counts["all"].sum()
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert json.loads(json.dumps(score.to_dict()))["left_out"] == [{"name": name, "reason": reason}]
    for sample in dataset.samples:
        sample.image.write_bytes(b"no image")
    nothing = measured(model, tokenizer_json, dataset)
    assert (nothing.counted, len(nothing.left_out)) == (0, 3)
    assert np.isnan(nothing.miou)
    document = json.loads(json.dumps(nothing.to_dict(), allow_nan=False))
    assert document["miou"] == {"all": None}
    assert document["images"] == {"total": 3, "counted": 0}


_RANK = """
import json, sys
from pathlib import Path
import torch, torch.distributed as dist
from tclkit.tcl import load_model
from tclkit.tcl.validation import open_validation, validate

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
torch.set_num_threads(1)
score = validate(
    load_model(folder / "tcl.pt"),
    (folder / "tokenizer.json").read_text(),
    open_validation("folder", folder / "own"),
    image_size=32,
    templates=("a {}.", "a picture of a {}."),
)
print(json.dumps({**score.to_dict(), "counts": score.counts["all"].tolist()}))
dist.destroy_process_group()
"""


def test_two_processes_count_what_one_counts(model: TCL, tokenizer_json: str, own: Path) -> None:
    """Each every other image; one is broken. Both come to the same sums."""
    folder = own.parent
    dataset = open_validation("folder", own)
    assert isinstance(dataset, FolderDataset)
    dataset.samples[2].label.unlink()
    save_checkpoint(folder / "tcl.pt", model)
    (folder / "tokenizer.json").write_text(tokenizer_json)
    processes = [
        subprocess.Popen([sys.executable, "-c", _RANK, folder, str(rank)], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    found = [json.loads(process.communicate(timeout=240)[0].splitlines()[-1]) for process in processes]
    assert found[0] == found[1]
    alone = measured(model, tokenizer_json, dataset)
    assert found[0]["counts"] == alone.counts["all"].tolist()
    assert found[0]["images"] == {"total": 3, "counted": 2}
    assert found[0]["left_out"] == alone.to_dict()["left_out"]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where this test's temporary folders go; empty again at its end."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 40}, "image_size 40x40 is no multiple of the model's patch, 16"),
        ({"image_size": (32, 0)}, "image_size 32x0"),
        ({"limit": 0}, "limit should be 1 or more"),
        ({"threshold": 1.5}, r"threshold should be in \[0, 1\], found 1.5"),
        ({"kp_w": -1}, r"kp_w should be in \[0, 1\], found -1"),
        ({"kp_w": float("nan")}, "found nan"),
        ({"windows_per_run": 0}, "windows_per_run should be 1 or more"),
    ],
)
def test_wrong_settings_leave_the_model_as_it_was(
    model: TCL, tokenizer_json: str, own: Path, temporary: Path, changes: dict[str, Any], message: str
) -> None:
    model.train()
    with pytest.raises(InputError, match=message):
        measured(model, tokenizer_json, open_validation("folder", own), **changes)
    assert model.grounder.training


def test_a_tokenizer_of_another_model_is_refused(model: TCL, own: Path) -> None:
    with pytest.raises(InputError, match=r"the tokenizer knows \d+ tokens, but the model's text encoder has \d+"):
        measured(model, pruned_tokenizer_json(["another"]), open_validation("folder", own))


def test_a_threshold_needs_a_background(model: TCL, tokenizer_json: str, mini: ModuleType, tmp_path: Path) -> None:
    mini.write_voc(tmp_path / "data")
    with pytest.raises(InputError, match="has no background"):
        measured(model, tokenizer_json, open_validation("voc20", tmp_path / "data"), threshold=0.3)


def test_shapes_are_scenes_of_a_seed_of_their_own() -> None:
    palette = Palette(colours=(("pink", (250, 120, 180)),))
    dataset = open_validation("shapes", world=WorldConfig(size=48, seed=5), scenes=7, palette=palette)
    assert (len(dataset), dataset.benchmark.names) == (7, palette.names)
    assert dataset.load(0).image_hwc.shape == (48, 48, 3)
    assert VALIDATION_SEED != EVALUATION_SEED
    assert open_validation("shapes").benchmark.names == OBJECT_NAMES


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("imagenet", "here", "no data set 'imagenet' to validate on; choose one of shapes, folder, "),
        ("folder", None, "validation on folder needs the folder of its images"),
        ("voc", None, "validation on voc needs"),
        ("folder", "none", "is no folder"),
        ("voc", "none", "is not complete"),
        ("shapes", "here", "shapes draws its own images"),
    ],
)
def test_data_sets_that_are_not_there_are_refused(tmp_path: Path, name: str, data: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_validation(name, None if data is None else tmp_path / data)


def test_scenes_that_are_trained_on_are_refused() -> None:
    with pytest.raises(InputError, match="choose another for training"):
        open_validation("shapes", world=WorldConfig(seed=VALIDATION_SEED))
