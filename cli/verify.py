"""`tclkit verify`: every graph and engine of a bundle against the float32 graph, on this machine."""

from pathlib import Path
from typing import Annotated

import typer

from ._console import EXIT_FAILED, DebugOption, fail, print_json, require_extra, say
from ._outputs import require_output_file
from ._progress import work_display
from ._settings import DEFAULT_MODEL, CalibrationOption, JsonOption, PromptsFileOption
from ._verdicts import show_verdicts


def verify(
    bundle: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="The same as --model.", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            help=f"Name of an installed model, or a bundle's folder. Default: {DEFAULT_MODEL}.",
            show_default=False,
        ),
    ] = None,
    calibration: CalibrationOption = None,
    images: Annotated[int, typer.Option("--images", metavar="N", min=2, help="How many of them to judge on.")] = 16,
    prompts: PromptsFileOption = None,
    report: Annotated[
        Path | None,
        typer.Option("--report", metavar="FILE", help="Write what was found as Markdown, to paste into a bug report."),
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Judge what was compiled once more, here: every graph, and every engine that fits this machine."""
    if bundle is not None and model is not None:
        raise typer.BadParameter("MODEL and --model are the same: give one of them")
    require_extra("build", "onnx")
    from tclkit.export.gate_inputs import prompts_from_file
    from tclkit.export.verify import verify_bundle
    from tclkit.runtime.files import atomic_file

    if report is not None:
        require_output_file(report, "--report")
    with work_display() as display:
        found = verify_bundle(
            bundle or model or DEFAULT_MODEL,
            calibration=calibration,
            images=images,
            prompts=prompts_from_file(prompts) if prompts else None,
            progress=display.phase,
        )
    if as_json:
        print_json(found.to_dict())
    else:
        if found.verdicts:
            show_verdicts(found.verdicts, title=found.bundle["name"])
        else:
            say(f"nothing to judge: {found.bundle['name']} has float32 graphs only, and no engine for here")
        for name, why in found.not_for_here.items():
            say(f"{name}: {why}")
    for name, why in found.problems.items():
        fail(f"{name}: {why}")
    if report is not None:
        with atomic_file(report) as temporary:
            temporary.write_text(found.report(), encoding="utf-8")
        say(f"report   {report}")
    if not found.passed:
        raise typer.Exit(EXIT_FAILED)
