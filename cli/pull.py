"""`tclkit pull`: fetch a published model and build its bundle."""

from pathlib import Path
from typing import Annotated

import typer

from ._console import DebugOption, require_extra
from ._progress import download_display
from ._settings import ClipOption
from .export import report_bundle


def pull(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the model, such as tcl-vit-b-16.")],
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", metavar="FILE", help="A local copy of the checkpoint instead of a download."),
    ] = None,
    clip: ClipOption = None,
    url: Annotated[
        str | None, typer.Option("--url", metavar="URL", help="Fetch the checkpoint from here, a mirror for example.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="BUNDLE", help="Folder of the new bundle. Default: where models live."),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Fetch a published model, check its hash, and build its bundle; a broken download goes on where it stopped."""
    require_extra("export", "torch", "open_clip", "onnx", "onnxscript")
    from tclkit.export.pull import pull as pull_model

    from tclkit.runtime import open_bundle

    with download_display() as progress:
        folder = pull_model(name, checkpoint=checkpoint, clip=clip, url=url, out=output, progress=progress)
    report_bundle(open_bundle(folder))
