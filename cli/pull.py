"""`tclkit pull`: fetch a published model and build its bundle."""

from pathlib import Path
from typing import Annotated

import typer

from ._console import DebugOption, require_extra
from ._outputs import require_output_folder
from ._progress import work_display
from ._settings import ClipOption, SizeOption
from .export import Decoder, DecoderOption, parse_sizes, report_bundle


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
    clip_url: Annotated[
        str | None, typer.Option("--clip-url", metavar="URL", help="Fetch CLIP from here; its published hash must fit.")
    ] = None,
    sha256: Annotated[
        str | None, typer.Option("--sha256", metavar="HASH", help="Refuse a checkpoint that has another hash.")
    ] = None,
    sizes: SizeOption = None,
    decoder: DecoderOption = Decoder.DIRECT,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="BUNDLE", help="Folder of the new bundle. Default: where models live."),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Fetch a published model and build its bundle; a broken download goes on where it stopped."""
    wanted = parse_sizes(sizes)
    if output is not None:
        require_output_folder(output)
    require_extra("export", "torch", "open_clip", "onnx", "onnxscript")
    from tclkit.export.pull import pull as pull_model
    from tclkit.runtime import open_bundle

    with work_display() as display:
        folder = pull_model(
            name,
            checkpoint=checkpoint,
            clip=clip,
            url=url,
            clip_url=clip_url,
            sha256=sha256,
            out=output,
            sizes=wanted,
            decoder=decoder.value,
            progress=display.download,
            export_progress=display.step,
        )
    report_bundle(open_bundle(folder, verify=False), model=name if output is None else None)
