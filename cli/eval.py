"""`tclkit eval`: accuracy and latency on the published benchmarks, the synthetic world, or a user's own data."""

import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tclkit.runtime.errors import InputError
from tclkit.runtime.files import atomic_file

from ._console import (
    EXIT_FAILED,
    DebugOption,
    error_text,
    fail,
    plain,
    print_json,
    printer,
    require_extra,
    say,
    table,
    warn,
)
from ._outputs import require_output_folder
from ._progress import work_display
from ._settings import (
    DEFAULT_MODEL,
    BackendName,
    BackendOption,
    ClipOption,
    FlipOption,
    JsonOption,
    ModelOption,
    PrecisionName,
    PrecisionOption,
    ScalesOption,
    fraction,
    refuse_empty_contrast,
)

if TYPE_CHECKING:
    from tclkit.calib import Contender, Dataset, Evaluation, EvaluationSettings, Share

_SHAPES, _OWN, _ALL = "shapes", "folder", "all"
_DEFAULT_OUTPUT = Path("tclkit-eval")
_LEFT_OUT_SHOWN = 10


@dataclass(kw_only=True, slots=True)
class Outcome:
    """What became of the benchmarks.

    evaluations: of those that ran.
    failed: (key, reason) of those that could not.
    """

    evaluations: "list[Evaluation]" = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)


def eval_(
    benchmark: Annotated[
        list[str] | None,
        typer.Option(
            "--benchmark",
            "-b",
            metavar="NAME",
            help="voc, voc20, context, context59, coco_object, coco_stuff, cityscapes, ade20k, or all of these; folder "
            "for your own data; shapes, the default, for the synthetic world, which needs no data. Repeatable.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="DIR",
            help="A benchmark's own folder, or one that holds several (VOCdevkit, coco_stuff164k, cityscapes, ade); "
            "for folder, one with images/, labels/ and names.txt.",
        ),
    ] = None,
    names: Annotated[
        Path | None,
        typer.Option("--names", metavar="FILE", help="Class names of your own data, one a line; line 0 names label 0."),
    ] = None,
    model: ModelOption = DEFAULT_MODEL,
    backend: BackendOption = BackendName.AUTO,
    precision: PrecisionOption = PrecisionName.AUTO,
    compare: Annotated[
        str | None,
        typer.Option("--compare", metavar="P,P...", help="Several precisions, image by image in turn: fp32,fp16,int8."),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            "--torch",
            metavar="CHECKPOINT",
            help="What the model was exported from: a row for torch on the CPU beside the graphs', image by image in "
            "turn. Needs the train extra.",
        ),
    ] = None,
    clip: ClipOption = None,
    pamr: Annotated[bool, typer.Option("--pamr", help="Refine masks along the images' edges (slower).")] = False,
    threshold: Annotated[
        float | None,
        typer.Option(
            callback=fraction, metavar="0..1", help="Of the background. Default: the benchmark's, else the model's."
        ),
    ] = None,
    kp: Annotated[
        float | None,
        typer.Option(
            callback=fraction,
            metavar="0..1",
            help="Share of CLIP's own masks. Default: the benchmark's, else the model's.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, metavar="N", help="Only the first N images of each benchmark.")
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, metavar="N", help="Processes on this machine.")] = 1,
    loaders: Annotated[
        int, typer.Option("--loaders", min=1, metavar="N", help="Threads of each process that read files.")
    ] = 2,
    rank: Annotated[
        int,
        typer.Option("--rank", min=0, metavar="R", help="Of --world-size: which part of the images is computed here."),
    ] = 0,
    world_size: Annotated[
        int,
        typer.Option("--world-size", min=1, metavar="W", help="Machines that share the work and the output."),
    ] = 1,
    windows: Annotated[
        int,
        typer.Option("--windows", min=1, metavar="N", help="Windows of an image in one run: more fills a GPU."),
    ] = 1,
    flip: FlipOption = False,
    scales: ScalesOption = False,
    contrast: Annotated[
        list[str] | None,
        typer.Option(
            "--contrast", metavar="PROMPT", help="What else may be there: its pixels are background. Repeatable."
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for what was counted, results and pictures.")
    ] = _DEFAULT_OUTPUT,
    pictures: Annotated[
        bool, typer.Option("--pictures/--no-pictures", help="Draw confusion matrices, and the best and worst images.")
    ] = True,
    classes: Annotated[bool, typer.Option("--classes", help="Print the table of every class, too.")] = False,
    json_output: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure mIoU and latency; run the same command again to go on after an interruption."""
    keys = _keys(benchmark or [_SHAPES])
    if clip is not None and checkpoint is None:
        raise typer.BadParameter("--clip goes with --torch CHECKPOINT")
    _check_usage(keys, data, names, precision, compare, threshold=threshold is not None, contrast=bool(contrast))
    refuse_empty_contrast(contrast)
    from tclkit.calib import EvaluationSettings, Share

    contenders = () if checkpoint is None else (_torch_row(checkpoint, clip),)
    try:
        settings = EvaluationSettings(
            model=model,
            backend=backend.value,
            precisions=tuple(part.strip() for part in compare.split(",")) if compare else (precision.value,),
            pamr=pamr,
            threshold=threshold,
            kp_w=kp,
            limit=limit,
            windows_per_run=windows,
            flip=flip,
            scales=scales,
            contrast=tuple(contrast or ()),
            contenders=contenders,
        )
        share = Share(rank=rank, world_size=world_size, workers=workers, loaders=loaders)
    except InputError as error:
        raise typer.BadParameter(error.message) from error
    require_output_folder(output)
    outcome = Outcome()
    for key in keys:
        opener = functools.partial(_opened, key, data, names, settings)
        _run_one(key, opener, settings, share, output, pictures, outcome)
    document = _document(outcome)
    if json_output:
        print_json(document)
    else:
        _print_figures(outcome.evaluations, classes=classes)
    if outcome.evaluations:  # else the results of an earlier run stay
        with atomic_file(output / "results.json") as temporary:
            temporary.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        say(f"results: {output / 'results.json'}")
    _close(outcome)


def _torch_row(checkpoint: Path, clip: str | None) -> "Contender":
    require_extra("train", "torch", "open_clip")
    from tclkit.tcl import torch_contender

    return torch_contender(checkpoint, clip=clip)


def _keys(given: Sequence[str]) -> list[str]:
    from tclkit.calib.benchmarks import benchmark_named, published_benchmarks

    keys: list[str] = []
    for key in given:
        if key not in (_SHAPES, _OWN, _ALL):
            try:
                benchmark_named(key)
            except InputError as error:
                raise typer.BadParameter(f"{error.message}, {_OWN}, {_SHAPES}, {_ALL}") from error
        keys += published_benchmarks() if key == _ALL else [key]
    return list(dict.fromkeys(keys))


def _check_usage(
    keys: Sequence[str],
    data: Path | None,
    names: Path | None,
    precision: PrecisionName,
    compare: str | None,
    **for_background: bool,
) -> None:
    from tclkit.calib.benchmarks import published_benchmarks

    if data is None and list(keys) != [_SHAPES]:
        raise typer.BadParameter("--data DIR is needed: where the images and label maps are (shapes alone needs none)")
    if data is not None and list(keys) == [_SHAPES]:
        raise typer.BadParameter("--benchmark shapes draws its own images; for data of your own: --benchmark folder")
    if names is not None and _OWN not in keys:
        raise typer.BadParameter("--names goes with --benchmark folder")
    if compare is not None:
        known = [name.value for name in PrecisionName if name is not PrecisionName.AUTO]
        wrong = [part.strip() for part in compare.split(",") if part.strip() not in known]
        if wrong:
            raise typer.BadParameter(
                f"--compare takes some of {','.join(known)}, separated by commas; not {wrong[0]!r}"
            )
        if precision is not PrecisionName.AUTO:
            raise typer.BadParameter("--precision and --compare exclude each other")
    flat = [key for key in keys if key in published_benchmarks() and not published_benchmarks()[key].background]
    for option in (name for name, is_given in for_background.items() if is_given and flat):
        raise typer.BadParameter(f"--{option} has no effect on {', '.join(flat)}: no background there")


def _opened(key: str, data: Path | None, names: Path | None, settings: "EvaluationSettings") -> "Dataset":
    from tclkit.calib import open_benchmark, open_own_data

    if key == _SHAPES:
        from tclkit.runtime import open_bundle
        from tclkit.tcl.world_dataset import DEFAULT_SCENES, WorldDataset, evaluation_world

        world = evaluation_world(open_bundle(settings.model, verify=False).manifest)
        return WorldDataset(world=world, count=settings.limit or DEFAULT_SCENES)
    assert data is not None
    return open_own_data(data, names=names) if key == _OWN else open_benchmark(key, data)


def _run_one(
    key: str,
    open_dataset: "Callable[[], Dataset]",
    settings: "EvaluationSettings",
    share: "Share",
    output: Path,
    pictures: bool,
    outcome: Outcome,
) -> None:
    """Evaluate one benchmark and note the outcome. Data that are not there are that benchmark's affair alone."""
    from tclkit.calib import evaluate

    try:
        dataset = open_dataset()
    except InputError as error:
        fail(f"{key}: {error_text(error)}")
        outcome.failed.append((key, error.message))
        return
    with work_display() as display:
        found = evaluate(
            dataset,
            settings,
            folder=output,
            share=share,
            progress=lambda done, total: display.phase(key, done, total),
        )
    outcome.evaluations.append(found)
    _announce(found, output)
    if pictures and found.counted and not found.pending:
        for path in _draw(found, dataset, settings, output):
            say(f"{key}: {path}")


def _announce(found: "Evaluation", output: Path) -> None:
    """Say what was not as it should be, or not done now: nothing is left out in silence."""
    if found.from_journal:
        say(f"{found.key}: {found.from_journal} of {found.total} images are from the journal in {output / 'journal'}")
    for note in found.notes:
        say(f"{found.key}: not the published protocol: {note}")
    if found.unknown_pixels:
        warn(f"{found.key}: {found.unknown_pixels} pixels have labels that name no class")
    for name, reason in found.left_out[:_LEFT_OUT_SHOWN]:
        fail(f"{found.key}: {name}: {reason}")
    if len(found.left_out) > _LEFT_OUT_SHOWN:
        fail(f"{found.key}: and {len(found.left_out) - _LEFT_OUT_SHOWN} more; results.json names them all")
    if found.pending:
        say(
            f"{found.key}: {found.pending} of {found.total} images are still to come from other ranks; once they are "
            "there, any rank's command, or one without --rank, gives the whole"
        )


def _draw(found: "Evaluation", dataset: "Dataset", settings: "EvaluationSettings", output: Path) -> list[Path]:
    """Confusion matrices of all views, and the gallery of the last, which asks for every class."""
    from tclkit.calib import draw_confusion, draw_gallery, find_extremes

    views = next(iter(found.results.values()))
    written = []
    for view, result in views.items():
        name = f"{found.key}-{view}-confusion.png" if len(views) > 1 else f"{found.key}-confusion.png"
        figure = f"{result.scores.miou_percent:.2f}"
        title = f"{found.title}, {found.model}: mIoU {figure} %"
        written.append(_write_picture(output / name, draw_confusion(result.counts, found.classes, title=title)))
    last = list(views)[-1]
    extremes = find_extremes(found, dataset, settings, last)
    for which, items in (("best", extremes.best), ("worst", extremes.worst)):
        if items:
            path = output / f"{found.key}-{which}.png"
            written.append(_write_picture(path, draw_gallery(items, dataset.benchmark)))
    return written


def _write_picture(path: Path, picture: Any) -> Path:
    from PIL import Image

    with atomic_file(path) as temporary:
        Image.fromarray(picture).save(temporary, "PNG")
    return path


def _document(outcome: Outcome) -> dict[str, Any]:
    return {
        "evaluations": [found.to_dict() for found in outcome.evaluations],
        "failed": [{"benchmark": key, "reason": reason} for key, reason in outcome.failed],
    }


def _print_figures(evaluations: "Sequence[Evaluation]", *, classes: bool) -> None:
    if not evaluations:
        return
    shown = {
        "prompts": any(len(views) > 1 for found in evaluations for views in found.results.values()),
        "agree": any(len(found.results) > 1 for found in evaluations),
    }
    numbers = ("mIoU", "paper", "pixels", "ms", "agree", "images")
    columns = [name for name in ("benchmark", "prompts", "graph", *numbers) if shown.get(name, True)]
    rows = table(*columns, right=numbers)
    for found in evaluations:
        for view in next(iter(found.results.values())):
            for precision in found.results:
                cells = _cells(found, view, precision)
                rows.add_row(*(cells[column] for column in columns))
    console = printer()
    console.print(rows)
    if classes:
        for found in evaluations:
            console.print(_class_table(found))


def _cells(found: "Evaluation", view: str, precision: str) -> dict[str, str]:
    """One row of the table, narrow enough for 80 columns: percentages, and the median of milliseconds an image."""
    result = found.results[precision][view]
    return {
        "benchmark": plain(found.key),
        "prompts": view,
        "graph": precision,
        "mIoU": _percent(result.scores.miou, 2),
        "paper": "-" if found.published is None else f"{found.published:.1f}",
        "pixels": _percent(result.scores.pixel_accuracy),
        "ms": "-" if math.isnan(result.latency_ms) else f"{result.latency_ms:.1f}",
        "agree": _percent(result.agreement, 2),
        "images": str(found.counted) if found.counted == found.total else f"{found.counted}/{found.total}",
    }


def _class_table(found: "Evaluation") -> Any:
    first = next(iter(found.results.values()))
    right = tuple(
        f"{figure}{'' if len(first) == 1 else f', {view}'}" for view in first for figure in ("IoU", "accuracy")
    )
    rows = table("class", *right, right=right, title=plain(found.title))
    for index, name in enumerate(found.classes):
        figures = [
            _percent(float(values[index]))
            for result in first.values()
            for values in (result.scores.iou, result.scores.accuracy)
        ]
        rows.add_row(plain(name), *figures)
    return rows


def _percent(share: float, digits: int = 1) -> str:
    return "-" if math.isnan(share) else f"{share * 100:.{digits}f}"


def _close(outcome: Outcome) -> None:
    left_out = {found.key: len(found.left_out) for found in outcome.evaluations if found.left_out}
    if left_out:
        fail("left out: " + ", ".join(f"{count} image(s) of {key}" for key, count in left_out.items()))
    if outcome.failed:
        fail("not evaluated: " + ", ".join(key for key, _ in outcome.failed))
    if left_out or outcome.failed:
        raise typer.Exit(EXIT_FAILED)
