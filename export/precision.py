"""From the float32 image graph to one in FP16 or INT8, by what the calibration images say of its values.

The float32 graph may be one whose decoder was rewritten for processors; then that is a graph to install, too.

FP16: values that come near half precision's largest number keep their neighbourhood in float32. INT8: channels are
balanced, ranges measured, layers chosen, Q/DQ pairs put before them, and all the rest becomes FP16.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from tclkit.calib.activations import absolute_maxima, activation_ranges, float_tensor_maxima
from tclkit.runtime.errors import ExportError

from .decoder import DecoderForm
from .gates import GateFigures, GateThresholds
from .graph_edit import with_float_weights
from .graph_rules import check_graph
from .half_graph import WideTensor, half_graph, wide_tensors
from .layers import Layer, quantizable_layers
from .mixed_precision import BlockSensitivity, choose_layers
from .quantized_graph import quantized_graph
from .smoothing import input_channel_axis, smooth

_SEARCH_RESERVE = 0.3  # of the loss that the gate allows: it judges on other images than the search
Progress = Callable[[str, int, int], None]
GraphJudge = Callable[[onnx.ModelProto], GateFigures]
"""Figures of a graph against the float32 one, on some of the calibration images."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionConfig:
    """How a graph is made; see `BuildConfig`. `decoder`: form that its decoder was rewritten in; None: as exported."""

    precision: Literal["fp32", "fp16", "int8"]
    tier: Literal["all", "decoder-only", "auto"] = "all"
    range_method: Literal["mse", "entropy", "minmax", "percentile"] = "minmax"
    smoothing: float | None = 0.5
    decoder: DecoderForm | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedGraph:
    """A graph ready to be judged and installed.

    model: of opset 20, strongly typed. config: how it was made.
    wide: tensors kept in float32 because of their values. layers: names of those in INT8.
    int8_share: their share of all layers' multiplications, in 0..1. sensitivities: of the search, if there was one.
    smoothed: names of those whose channels were balanced. smoothed_share: of the INT8 layers' multiplications, in 0..1.
    """

    model: onnx.ModelProto
    config: PrecisionConfig
    wide: Sequence[WideTensor]
    layers: Sequence[str]
    int8_share: float
    sensitivities: Sequence[BlockSensitivity]
    smoothed: Sequence[str] = ()
    smoothed_share: float = 0.0

    def describe(self) -> dict[str, Any]:
        """Plain values for bundle.json."""
        made: dict[str, Any] = {
            "kept_in_float32": [
                {"tensor": one.tensor, "node": one.node, "largest": float(np.nan_to_num(one.largest))}
                for one in self.wide
            ]
        }
        if self.config.precision == "int8":
            made |= {
                "tier": self.config.tier,
                "range_method": self.config.range_method,
                "smoothing": self.config.smoothing,  # the strength asked for; what it reached follows
                "smoothed_layers": list(self.smoothed),
                "smoothed_share": self.smoothed_share,
                "int8_layers": list(self.layers),
                "int8_share": self.int8_share,
            }
        if self.config.decoder is not None:
            made |= {"decoder": self.config.decoder}
        if self.sensitivities:
            made["sensitivities"] = {one.block: one.loss for one in self.sensitivities}
        return made


def prepare_graph(
    model: onnx.ModelProto,
    config: PrecisionConfig,
    images: Iterable[NDArray[np.uint8]],
    *,
    content_hash: str | None,
    judge: GraphJudge,
    thresholds: GateThresholds,
    progress: Progress,
) -> PreparedGraph:
    """Make the graph of a precision.

    Args:
        model: float32 image graph, its decoder in the form that `config` says; not changed.
        config: how; for "fp32" the graph is taken as it is, with float32 weights.
        images: batches (B, H, W, 3) uint8 to measure values on; read several times.
        content_hash: of the images, under which ranges are kept for the next build; None keeps nothing.
        judge: for the search of `tier` "auto".
        thresholds: what that search has to reach.
        progress: called as progress(what, done, in_all).

    Raises:
        ExportError: the result is not what the runtimes we target read, or there is nothing to quantise.
    """
    source = with_float_weights(model)
    if config.precision == "fp32":
        prepared = PreparedGraph(model=source, config=config, wide=(), layers=(), int8_share=0.0, sensitivities=())
    elif config.precision == "fp16":
        wide = wide_tensors(source, float_tensor_maxima(source, images, content_hash=content_hash, progress=progress))
        made = half_graph(source, wide={one.tensor for one in wide})
        prepared = PreparedGraph(model=made, config=config, wide=wide, layers=(), int8_share=0.0, sensitivities=())
    else:
        prepared = _prepared_int8(source, config, images, content_hash, judge, thresholds, progress)
    check_graph(prepared.model, where=f"tclkit made a {config.precision} graph")
    return prepared


def _prepared_int8(
    source: onnx.ModelProto,
    config: PrecisionConfig,
    images: Iterable[NDArray[np.uint8]],
    content_hash: str | None,
    judge: GraphJudge,
    thresholds: GateThresholds,
    progress: Progress,
) -> PreparedGraph:
    every = quantizable_layers(source)
    layers = [layer for layer in every if layer.is_decoder or config.tier != "decoder-only"]
    if not layers:
        raise ExportError("the image graph has no layer to quantise: it is not one that tclkit export wrote")
    activations = sorted({layer.activation for layer in layers})
    smoothed, balanced = source, list[Layer]()
    if config.smoothing is not None:
        axes = {layer.activation: input_channel_axis(source, layer) for layer in layers}
        maxima = absolute_maxima(
            source, activations, images, channel_axis=axes, content_hash=content_hash, progress=progress
        )
        smoothed, balanced = smooth(source, layers, maxima, strength=config.smoothing)
    largest = float_tensor_maxima(smoothed, images, content_hash=content_hash, progress=progress)
    wide = wide_tensors(smoothed, largest)
    ranges = activation_ranges(
        smoothed, activations, images, method=config.range_method, content_hash=content_hash, progress=progress
    )

    def finished(choice: Sequence[Layer]) -> onnx.ModelProto:
        return half_graph(quantized_graph(smoothed, choice, ranges), wide={one.tensor for one in wide})

    sensitivities: list[BlockSensitivity] = []
    if config.tier == "auto":
        aim = thresholds.with_reserve(_SEARCH_RESERVE)
        layers, sensitivities = choose_layers(layers, lambda choice: judge(finished(choice)), aim, progress=progress)
        if not layers:
            raise ExportError(
                "no block can be INT8 within the gate's thresholds: each alone fails. Take --fp16, give more images of "
                "your own kind (--calibration), or lower a threshold (--min-agreement, --min-iou, --min-cosine)"
            )
    made = finished(layers)
    reached = [layer for layer in layers if layer in balanced]
    return PreparedGraph(
        model=made,
        config=config,
        wide=wide,
        layers=[layer.name for layer in layers],
        int8_share=_multiplications(layers) / max(1, _multiplications(every)),
        sensitivities=sensitivities,
        smoothed=[layer.name for layer in reached],
        smoothed_share=_multiplications(reached) / max(1, _multiplications(layers)),
    )


def _multiplications(layers: Iterable[Layer]) -> int:
    return sum(layer.multiplications for layer in layers)
