"""`tclkit bench`: how fast a model is on this machine, what takes the time, how near it comes to the machine's peak."""

import json
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from tclkit.runtime.errors import InputError
from tclkit.runtime.files import atomic_file

from ._console import EXIT_FAILED, DebugOption, fail, plain, print_json, printer, require_extra, say, table, warn
from ._outputs import require_output_folder
from ._progress import work_display
from ._settings import DEFAULT_MODEL, JsonOption, ModelOption

if TYPE_CHECKING:
    from tclkit.calib import BenchResult, Contender

_DEFAULT_OUTPUT = Path("tclkit-bench")
_T = TypeVar("_T")


class AgainstName(str, Enum):
    """Values of --against."""

    TORCH = "torch"


def bench(
    model: ModelOption = DEFAULT_MODEL,
    backend: Annotated[
        str | None,
        typer.Option(
            "--backend",
            metavar="NAME,NAME...",
            help="What runs the graphs: onnxruntime, openvino, tensorrt. Default: all that can be used here.",
            show_default=False,
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision",
            metavar="NAME,NAME...",
            help="Of the image graph: fp32, bf16, fp16, int8. Default: all that the model has.",
            show_default=False,
        ),
    ] = None,
    prompts: Annotated[
        str,
        typer.Option(
            "--prompts",
            metavar="N,N...",
            help="How many things to look for. Of prompts, sizes and batches the first is the base; the others are "
            "measured one at a time.",
        ),
    ] = "20,1,150",
    size: Annotated[
        str | None,
        typer.Option(
            "--size",
            metavar="HxW,HxW...",
            help="Image sizes that the model has graphs for. Default: all of them.",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[
        str, typer.Option("--batch", metavar="N,N...", help="Images at once; more than one through the graphs alone.")
    ] = "1",
    against: Annotated[
        AgainstName | None,
        typer.Option(
            "--against",
            metavar="torch",
            help="A row for the reference model in PyTorch, float32 on the CPU, with random weights. Needs the train "
            "extra.",
            show_default=False,
        ),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(
            "--image", metavar="FILE", help="A picture of yours. Default: a 1280 x 720 JPEG of the sample scenes."
        ),
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, metavar="N", help="Measured runs of each.")] = 10,
    warm_up: Annotated[int, typer.Option("--warm-up", min=1, metavar="N", help="Runs of each before them.")] = 2,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, metavar="N", help="CPU threads. Default: every CPU.")
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, metavar="N", help="Of the order, which changes from round to round.")
    ] = 0,
    memory: Annotated[
        bool, typer.Option("--memory/--no-memory", help="Measure peak memory, in a process of its own for each.")
    ] = True,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for results.json and chart.png.")
    ] = _DEFAULT_OUTPUT,
    json_output: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure speed and memory: backends, precisions, numbers of prompts, image sizes, batches."""
    from tclkit.calib import BenchSettings, run_bench

    try:
        settings = BenchSettings(
            model=model,
            backends=_listed("--backend", backend, str),
            precisions=_listed("--precision", precision, str),
            prompts=_listed("--prompts", prompts, _number),
            sizes=_listed("--size", size, _size),
            batches=_listed("--batch", batch, _number),
            contenders=() if against is None else (_torch_row(),),
            image=image,
            rounds=rounds,
            warm_up=warm_up,
            threads=threads,
            seed=seed,
            memory=memory,
        )
    except InputError as error:
        raise typer.BadParameter(error.message) from error
    require_output_folder(output)  # now, not after minutes of measuring
    with work_display() as display:
        result = run_bench(settings, progress=display.phase)
    if json_output:
        print_json(result.to_dict())
    else:
        _print(result)
    _close(result, _write(result, output))


def _torch_row() -> "Contender":
    require_extra("train", "torch", "open_clip")
    from tclkit.tcl import random_torch_contender

    return random_torch_contender()


def _listed(option: str, text: str | None, convert: Callable[[str], _T]) -> tuple[_T, ...]:
    """Values between commas; none for an option that was not given."""
    if text is None:
        return ()
    try:
        return tuple(convert(part.strip()) for part in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r}: {error}", param_hint=option) from error


def _number(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise ValueError(f"{text!r} is no whole number from 1; write them with commas, such as 1,20,150")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    height, cross, width = text.lower().partition("x")
    if not (cross and height.isascii() and width.isascii() and height.isdigit() and width.isdigit()):
        raise ValueError(f"{text!r} is no size; write HEIGHTxWIDTH, such as 448x448")
    return int(height), int(width)


def _write(result: "BenchResult", output: Path) -> list[Path]:
    """Write the results and their chart; those of an earlier run stay when nothing was measured."""
    if not result.rows:
        return []
    results, chart = output / "results.json", output / "chart.png"
    with atomic_file(results) as temporary:
        temporary.write_text(json.dumps(result.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    from PIL import Image

    from tclkit.calib import draw_chart

    with atomic_file(chart) as temporary:
        Image.fromarray(draw_chart(result)).save(temporary, "PNG", optimize=True)
    return [results, chart]


def _print(result: "BenchResult") -> None:
    from tclkit.calib.bench_tables import lines_from_result, tables_from_result

    console = printer()
    for found in tables_from_result(result):
        rows: Any = table(*found.columns, right=found.right, title=plain(found.title))
        for cells in found.rows:
            rows.add_row(*map(plain, cells))
        console.print(rows)
    for line in lines_from_result(result):
        console.print(plain(line))


def _close(result: "BenchResult", written: list[Path]) -> None:
    for note in result.notes:
        warn(note)
    for path in written:
        say(f"written  {path}")
    if not result.rows:
        for contender in result.contenders:
            fail(f"{contender.name}: {contender.problem}")
        raise typer.Exit(EXIT_FAILED)
