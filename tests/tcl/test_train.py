import functools
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

import tclkit.tcl.train as train_module
from tclkit.runtime.errors import CheckpointError, ConfigError, TrainingError, TrainingStoppedError
from tclkit.tcl.checkpoint import load_checkpoint, load_model
from tclkit.tcl.config import TrainConfig, load_config
from tclkit.tcl.distributed import Place
from tclkit.tcl.loop import TrainProgress
from tclkit.tcl.train import _fingerprint, train

TINY = [
    "world.size=32",
    "curriculum.small_size=16",
    "clip.image_size=32",
    "clip.embed_dim=16",
    "clip.vision_width=32",
    "clip.vision_layers=2",
    "clip.vision_head_width=16",
    "clip.text_width=16",
    "clip.text_heads=1",
    "clip.text_layers=1",
    "clip_training.steps=6",
    "clip_training.batch_size=4",
    "clip_training.warmup_steps=2",
    "grounder_training.steps=6",
    "grounder_training.batch_size=4",
    "grounder_training.warmup_steps=2",
    "grounder.decoder_only_steps=3",
    "evaluation.scenes=8",
    "evaluation.threshold_scenes=4",
    "evaluation.batch_size=4",
    "save_every=2",
]


@pytest.fixture
def tiny() -> TrainConfig:
    return load_config("tcl-shapes", TINY)


class _StopError(Exception):
    """Stands in for a run that is cut off."""


def _stop_at(stage: str, step: int):  # type: ignore[no-untyped-def]
    def callback(progress: TrainProgress) -> None:
        if (progress.stage, progress.step) == (stage, step):
            raise _StopError

    return callback


def _weights(path: Path) -> dict[str, torch.Tensor]:
    return dict(load_model(path).state_dict())


def test_a_run_leaves_a_model_scores_and_a_log(tiny: TrainConfig, tmp_path: Path) -> None:
    seen: list[tuple[str, int]] = []
    result = train(tiny, run_folder=tmp_path / "run", progress=lambda p: seen.append((p.stage, p.step)))
    assert [s for s in seen if s[0] == "clip"] == [("clip", i) for i in range(1, 7)]
    assert seen[-1] == ("evaluation", 8)
    assert {(s.method, s.prompts) for s in result.scores} == {
        (method, prompts)
        for method in ("MaskCLIP", "MaskCLIP + PAMR", "TCL", "TCL + PAMR", "TCL + 0.1 KP", "TCL + PAMR + 0.1 KP")
        for prompts in ("present", "all")
    }
    extra = load_checkpoint(result.checkpoint)["extra"]
    assert {"tokenizer_json", "templates", "vocabulary", "image_size"} <= extra.keys()
    assert extra["thresholds"].keys() == {"background", "background_pamr"}
    assert all(0 <= threshold <= 1 for threshold in extra["thresholds"].values())
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["scores"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in rows} == {"clip", "grounder"}


@pytest.mark.parametrize(("stage", "step"), [("clip", 3), ("grounder", 5)])
def test_an_interrupted_run_ends_with_the_same_bits(tiny: TrainConfig, tmp_path: Path, stage: str, step: int) -> None:
    whole = train(tiny, run_folder=tmp_path / "whole").checkpoint
    with pytest.raises(_StopError):
        train(tiny, run_folder=tmp_path / "cut", progress=_stop_at(stage, step))
    assert not (tmp_path / "cut" / "tcl.pt").exists()
    mended = train(tiny, run_folder=tmp_path / "cut").checkpoint
    one, other = _weights(whole), _weights(mended)
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_a_run_cut_between_its_stages_ends_with_the_same_bits(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp16 each stage has a loss scale of its own, whatever the one before has come to."""
    quick = functools.partial(torch.amp.GradScaler, init_scale=16.0, growth_interval=2)
    monkeypatch.setattr(torch.amp, "GradScaler", quick)
    half = replace(tiny, precision="fp16", grounder_training=replace(tiny.grounder_training, steps=10))
    scales = []
    for name in ("whole", "cut"):
        if name == "cut":
            with pytest.raises(_StopError):
                train(half, run_folder=tmp_path / name, progress=_stop_at("grounder", 1))
        with pytest.raises(_StopError):
            train(half, run_folder=tmp_path / name, progress=_stop_at("threshold", 4))
        rows = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        scales.append([(row["stage"], row["step"], row["loss_scale"]) for row in rows])
    assert scales[0] == scales[1]
    assert [row[:2] for row in scales[0]] == [("clip", 6), ("grounder", 10)]


def test_kill_minus_nine_leaves_a_folder_to_go_on_from(tmp_path: Path) -> None:
    """A real process, killed for real once its first checkpoint stands."""
    overrides = [*TINY, "clip_training.steps=400"]
    program = (
        "import sys; from tclkit.tcl.config import load_config; from tclkit.tcl.train import train;"
        f"train(load_config('tcl-shapes', {overrides!r}), run_folder=sys.argv[1])"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "run")])
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "last-clip.pt").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    steps: list[int] = []

    def callback(progress: TrainProgress) -> None:
        steps.append(progress.step)
        raise _StopError

    orphan = tmp_path / "run" / ".last-clip.pt.77-0011aabb.tmp"  # as if it had been killed while it wrote
    theirs = tmp_path / "run" / ".notes.77-0011aabb.tmp"
    orphan.touch()
    theirs.touch()
    with pytest.raises(_StopError):
        train(load_config("tcl-shapes", overrides), run_folder=tmp_path / "run", progress=callback)
    assert steps[0] > 2
    assert not orphan.exists()
    assert theirs.exists()


def test_a_finished_run_is_not_trained_again(tiny: TrainConfig, tmp_path: Path) -> None:
    first = train(tiny, run_folder=tmp_path)
    before = first.checkpoint.stat().st_mtime_ns
    again = train(tiny, run_folder=tmp_path, progress=_stop_at("clip", 1))
    assert again.checkpoint.stat().st_mtime_ns == before
    assert again.scores == first.scores


def test_a_finished_model_of_another_choice_is_made_anew(tiny: TrainConfig, tmp_path: Path) -> None:
    """What fingerprints leave out, as it does not change the weights, changes what is made of them."""
    first = train(tiny, run_folder=tmp_path)
    other = replace(tiny, name="other", grounder=replace(tiny.grounder, kp_w=0.7))
    again = train(other, run_folder=tmp_path, progress=_stop_at("grounder", 1))
    content = load_checkpoint(again.checkpoint)
    assert (content["config"]["kp_w"], content["extra"]["name"]) == (0.7, "other")
    assert {s.method for s in again.scores} - {s.method for s in first.scores} == {
        "TCL + 0.7 KP",
        "TCL + PAMR + 0.7 KP",
    }


def test_a_new_training_replaces_the_finished_model(tiny: TrainConfig, tmp_path: Path) -> None:
    """Begun by removing last-grounder.pt, as the message for a damaged one says."""
    checkpoint = train(tiny, run_folder=tmp_path).checkpoint
    before = _weights(checkpoint)
    (tmp_path / "last-grounder.pt").unlink()
    faster = replace(tiny, grounder_training=replace(tiny.grounder_training, lr=0.01))
    train(faster, run_folder=tmp_path)
    trained = torch.load(tmp_path / "last-grounder.pt")["model"]
    after = _weights(checkpoint)
    assert all(torch.equal(after[name], trained[name]) for name in trained)
    assert any(not torch.equal(after[name], before[name]) for name in trained)


def test_another_configuration_is_refused(tiny: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(_StopError):
        train(tiny, run_folder=tmp_path, progress=_stop_at("clip", 3))
    other = replace(tiny, seed=7)
    with pytest.raises(CheckpointError, match=r"another configuration.*--resume never"):
        train(other, run_folder=tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == tiny.seed  # that of the run that is there
    with pytest.raises(_StopError):
        train(other, run_folder=tmp_path, resume="never", progress=_stop_at("clip", 1))


def test_runs_from_before_the_tiles_can_go_on() -> None:
    """What a checkpoint of version 0.1 has written of the losses, and of nothing else in the recipe since."""
    losses = _fingerprint(load_config("tcl-shapes"), "losses")["losses"]
    assert losses == {"tcl": 0.1, "area": 0.4, "tv": 0.5, "area_prior": 0.17}
    assert _fingerprint(load_config("tcl-shapes", ["losses.tile=8"]), "losses")["losses"]["tile"] == 8


def test_a_damaged_checkpoint_is_named(tiny: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "last-clip.pt").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(CheckpointError, match=r"last-clip\.pt cannot be read"):
        train(tiny, run_folder=tmp_path)


@pytest.mark.parametrize(
    ("key", "name", "resume"),
    [
        ("checkpoint", "tcl.pt", "never"),
        ("checkpoint", "step-2.pt", "auto"),
        ("clip_checkpoint", "clip.pt", "never"),
    ],
)
def test_a_run_does_not_remove_its_own_start(
    tiny: TrainConfig, tmp_path: Path, key: str, name: str, resume: Literal["auto", "never"]
) -> None:
    start = tmp_path / name
    start.write_bytes(b"hours of work")
    (tmp_path / "link").symlink_to(tmp_path)
    config = replace(tiny, **{key: str(start)})
    with pytest.raises(ConfigError, match=rf"{key} .*{name} is one of the files of the run in .*another run folder"):
        train(config, run_folder=tmp_path / "link", resume=resume)
    assert start.exists()


def _flip_a_bit_of_the_largest_record(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        record = max(archive.infolist(), key=lambda one: one.file_size)
        data = archive.read(record)
    content = path.read_bytes()
    place = content.index(data) + len(data) // 2
    path.write_bytes(content[:place] + bytes([content[place] ^ 0x20]) + content[place + 1 :])


@pytest.mark.parametrize(
    ("stage", "name", "message"),
    [
        ("clip", "last-clip.pt", r"last-clip\.pt cannot be read \(checksum of .*delete it to begin this stage anew"),
        ("grounder", "clip.pt", r"clip\.pt is damaged, .*checksum of"),
        ("grounder", "last-grounder.pt", r"last-grounder\.pt cannot be read \(checksum of"),
    ],
)
def test_a_flipped_bit_is_not_gone_on_from(
    tiny: TrainConfig, tmp_path: Path, stage: str, name: str, message: str
) -> None:
    with pytest.raises(_StopError):
        train(tiny, run_folder=tmp_path, progress=_stop_at(stage, 3))
    _flip_a_bit_of_the_largest_record(tmp_path / name)
    with pytest.raises(CheckpointError, match=message):
        train(tiny, run_folder=tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run(tiny: TrainConfig, tmp_path: Path) -> None:
    wild = replace(tiny, clip_training=replace(tiny.clip_training, lr=1e30, min_lr=0.0))
    with pytest.raises(TrainingError, match="not finite"):
        train(wild, run_folder=tmp_path)


def test_a_vocabulary_of_another_size_is_refused(tiny: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the world's vocabulary has 613 tokens"):
        train(replace(tiny, clip=replace(tiny.clip, vocab_size=600)), run_folder=tmp_path)


def test_a_clip_is_not_trained_by_several_processes(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "current_place", lambda: Place(0, 2))
    with pytest.raises(ConfigError, match=r"trained by one process.*clip_checkpoint"):
        train(tiny, run_folder=tmp_path)


@pytest.mark.parametrize("stage", ["threshold", "evaluation"])
def test_a_signal_ends_the_evaluation_too_and_the_run_goes_on(tiny: TrainConfig, tmp_path: Path, stage: str) -> None:
    def interrupt(progress: TrainProgress) -> None:
        if progress.stage == stage:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(TrainingStoppedError, match=rf"stopped by SIGINT after {stage} step 4 of \d; .*goes on"):
        train(tiny, run_folder=tmp_path, progress=interrupt)
    assert (tmp_path / "tcl.pt").exists() == (stage == "evaluation")
    assert train(tiny, run_folder=tmp_path).scores


def test_another_runs_clip_can_be_taken(tiny: TrainConfig, tmp_path: Path) -> None:
    train(tiny, run_folder=tmp_path / "first")
    shared = replace(tiny, clip_checkpoint=str(tmp_path / "first" / "clip.pt"))
    stages: set[str] = set()
    train(shared, run_folder=tmp_path / "second", progress=lambda p: stages.add(p.stage))
    assert stages == {"grounder", "threshold", "evaluation"}
    with pytest.raises(ConfigError, match="does not exist"):
        train(replace(tiny, clip_checkpoint=str(tmp_path / "none.pt")), run_folder=tmp_path / "third")
