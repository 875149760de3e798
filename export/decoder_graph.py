"""The decoder of an exported image graph in another form, without torch: devices derive their own."""

from typing import TYPE_CHECKING

import onnx

if TYPE_CHECKING:
    from .decoder import DecoderForm


def rewrite_decoder(model: onnx.ModelProto, form: "DecoderForm") -> onnx.ModelProto:
    """Write the decoder of a float32 image graph in another form that computes the same; see decoder.py.

    Args:
        model: float32 image graph with the direct decoder, as `tclkit export` writes it; weights may be stored as
            float16 behind a Cast. It is not changed.
        form: what to write; "direct" gives a copy.

    Returns:
        A new graph with the same inputs and outputs. Weights are folded in float64 and stored as float32.

    Raises:
        ConfigError: unknown form.
        ExportError: the graph has no decoder in the direct form: it is another graph, in another precision, or its
            decoder was rewritten before.
    """
    raise NotImplementedError(form)
