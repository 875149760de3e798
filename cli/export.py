"""`tclkit export`: a training checkpoint becomes a bundle."""

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ._console import DebugOption, plain, printer, require_extra, say, size_text, table
from ._settings import CheckpointArgument, ClipOption

if TYPE_CHECKING:
    from tclkit.runtime.bundle import Bundle


def export(
    checkpoint: CheckpointArgument,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="BUNDLE", help="Folder of the new bundle.")],
    sizes: Annotated[
        list[str] | None,
        typer.Option(
            "--size", metavar="HxW", help="Image size of the graph, repeatable. Default: 448x448.", show_default=False
        ),
    ] = None,
    clip: ClipOption = None,
    debug: DebugOption = False,
) -> None:
    """Write the bundle of a checkpoint, each graph compared with torch."""
    wanted = [parse_size(size) for size in sizes or ["448x448"]]
    require_extra("export", "torch", "open_clip", "onnx", "onnxscript")
    from tclkit.export import export_bundle
    from tclkit.runtime import open_bundle

    export_bundle(checkpoint, output, sizes=wanted, clip=clip)
    report_bundle(open_bundle(output))


def parse_size(text: str) -> tuple[int, int]:
    """(H, W) in pixels from "HxW".

    Raises:
        typer.BadParameter: not two positive numbers.
    """
    match = re.fullmatch(r"(\d{1,5})[xX](\d{1,5})", text)
    if match is None or not int(match[1]) or not int(match[2]):
        raise typer.BadParameter(f"{text!r} is no size; write HEIGHTxWIDTH, such as 448x448", param_hint="--size")
    return int(match[1]), int(match[2])


def report_bundle(bundle: "Bundle") -> None:
    """Print what a new bundle holds and how far its graphs are from torch."""
    checks = bundle.manifest.checks.get("fp32", {})
    files = table(
        "file", "size", "max error against torch", right=("size", "max error against torch"), title=bundle.name
    )
    for name, record in bundle.manifest.files.items():
        error = checks.get(name, {}).get("max_abs_error")
        files.add_row(plain(name), size_text(record.size_bytes), "" if error is None else f"{error:.1e}")
    printer().print(files)
    say(f"bundle   {bundle.folder} ({size_text(bundle.size_bytes)})")
    say(f"next     tclkit segment IMAGE PROMPT... --model {shlex.quote(str(bundle.folder))}")
