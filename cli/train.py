"""`tclkit train`: from a configuration to a checkpoint and its evaluation."""

import shlex
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ._console import DebugOption, plain, printer, require_extra, say, table
from ._progress import training_display

if TYPE_CHECKING:
    from tclkit.tcl.train import TrainingResult


class Resume(str, Enum):
    """Values of --resume."""

    AUTO = "auto"
    NEVER = "never"


def train(
    config: Annotated[
        str,
        typer.Option(
            "--config",
            "-c",
            metavar="CONFIG",
            help="A TOML file, or the name of a configuration that ships with tclkit.",
        ),
    ] = "tcl-shapes",
    run_folder: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Run folder for checkpoints and logs. Default: runs/NAME."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one value of the configuration; repeatable."),
    ] = None,
    resume: Annotated[
        Resume, typer.Option(help="auto: go on where the run folder left off; never: begin anew.")
    ] = Resume.AUTO,
    debug: DebugOption = False,
) -> None:
    """Train a model; run the same command again to go on after an interruption.

    torchrun shares the work: torchrun --nproc-per-node 2 --no-python tclkit train ...
    """
    require_extra("train", "torch", "open_clip")
    from tclkit.tcl.config import load_config
    from tclkit.tcl.distributed import process_group
    from tclkit.tcl.train import train as train_model

    settings = load_config(config, overrides or [])
    folder = run_folder or Path("runs") / settings.name
    with process_group() as place:
        if not place.is_first:
            train_model(settings, run_folder=folder, resume=resume.value)
            return
        shared = f" with {place.count} processes" if place.count > 1 else ""
        say(f"training {settings.name} in {folder}{shared}; an interrupted run goes on with the same command")
        with training_display() as progress:
            result = train_model(settings, run_folder=folder, resume=resume.value, progress=progress)
    _report(result, settings.name)


def _report(result: "TrainingResult", name: str) -> None:
    scores = table(
        "method", "prompts", "mIoU", "background IoU", "threshold", right=("mIoU", "background IoU", "threshold")
    )
    for score in result.scores:
        figures = (f"{score.miou:.1f}", f"{score.background_iou:.1f}", f"{score.threshold:.2f}")
        scores.add_row(plain(score.method), plain(score.prompts), *figures)
    printer().print(scores)
    say(f"checkpoint {result.checkpoint} ({result.seconds / 60:.1f} min)")
    say(f"next: tclkit export {shlex.quote(str(result.checkpoint))} -o {shlex.quote(name)}")
