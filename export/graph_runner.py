"""An image graph run by ONNX Runtime for the gate, with half precision as a GPU would store it."""

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from tclkit.runtime.backends import Features, HostFeatures
from tclkit.runtime.onnxruntime_backend import OnnxRuntimeBackend

from .rounded_graph import rounded_graph


class GraphRunner:
    """Runs a candidate image graph; masks come from a bundle's own masks graph.

    Args:
        graph: a graph whose half-precision tensors are rounded, or the file of a float32 one, which is run as it is:
            copies of its weights would cost gigabytes.
        bundle_backend: of the bundle.
    """

    def __init__(self, graph: onnx.ModelProto | Path, bundle_backend: OnnxRuntimeBackend) -> None:
        import onnxruntime

        self.name = "ONNX Runtime on the CPU"
        source: str | bytes = str(graph)
        if isinstance(graph, onnx.ModelProto):
            self.name += ", half precision emulated"
            source = rounded_graph(graph).SerializeToString()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = bundle_backend.threads
        # The level beyond fuses operators across the rounding between them.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        self._session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        self._names = [output.name for output in self._session.get_outputs()]
        self._backend = bundle_backend

    def image_features(self, images_BHWC: NDArray[np.uint8]) -> Features:
        """See `Backend.image_features`."""
        outputs = dict(zip(self._names, self._session.run(self._names, {"image": images_BHWC}), strict=True))
        return HostFeatures(grounded=outputs["grounded"], kp=outputs.get("kp"))

    def masks(self, features: Features, text_ND: NDArray[np.float32], kp_w: float) -> NDArray[np.float32]:
        """See `Backend.masks`."""
        return self._backend.masks(features, text_ND, kp_w)
