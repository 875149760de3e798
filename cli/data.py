"""`tclkit data`: label maps as the benchmarks expect them, and what of a benchmark is missing."""

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from tclkit.runtime.errors import InputError

from ._console import EXIT_FAILED, DebugOption, fail, print_json, say
from ._progress import work_display
from ._settings import JsonOption

_SHOWN = 10


class LabelSource(str, Enum):
    """Values of --source."""

    AUTO = "auto"
    PIXELMAPS = "pixelmaps"
    INSTANCES = "instances"


def prepare(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="voc, voc20, context, context59, coco_object, coco_stuff, cityscapes, ade20k, or all of these.",
        ),
    ],
    root: Annotated[
        Path,
        typer.Option(
            "--root",
            metavar="DIR",
            help="The benchmark's own folder, or one that holds several (VOCdevkit, coco_stuff164k, cityscapes, ade).",
        ),
    ],
    source: Annotated[
        LabelSource,
        typer.Option(
            "--source",
            metavar="WAY",
            help="Of coco_object: pixelmaps (as the published figures), instances (from instances_val2017.json), or "
            "auto for the first that is there.",
        ),
    ] = LabelSource.AUTO,
    check: Annotated[bool, typer.Option("--check", help="Only say what is missing and where it is expected.")] = False,
    json_output: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Make a benchmark's label maps from what its publishers ship, and check that all is there."""
    from tclkit.calib.benchmarks import benchmark_named, published_benchmarks

    keys = list(published_benchmarks()) if name == "all" else [benchmark_named(name).key]
    reports = [_prepare_one(key, root, source.value, check=check) for key in keys]
    if json_output:
        print_json({"benchmarks": reports})
    elif not any(report["missing"] or report["problems"] for report in reports):
        for report in reports:
            typer.echo(f"{report['benchmark']}: complete, {report['images']} images")
    if any(report["missing"] or report["problems"] for report in reports):
        raise typer.Exit(EXIT_FAILED)


def _prepare_one(key: str, root: Path, source: str, *, check: bool) -> dict[str, Any]:
    from tclkit.calib.benchmarks import benchmark_named
    from tclkit.calib.datasets import missing_files, missing_parts, open_benchmark
    from tclkit.calib.prepare import Prepared, prepare_labels

    made, missing = Prepared(), []
    if not check:
        try:
            with work_display() as display:
                made = prepare_labels(key, root, source=source, progress=display.phase)
        except InputError as error:
            missing.append(error.message)
    if made.written or made.kept:
        say(f"{key}: {made.written} label maps written, {made.kept} were there, from {made.source}")
    if not missing:
        missing = missing_parts(benchmark_named(key), root)
    images = 0
    if not missing:
        dataset = open_benchmark(key, root)
        images = len(dataset)
        missing = [f"{path} does not exist" for path in missing_files(dataset)]
    problems = [f"{file}: {reason}" for file, reason in made.problems]
    for line in [*missing[:_SHOWN], *problems[:_SHOWN]]:
        fail(f"{key}: {line}")
    hidden = max(0, len(missing) - _SHOWN) + max(0, len(problems) - _SHOWN)
    if hidden:
        fail(f"{key}: and {hidden} more (--json lists all)")
    return {
        "benchmark": key,
        "written": made.written,
        "kept": made.kept,
        "images": images,
        "missing": missing,
        "problems": problems,
    }
