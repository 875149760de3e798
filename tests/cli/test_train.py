"""`tclkit train`: the configuration reaches the trainer, progress is told, and an interrupted run goes on."""

import contextlib
import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import Result

from tclkit.runtime.errors import ConfigError, TrainingStoppedError
from tclkit.tcl.config import TrainConfig
from tclkit.tcl.distributed import Place
from tclkit.tcl.dry_run import DryRun

Invoke = Callable[..., Result]

TINY = """
    world.size=32 clip.image_size=32 clip.embed_dim=16 clip.vision_width=32 clip.vision_layers=2
    clip.vision_head_width=16 clip.text_width=16 clip.text_heads=1 clip.text_layers=1
    clip_training.steps=2 clip_training.batch_size=4 clip_training.warmup_steps=1
    grounder_training.steps=2 grounder_training.batch_size=4 grounder_training.warmup_steps=1
    grounder.decoder_only_steps=1 evaluation.scenes=4 evaluation.threshold_scenes=4 evaluation.batch_size=4
    curriculum.small_size=16
"""


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    return ["train", "--config", "tcl-shapes", *(part for override in TINY.split() for part in ("--set", override))]


def test_training_ends_with_scores_and_the_next_command(invoke: Invoke, arguments: list[str]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.stderr
    assert "training tcl-shapes in runs/tcl-shapes; an interrupted run goes on with the same command" in result.stderr
    for line in ("clip 2/2  ", "grounder 2/2  ", "evaluation 4/4\n"):
        assert line in result.stderr
    assert "mIoU" in result.stdout
    assert "MaskCLIP" in result.stdout
    assert "next: tclkit export runs/tcl-shapes/tcl.pt -o tcl-shapes" in result.stderr
    assert Path("runs/tcl-shapes/tcl.pt").is_file()
    again = invoke(*arguments)
    assert again.exit_code == 0
    assert "clip 2/2" not in again.stderr  # nothing was left to do
    assert again.stdout == result.stdout


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--set", "clip.layers=2"], "layers"),
        (["--set", "clip_training.steps=many"], "steps"),
        (["--set", "nonsense"], "nonsense"),
    ],
)
def test_a_wrong_override_is_one_line(invoke: Invoke, arguments: list[str], more: list[str], message: str) -> None:
    result = invoke(*arguments, *more)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not Path("runs").exists()


@pytest.fixture
def place_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[str]]:
    """place_at(rank): be that one of two processes; returns what happens."""

    def set_place(rank: int) -> list[str]:
        happened: list[str] = []

        @contextlib.contextmanager
        def group() -> Iterator[Place]:
            happened.append("joined")
            yield Place(rank, 2)
            happened.append("left")

        monkeypatch.setattr("tclkit.tcl.distributed.process_group", group)
        return happened

    return set_place


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stop_is_no_error_on_any_process(
    invoke: Invoke, place_at: Callable[[int], list[str]], monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise TrainingStoppedError("stopped by SIGTERM after 3 steps", signal_number=15, step=3)

    place_at(rank)
    monkeypatch.setattr("tclkit.tcl.train.train", stopped)
    result = invoke("train", "-o", "run")
    assert result.exit_code == 128 + 15
    assert "error" not in result.stderr
    assert ("stopped by SIGTERM" in result.stderr) == (rank == 0)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_dry_run_is_one_of_all_processes(
    invoke: Invoke, place_at: Callable[[int], list[str]], monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    happened = place_at(rank)

    def tried(config: TrainConfig) -> DryRun:
        happened.append("tried")
        return DryRun(config={"name": config.name}, device="cpu", stages=())

    monkeypatch.setattr("tclkit.tcl.dry_run.dry_run", tried)
    result = invoke("train", "--dry-run", "--json")
    assert (result.exit_code, happened) == (0, ["joined", "tried", "left"])
    assert ("tcl-shapes" in result.stdout) == (rank == 0)


def test_an_unknown_configuration_is_one_line(invoke: Invoke) -> None:
    result = invoke("train", "--config", "tcl-circles")
    assert result.exit_code == 1
    assert "tcl-circles" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_run_of_another_configuration_is_not_mixed_in(invoke: Invoke, arguments: list[str]) -> None:
    assert invoke(*arguments, "-o", "run").exit_code == 0
    result = invoke(*arguments, "--set", "seed=1", "-o", "run")
    assert result.exit_code == 1
    assert "--resume never" in result.stderr
    assert invoke(*arguments, "--set", "seed=1", "-o", "run", "--resume", "never").exit_code == 0
    assert json.loads(Path("run/config.json").read_text())["seed"] == 1


def test_the_configuration_of_the_help_s_example_is_valid() -> None:
    from tclkit.cli.train import train
    from tclkit.tcl.config import load_config

    assert train.__doc__ is not None
    example = next(line for line in train.__doc__.splitlines() if "--set" in line)
    words = shlex.split(example)
    overrides = [words[number + 1] for number, word in enumerate(words) if word == "--set"]
    assert load_config("tcl-vit-b-16", overrides).pairs is not None
    with pytest.raises(ConfigError, match=r"each of 1 sources.*--set 'pairs.weights=\[1\]'"):
        load_config("tcl-vit-b-16", overrides[:1])


def test_a_run_folder_that_is_a_file_is_one_line(invoke: Invoke, arguments: list[str]) -> None:
    Path("file").write_text("")
    result = invoke(*arguments, "-o", "file")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: file is a file, but the results need a folder: give another with -o\n"


def test_sources_are_looked_at_before_a_clip_is_fetched(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("open_clip.create_model", lambda *_, **__: pytest.fail("fetched"))
    sources = ("--set", 'pairs.sources=["nowhere/{0..3}.tar"]', "--set", "pairs.weights=[1]")
    result = invoke("train", "-c", "tcl-vit-b-16", *sources, "--dry-run")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "nowhere/0.tar" in result.stderr
