"""Where OpenVINO spends an image graph's time on this processor, by kind of operator and kernel: a table in Markdown.

    python tests/bench/operators.py BUNDLE --precision bf16

The graph is compiled as the backend compiles it, with OpenVINO's profiler on, which costs some percent. Means of the
runs after the first, at the bundle's first image size.
"""

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import openvino

from tclkit.runtime import open_bundle
from tclkit.runtime.bfloat16_weights import round_weights
from tclkit.runtime.bundle import Bundle
from tclkit.runtime.cpu_records import graph_file
from tclkit.runtime.openvino_backend import CPU_PRECISIONS, openvino_core
from tclkit.runtime.processor import usable_cpus


def profiled(bundle: Bundle, precision: str, runs: int) -> dict[tuple[str, str], tuple[int, float]]:
    """Nodes and milliseconds by (kind of operator, kernel), of one image."""
    core = openvino_core()
    size = bundle.manifest.images[0].size
    file = graph_file(bundle, precision, size)
    assert file is not None, f"{bundle.name} has no graph for {precision}"
    model = core.read_model(bundle.path(file))
    model.reshape({model.inputs[0]: openvino.PartialShape([1, *size, 3])})
    hint = "f32" if precision == "fp32" else "bf16"
    if hint == "bf16":
        round_weights(model)
    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": usable_cpus()}
    request = core.compile_model(model, "CPU", options | {"PERF_COUNT": True}).create_infer_request()
    image = np.random.default_rng(0).integers(0, 256, (1, *size, 3), dtype=np.uint8)
    nodes: dict[tuple[str, str], int] = defaultdict(int)
    total_ms: dict[tuple[str, str], float] = defaultdict(float)
    for run in range(runs + 1):
        request.infer({"image": image})
        for node in request.get_profiling_info() if run else []:
            if node.status == node.Status.EXECUTED:
                kind = node.node_type, node.exec_type
                nodes[kind] += 1
                total_ms[kind] += node.real_time.total_seconds() * 1000
    return {kind: (nodes[kind] // runs, total_ms[kind] / runs) for kind in nodes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--precision", choices=CPU_PRECISIONS, default="fp32")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--most", type=int, default=12, help="rows; the others are summed in one")
    arguments = parser.parse_args()
    found = profiled(open_bundle(arguments.bundle), arguments.precision, arguments.runs)
    rows = sorted(found.items(), key=lambda row: row[1][1], reverse=True)
    whole = sum(ms for _, ms in found.values())
    print("| operator | kernel | nodes | ms | share |\n|---|---|---|---|---|")
    for (operator, kernel), (count, ms) in rows[: arguments.most]:
        print(f"| {operator} | {kernel} | {count} | {ms:.1f} | {ms / whole:.1%} |")
    rest = [row for _, row in rows[arguments.most :]]
    print(f"| others | | {sum(count for count, _ in rest)} | {sum(ms for _, ms in rest):.1f} | |")
    print(f"| **all** | | | **{whole:.1f}** | |")


if __name__ == "__main__":
    main()
