"""Options that several commands share."""

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class BackendName(str, Enum):
    """Values of --backend."""

    AUTO = "auto"
    TENSORRT = "tensorrt"
    OPENVINO = "openvino"
    ONNXRUNTIME = "onnxruntime"


class PrecisionName(str, Enum):
    """Values of --precision."""

    AUTO = "auto"
    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"


class FitName(str, Enum):
    """Values of --fit."""

    WHOLE = "whole"
    STRETCH = "stretch"
    SLIDE = "slide"


def fraction(value: float | None) -> float | None:
    """Let a number from 0 to 1 through, or none at all; typer's own check would let NaN pass."""
    if value is not None and not 0 <= value <= 1:
        raise typer.BadParameter(f"{value:g} is not in the range 0 to 1")
    return value


def refuse_empty_contrast(contrast: Sequence[str] | None) -> None:
    """Let prompts of --contrast through that name something; the model would count them after the others.

    Raises:
        typer.BadParameter: one is empty.
    """
    if not all(prompt.strip() for prompt in contrast or ()):
        raise typer.BadParameter("is empty: name what else may be there, or leave it out", param_hint="--contrast")


DEFAULT_MODEL = "tcl-shapes"

ModelOption = Annotated[
    str, typer.Option("--model", "-m", metavar="MODEL", help="Name of an installed model, or a bundle's folder.")
]
BackendOption = Annotated[
    BackendName,
    typer.Option(
        "--backend",
        metavar="NAME",
        help="What runs the graphs: onnxruntime, openvino, tensorrt, or auto for the best that is installed.",
    ),
]
PrecisionOption = Annotated[
    PrecisionName,
    typer.Option(
        "--precision",
        metavar="NAME",
        help="Of the image graph: fp32, fp16, bf16 or int8. Auto takes the fastest that was built here, else fp32.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document on standard output.")]
FlipOption = Annotated[
    bool, typer.Option("--flip", help="Look at each image mirrored as well and take the mean (twice the time).")
]
ScalesOption = Annotated[
    bool,
    typer.Option(
        "--scales",
        help="Look at each image in every size of the bundle that has its aspect and take the mean; for a bundle that "
        "was exported with several.",
    ),
]
CheckpointArgument = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="Training checkpoint: ours, or the authors' tcl.pth.")
]
ClipOption = Annotated[
    str | None,
    typer.Option(
        "--clip",
        metavar="FILE|NAME",
        help="CLIP's weights, for a checkpoint that holds only what was learned: a file, or open_clip's name of them.",
    ),
]
CalibrationOption = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        metavar="IMAGES",
        help="Images of the kind the robot will see: a folder, quoted glob, video, .tar shards, or a list of paths.",
    ),
]
PromptsFileOption = Annotated[
    Path | None,
    typer.Option(
        "--prompts", metavar="FILE", help="What to ask for when judging, one prompt a line. Default: a built-in list."
    ),
]
SizeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--size",
        metavar="HxW",
        help="Image size of a graph, repeatable. Default: the checkpoint's own, else 448x448.",
        show_default=False,
    ),
]
