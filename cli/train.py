"""`tclkit train`: from a configuration to a checkpoint and its evaluation."""

import dataclasses
import json
import shlex
from contextlib import nullcontext
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tclkit.runtime.errors import TrainingStoppedError

from ._console import DebugOption, plain, print_json, printer, require_extra, say, size_text, table, warn
from ._outputs import require_output_folder
from ._progress import training_display
from ._settings import JsonOption

if TYPE_CHECKING:
    from tclkit.tcl.dry_run import DryRun
    from tclkit.tcl.train import TrainingResult


_SIGNALLED = 128  # added to a signal's number, as shells do


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
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show the resolved configuration, what it needs, and the time of one step."),
    ] = False,
    json_output: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Train a model; run the same command again to go on after an interruption.

    A configuration learns from scenes of the synthetic world or from image-text pairs, for example:
    tclkit train -c tcl-vit-b-16 --dry-run --set 'pairs.sources=["data/{00000..00331}.tar"]' --set 'pairs.weights=[1]'

    Ctrl-C and SIGTERM end it after the step that is running, with a checkpoint. torchrun shares the work:
    torchrun --nproc-per-node 2 --no-python tclkit train ...
    """
    require_extra("train", "torch", "open_clip")
    from tclkit.tcl.config import load_config
    from tclkit.tcl.distributed import process_group
    from tclkit.tcl.pairs import PairReader
    from tclkit.tcl.train import train as train_model

    settings = load_config(config, overrides or [])
    folder = run_folder or Path("runs") / settings.name
    if settings.pairs is not None:
        PairReader(settings.pairs)  # sources that are not there are told before a CLIP is fetched
    if not dry_run:
        require_output_folder(folder)
    with process_group() as place:
        if dry_run:
            from tclkit.tcl.dry_run import dry_run as try_out

            found = try_out(settings)
            if place.is_first:
                _show(found, as_json=json_output)
            return
        if place.is_first:
            shared = f" with {place.count} processes" if place.count > 1 else ""
            say(f"training {settings.name} in {folder}{shared}; an interrupted run goes on with the same command")
        try:
            with training_display() if place.is_first else nullcontext() as progress:
                result = train_model(settings, run_folder=folder, resume=resume.value, progress=progress)
        except TrainingStoppedError as stopped:
            if place.is_first:
                say(stopped.message)
            raise typer.Exit(_SIGNALLED + int(str(stopped.values["signal_number"]))) from stopped
        if not place.is_first:
            return
    if json_output:
        print_json(_document(result))
    else:
        _report(result, settings.name)


def _document(result: "TrainingResult") -> dict[str, Any]:
    return {
        "checkpoint": str(result.checkpoint),
        "seconds": round(result.seconds, 3),
        "scores": [dataclasses.asdict(score) for score in result.scores],
        "broken": dict(result.broken),
    }


def _show(found: "DryRun", *, as_json: bool) -> None:
    if as_json:
        print_json(dataclasses.asdict(found))
        return
    for key, value in found.config.items():
        if not isinstance(value, dict):
            typer.echo(f"{key} = {json.dumps(value)}")
    for section, values in found.config.items():
        if isinstance(values, dict):
            typer.echo(f"\n[{section}]")
            for key, value in values.items():
                if value is not None:
                    typer.echo(f"{key} = {json.dumps(value)}")
    names = ("stage", "learned", "frozen", "weights and moments", "peak memory", "pairs a step", "s a step", "hours")
    needs = table(*names, title=f"tried on {found.device}, nothing was kept", right=names[1:])
    for one in found.stages:
        figures = (f"{one.learned / 1e6:.2f} M", f"{one.frozen / 1e6:.2f} M", size_text(one.fixed_bytes))
        pace = (f"{one.pairs}", f"{one.step_s:.2f}", f"{one.step_s * one.steps / 3600:.1f}")
        needs.add_row(plain(one.stage), *figures, size_text(one.peak_bytes), *pace)
    printer().print(needs)


def _report(result: "TrainingResult", name: str) -> None:
    if result.broken:
        left_out = ", ".join(f"{count} of {reason!r}" for reason, count in sorted(result.broken.items()))
        warn(f"pairs left out: {left_out}")
    if result.scores:
        _print_scores(result)
    say(f"checkpoint {result.checkpoint} ({result.seconds / 60:.1f} min)")
    say(f"next: tclkit export {shlex.quote(str(result.checkpoint))} -o {shlex.quote(name)}")


def _print_scores(result: "TrainingResult") -> None:
    scores = table(
        "method", "prompts", "mIoU", "background IoU", "threshold", right=("mIoU", "background IoU", "threshold")
    )
    for score in result.scores:
        figures = (f"{score.miou:.1f}", f"{score.background_iou:.1f}", f"{score.threshold:.2f}")
        scores.add_row(plain(score.method), plain(score.prompts), *figures)
    printer().print(scores)
