"""`tclkit export`: a training checkpoint becomes a bundle."""

import re
import shlex
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ._console import DebugOption, plain, printer, require_extra, say, size_text, table
from ._progress import work_display
from ._settings import CheckpointArgument, ClipOption, SizeOption

if TYPE_CHECKING:
    from tclkit.runtime import Bundle


class KpAttention(str, Enum):
    """Values of --kp-attention."""

    SELF = "self"
    NEIGHBOURS = "neighbours"


class Decoder(str, Enum):
    """Values of --decoder."""

    DIRECT = "direct"
    PHASES = "phases"
    DIFFERENCES = "differences"
    WINOGRAD2 = "winograd2"
    WINOGRAD4 = "winograd4"


DecoderOption = Annotated[
    Decoder,
    typer.Option(
        "--decoder",
        metavar="FORM",
        help="How the decoder is written: direct, phases, differences, winograd2, winograd4. All compute the same; "
        "take winograd4 where a processor runs the model.",
    ),
]


def export(
    checkpoint: CheckpointArgument,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="BUNDLE", help="Folder of the new bundle.")],
    sizes: SizeOption = None,
    clip: ClipOption = None,
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Name of the model. Default: the checkpoint's own, else the folder's."),
    ] = None,
    half_weights: Annotated[
        bool, typer.Option("--half-weights", help="Store weights as float16, in half the space; computed in float32.")
    ] = False,
    kp_attention: Annotated[
        KpAttention,
        typer.Option(
            "--kp-attention",
            metavar="WAY",
            help="Of CLIP's own masks: self, as published, or neighbours (NACLIP's way; not measured on photographs).",
        ),
    ] = KpAttention.SELF,
    decoder: DecoderOption = Decoder.DIRECT,
    debug: DebugOption = False,
) -> None:
    """Write the bundle of a checkpoint, each graph compared with torch."""
    wanted = parse_sizes(sizes)
    require_extra("export", "torch", "open_clip", "onnx", "onnxscript")
    from tclkit.export import export_bundle
    from tclkit.runtime import open_bundle

    with work_display() as display:
        folder = export_bundle(
            checkpoint,
            output,
            clip=clip,
            sizes=wanted,
            name=name,
            kp_attention=kp_attention.value,
            decoder=decoder.value,
            half_weights=half_weights,
            progress=display.step,
        )
    report_bundle(open_bundle(folder, verify=False))


def parse_sizes(texts: list[str] | None) -> list[tuple[int, int]] | None:
    """Return (H, W) in pixels of each "HxW"; None, the exporter's own choice, for none.

    Raises:
        typer.BadParameter: not two positive numbers.
    """
    return [_size_from_text(text) for text in texts] if texts else None


def _size_from_text(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,5})[xX](\d{1,5})", text)
    if match is None or not int(match[1]) or not int(match[2]):
        raise typer.BadParameter(f"{text!r} is no size; write HEIGHTxWIDTH, such as 448x448", param_hint="--size")
    return int(match[1]), int(match[2])


def report_bundle(bundle: "Bundle", *, model: str | None = None) -> None:
    """Print what a new bundle holds and how far its graphs are from torch.

    Args:
        bundle: the new bundle.
        model: what to give as --model; None: the bundle's folder.
    """
    checks = bundle.manifest.checks.get("fp32", {})
    files = table("file", "size", "error against torch", right=("size", "error against torch"), title=bundle.name)
    for name, record in bundle.manifest.files.items():
        error = checks.get(name, {}).get("max_abs_error")
        files.add_row(plain(name), size_text(record.size_bytes), "" if error is None else f"{error:.1e}")
    printer().print(files)
    say(f"bundle   {bundle.folder} ({size_text(bundle.size_bytes)})")
    say(f"next     tclkit segment IMAGE PROMPT... --model {shlex.quote(model or str(bundle.folder))}")
