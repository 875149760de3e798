"""`tclkit data`: label maps as the benchmarks expect them, what of one is missing, and the synthetic world."""

import re
import shlex
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tclkit.runtime.errors import ConfigError, InputError

from ._console import EXIT_FAILED, DebugOption, fail, print_json, say
from ._outputs import require_output_folder
from ._progress import work_display
from ._settings import JsonOption

if TYPE_CHECKING:
    from tclkit.tcl.world import Palette
    from tclkit.tcl.world_shards import WorldFiles

_SHOWN = 10
_LABELLED = "labelled"
_COLOUR = re.compile(r"(?P<name>[^=]+)=#?(?P<rgb>[0-9a-fA-F]{6})")


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

    try:
        keys = list(published_benchmarks()) if name == "all" else [benchmark_named(name).key]
    except InputError as error:
        raise typer.BadParameter(error.message) from error
    two_ways = {"coco_object"} if name == "all" else set(keys)  # of all only this one has a choice of sources
    ways = [source if key in two_ways else LabelSource.AUTO for key in keys]
    reports = [_prepare_one(key, root, way.value, check=check) for key, way in zip(keys, ways, strict=True)]
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


def world(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the shards; train from DIR/*.tar.")
    ],
    scenes: Annotated[int, typer.Option("--scenes", min=1, metavar="N", help="Image-text pairs in all.")],
    per_shard: Annotated[
        int, typer.Option("--per-shard", min=1, max=10_000, metavar="N", help="Pairs of one shard.")
    ] = 1000,
    size: Annotated[int, typer.Option("--size", min=16, max=4096, metavar="PIXELS", help="Of an image's side.")] = 128,
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Another seed gives other scenes.")] = 0,
    colours: Annotated[
        str | None,
        typer.Option(
            "--colours",
            metavar="NAME=RRGGBB,...",
            help="Of the objects, and so of the captions: pink=ff8ac4,teal=0e8a80. Default: the eight that tcl-shapes "
            "knows.",
        ),
    ] = None,
    labelled: Annotated[
        int,
        typer.Option(
            "--labelled",
            min=0,
            metavar="N",
            help=f"Write N other scenes with label maps into DIR/{_LABELLED} as well, to evaluate on.",
        ),
    ] = 0,
    json_output: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write the synthetic world as image-text shards; run the same command again to go on after an interruption."""
    from tclkit.tcl.world import PALETTE, WorldConfig
    from tclkit.tcl.world_shards import write_labelled_scenes, write_world_shards

    require_output_folder(output)
    palette = PALETTE if colours is None else _palette(colours)
    settings = WorldConfig(size=size, seed=seed)
    judged = None
    with work_display() as display:
        made = write_world_shards(
            output,
            settings,
            scenes=scenes,
            per_shard=per_shard,
            palette=palette,
            progress=lambda done, total: display.phase("scenes", done, total),
        )
        if labelled:
            judged = write_labelled_scenes(
                output / _LABELLED,
                settings,
                scenes=labelled,
                palette=palette,
                progress=lambda done, total: display.phase("labelled scenes", done, total),
            )
    _report_world(made, judged, json_output=json_output)


def _palette(text: str) -> "Palette":
    from tclkit.tcl.world import Palette

    found = []
    for part in text.split(","):
        match = _COLOUR.fullmatch(part.strip())
        if match is None:
            raise typer.BadParameter(f"--colours {part.strip()!r} is not of the form NAME=RRGGBB, such as pink=ff8ac4")
        red, green, blue = bytes.fromhex(match["rgb"])
        found.append((match["name"].strip(), (red, green, blue)))
    try:
        return Palette(colours=tuple(found))
    except ConfigError as error:
        raise typer.BadParameter(f"--colours: {error.message}") from error


def _report_world(made: "WorldFiles", judged: "WorldFiles | None", *, json_output: bool) -> None:
    source = str(made.folder / "*.tar")
    if json_output:
        shards = {"written": made.written, "kept": made.kept}
        found = None if judged is None else {"folder": str(judged.folder), "scenes": judged.scenes}
        print_json({"source": source, "scenes": made.scenes, "shards": shards, "labelled": found})
        return
    typer.echo(f"{source}: {made.scenes} pairs in {made.written + made.kept} shards, {made.kept} of which were there")
    if judged is not None:
        typer.echo(f"{judged.folder}: {judged.scenes} labelled scenes")
        say(f"next: tclkit eval --benchmark folder --data {shlex.quote(str(judged.folder))} --model MODEL")
