"""`tclkit build-engine`: graphs in FP16, BF16 or INT8, compiled for this device, past the gate or not at all."""

import contextlib
import shlex
from collections.abc import Iterator
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tclkit.runtime.errors import ConfigError

from ._console import DebugOption, print_json, printer, require_extra, say, size_text, table
from ._progress import work_display
from ._settings import (
    DEFAULT_MODEL,
    CalibrationOption,
    JsonOption,
    ModelOption,
    PromptsFileOption,
    fraction,
)
from ._verdicts import show_verdicts
from .export import Decoder, parse_sizes

if TYPE_CHECKING:
    from tclkit.export.build import BuildResult
    from tclkit.export.gates import GateThresholds

EXIT_NO_TENSORRT = 3


class DeviceName(str, Enum):
    """Values of --device."""

    GPU = "gpu"
    CPU = "cpu"


class RangeMethod(str, Enum):
    """Values of --ranges."""

    MSE = "mse"
    ENTROPY = "entropy"
    MINMAX = "minmax"
    PERCENTILE = "percentile"


def build_engine(
    model: ModelOption = DEFAULT_MODEL,
    fp16: Annotated[bool, typer.Option("--fp16", help="Half precision.")] = False,
    int8: Annotated[
        bool,
        typer.Option("--int8", help="8 bits, half precision elsewhere; a new graph needs --calibration."),
    ] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="The float32 graph in bfloat16; with --device cpu.")] = False,
    fp32: Annotated[bool, typer.Option("--fp32", help="Single precision.")] = False,
    device: Annotated[
        DeviceName, typer.Option("--device", metavar="NAME", help="gpu: TensorRT. cpu: OpenVINO on this processor.")
    ] = DeviceName.GPU,
    decoder: Annotated[
        Decoder | None,
        typer.Option(
            "--decoder",
            metavar="FORM",
            help="Of the graph that processors run, with --device cpu: phases, differences, winograd2 or winograd4 "
            "(the default); direct: no graph of their own.",
        ),
    ] = None,
    calibration: CalibrationOption = None,
    calibration_images: Annotated[
        int, typer.Option("--calibration-images", metavar="N", min=2, help="How many of them to calibrate on.")
    ] = 256,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Another seed chooses other images.")] = 0,
    decoder_only: Annotated[
        bool, typer.Option("--decoder-only", help="INT8 in the decoder only, where most work and least risk is.")
    ] = False,
    auto: Annotated[
        bool, typer.Option("--auto", help="Search for the most INT8 that passes the gate, block by block.")
    ] = False,
    ranges: Annotated[
        RangeMethod, typer.Option("--ranges", metavar="METHOD", help="minmax, mse, entropy or percentile.")
    ] = RangeMethod.MINMAX,
    smoothing: Annotated[
        float | None,
        typer.Option(
            "--smoothing",
            metavar="A",
            callback=fraction,
            help="Strength of SmoothQuant from 0 to 1 (0.5).",
        ),
    ] = None,
    no_smoothing: Annotated[bool, typer.Option("--no-smoothing", help="Leave SmoothQuant out.")] = False,
    prompts: PromptsFileOption = None,
    min_agreement: Annotated[
        float | None,
        typer.Option(
            "--min-agreement",
            metavar="X",
            callback=fraction,
            help="Least share of cells labelled alike (FP16, BF16 0.995, INT8 0.97).",
        ),
    ] = None,
    min_iou: Annotated[
        float | None,
        typer.Option("--min-iou", metavar="X", callback=fraction, help="Least mean IoU (FP16, BF16 0.98, INT8 0.9)."),
    ] = None,
    min_cosine: Annotated[
        float | None,
        typer.Option(
            "--min-cosine", metavar="X", callback=fraction, help="Least cosine (FP16, BF16 0.999, INT8 0.98)."
        ),
    ] = None,
    sizes: Annotated[
        list[str] | None,
        typer.Option("--size", metavar="HxW", help="Image size to build, repeatable. Default: all the bundle has."),
    ] = None,
    max_batch: Annotated[int, typer.Option("--max-batch", metavar="N", min=1, help="Images at once.")] = 8,
    max_prompts: Annotated[int, typer.Option("--max-prompts", metavar="N", min=1, help="Prompts at once.")] = 256,
    workspace: Annotated[
        int | None,
        typer.Option("--workspace", metavar="MB", min=1, help="Most scratch memory a layer. Default: all there is."),
    ] = None,
    timing_cache: Annotated[
        Path | None,
        typer.Option("--timing-cache", metavar="FILE", help="What TensorRT measured before. Default: one a device."),
    ] = None,
    hardware_compatible: Annotated[
        bool, typer.Option("--hardware-compatible", help="For every GPU from Ampere on, and slower.")
    ] = False,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="For later versions of TensorRT too, and slower.")
    ] = False,
    dla: Annotated[
        bool,
        typer.Option("--dla", help="The image graph on Orin's accelerator, image by image."),
    ] = False,
    prepare_only: Annotated[
        bool, typer.Option("--prepare-only", help="Write and judge the graphs, build no engine (needs no TensorRT).")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="BUNDLE", help="Folder of the result. Default: the bundle itself."),
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Compile a model for this device, and refuse what differs too much from the original.

    Without TensorRT (or, for the CPU, OpenVINO) the graphs are prepared and judged, and the exit code is 3: copy the
    bundle to the device and run the same command there.
    """
    precision = _precision(device, fp16=fp16, int8=int8, bf16=bf16, fp32=fp32)
    if decoder_only and auto:
        raise typer.BadParameter("choose one of the two", param_hint="--decoder-only / --auto")
    if no_smoothing and smoothing is not None:
        raise typer.BadParameter("choose one of the two", param_hint="--smoothing / --no-smoothing")
    wanted = parse_sizes(sizes)
    require_extra("build", "onnx")
    from tclkit.export.build import BuildConfig
    from tclkit.export.build import build_engine as build
    from tclkit.export.engine_builder import EngineOptions
    from tclkit.export.gate_inputs import prompts_from_file

    with _usage_errors():
        config = BuildConfig(
            precision=precision,
            device=device.value,
            decoder=decoder.value if decoder else None,
            tier="auto" if auto else "decoder-only" if decoder_only else "all",
            calibration=calibration,
            calibration_images=calibration_images,
            seed=seed,
            range_method=ranges.value,
            smoothing=None if no_smoothing else 0.5 if smoothing is None else smoothing,
            sizes=tuple(wanted) if wanted else None,
            prompts=prompts_from_file(prompts) if prompts else None,
            thresholds=_thresholds(precision, min_agreement, min_iou, min_cosine),
            prepare_only=prepare_only,
            engine=EngineOptions(
                max_batch=max_batch,
                max_prompts=max_prompts,
                workspace_mb=workspace,
                timing_cache=timing_cache,
                hardware_compatible=hardware_compatible,
                version_compatible=version_compatible,
                dla=dla,
            ),
        )
    with work_display() as display:
        result = build(model, config, output=output, progress=display.phase)
    if as_json:
        print_json(_document(result))
    else:
        _show(result, precision)
    if prepare_only:
        say(f"then     on the device: the same command without --prepare-only, for {result.bundle}")
    if result.missing is not None:
        what = "nothing was compiled" if device is DeviceName.CPU else "no engine was built"
        say(f"{what}: {result.missing}. Copy {result.bundle} to the device and run the same command there")
        raise typer.Exit(EXIT_NO_TENSORRT)


@contextlib.contextmanager
def _usage_errors() -> Iterator[None]:
    """Options that contradict each other are a wrong call, whoever notices."""
    try:
        yield
    except ConfigError as error:
        raise typer.BadParameter(error.message) from error


def _precision(device: DeviceName, **wanted: bool) -> Literal["fp32", "fp16", "bf16", "int8"]:
    named = [name for name in ("fp32", "fp16", "bf16", "int8") if wanted[name]]
    if len(named) != 1:
        raise typer.BadParameter("choose one of the four", param_hint="--fp16 / --int8 / --bf16 / --fp32")
    if device is DeviceName.GPU and named == ["bf16"]:
        raise typer.BadParameter("is for processors: add --device cpu, or take --fp16", param_hint="--bf16")
    if device is DeviceName.CPU and named == ["fp16"]:
        raise typer.BadParameter("no processor computes in it: take --bf16 or --int8", param_hint="--fp16")
    return named[0]  # type: ignore[return-value]  # one of the four by its making


def _thresholds(
    precision: str, agreement: float | None, iou: float | None, cosine: float | None
) -> "GateThresholds | None":
    from tclkit.export.gates import THRESHOLDS, GateThresholds

    if agreement is None and iou is None and cosine is None:
        return None  # the precision's own
    usual = THRESHOLDS[precision]
    return GateThresholds(
        label_agreement=usual.label_agreement if agreement is None else agreement,
        mask_iou=usual.mask_iou if iou is None else iou,
        features_cosine=usual.features_cosine if cosine is None else cosine,
    )


def _show(result: "BuildResult", precision: str) -> None:
    from tclkit.runtime.files import cache_folder

    if result.verdicts:
        show_verdicts(result.verdicts, title=f"Against {result.verdicts[0].against}")
    for graph in result.graphs:
        if graph.wide:
            say(f"kept in float32, too large for half precision: {', '.join(one.node for one in graph.wide)}")
        if graph.config.decoder is not None:
            say(f"decoder  {graph.config.decoder} in the graph that processors run; that of every device is as it was")
        if graph.config.precision == "int8":
            say(f"INT8     {len(graph.layers)} layers, {graph.int8_share:.0%} of the multiplications")
        if graph.sensitivities:
            _show_search(graph.sensitivities)
    for build in result.engines:
        say(f"engine   {build.file} ({size_text(build.record.size_bytes)}, {build.record.build_s:.0f} s)")
    for record in result.records:
        say(f"compiled {record.name} for {record.identity}; kept in {cache_folder() / 'openvino'}")
    if result.verdicts:
        say(f"bundle   {result.bundle}")
        # what was only prepared is not taken unasked, and bfloat16 is nothing before it is compiled
        asked = "" if result.engines or result.records else f" --backend onnxruntime --precision {precision}"
        if not asked or precision != "bf16":
            say(f"next     tclkit segment IMAGE PROMPT... --model {shlex.quote(str(result.bundle))}{asked}")


def _show_search(sensitivities: Any) -> None:
    shown = table("block", "loss alone", "share of work", "precision", right=("loss alone", "share of work"))
    for one in sensitivities:
        shown.add_row(one.block, f"{one.loss:.1e}", f"{one.share:.1%}", "INT8" if one.chosen else "FP16")
    printer().print(shown)


def _document(result: "BuildResult") -> dict[str, Any]:
    return {
        "bundle": str(result.bundle),
        "verdicts": [asdict(verdict) | {"passed": verdict.passed} for verdict in result.verdicts],
        "graphs": [graph.describe() for graph in result.graphs],
        "engines": [asdict(build) for build in result.engines],
        "records": [asdict(record) for record in result.records],
        "missing": result.missing,
    }
