"""A simulator of TensorRT and of the CUDA runtime, for tests on machines that have neither.

It imitates the Python API of four versions (`VERSIONS`) as far as tclkit and Polygraphy use it, runs the parsed ONNX
with ONNX Runtime on host memory, and enforces the rules that a real TensorRT enforces or asks for. What passes here
calls real names with real parameters and keeps those rules; that it runs on a GPU only a GPU can show.

    def test_something(tensorrt_simulator):
        simulator = tensorrt_simulator("10.3.0", compute_capability=(8, 7), device_name="Orin")
        import tensorrt                              # the simulator, until the test ends
        from cuda.bindings import runtime as cudart  # likewise
        ...
        assert simulator.leaks() == []

The fixture fails a test that leaves `simulator.faults`: use after free, one execution context enqueued twice at once.
"""

from .api import VERSIONS, load_api
from .operators import violations
from .simulator import Simulator

__all__ = ["VERSIONS", "Simulator", "load_api", "violations"]
