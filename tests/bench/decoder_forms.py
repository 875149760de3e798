"""The forms of the decoder beside each other: one block, and the whole image graph of ViT-B/16's layout.

Weights are random, so times are right and errors are those of rounding; labels are of 20 random prompts, kp 0.3. Rounds
are interleaved. INT8 is Q/DQ by tclkit's own pass with ranges of the very input, for speed: accuracy is the gate's
business. Each row runs in OpenVINO with the precision hint named, or in ONNX Runtime in float32.

    python tests/bench/decoder_forms.py --folder /tmp/forms --grid 28                   # one block, 28 -> 56
    python tests/bench/decoder_forms.py --folder /tmp/forms --size 448                  # the image graph
    python tests/bench/decoder_forms.py --folder /tmp/forms --grid 28 --int8 --runtimes bf16 --forms direct winograd4
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch.export import Dim

from tclkit.export import decoder_graph
from tclkit.export.decoder import DECODER_FORMS, DIFFERENCES, TileScheme
from tclkit.export.onnx_graphs import write_graph, write_image_graph
from tclkit.export.wrapper import ImageGraph, MasksGraph, _UpsamplingBlock
from tclkit.tcl import TCL, ClipConfig, TCLConfig
from tclkit.tcl.grounder import UpsamplingBlock

RUNTIMES = ("ort", "f32", "bf16")
SMALL_DIFFERENCES = TileScheme(
    sums=DIFFERENCES.sums,
    reads=(0, 1, 2),
    taps=((-1, 0, 0), (1, 1, 1), (0, 0, 1)),
    outputs=(((1, 1, 0), (0, 1, 1)),),
    steady=1,
    stride=1,
    repeats=(1, 1),
)
"""3 products for 2 outputs of a repeated map, one pixel before the repetition a tile: tried, not offered."""
Run = Callable[[], list[NDArray[np.float32]]]


def write_block(path: Path, width: int, grid: int) -> None:
    """Write one block in the direct form."""
    torch.manual_seed(0)
    block = UpsamplingBlock(width).requires_grad_(False)
    for name, parameter in block.named_parameters():
        if name.endswith("gate.gate"):
            parameter.fill_(0.5)
    example = torch.zeros(2, grid, grid, width)
    module = _UpsamplingBlock(block).requires_grad_(False).eval()
    write_graph(module, path, {"x": example}, ["y"], ({0: Dim("batch")},))


def rewritten(direct: Path, form: str) -> Path:
    """The graph in another form; the direct one is named "-direct.onnx"."""
    path = direct.with_name(direct.name.replace("-direct", f"-{form}"))
    if not path.exists():
        is_small = form == "differences1"
        scheme = SMALL_DIFFERENCES if is_small else DIFFERENCES
        with mock.patch.object(decoder_graph, "DIFFERENCES", scheme):
            made = decoder_graph.rewrite_decoder(onnx.load(direct), "differences" if is_small else form)  # type: ignore[arg-type]
        onnx.save(made, path)
    return path


def vit_b_model() -> TCL:
    """A randomly initialised TCL of ViT-B/16's layout with every gate half open."""
    torch.manual_seed(0)
    layout = {"embed_dim": 512, "image_size": 224, "patch_size": 16, "vision_width": 768, "vision_layers": 12}
    text = {"text_width": 512, "text_heads": 8, "text_layers": 1, "quick_gelu": True}
    model = TCL(TCLConfig(clip=ClipConfig(**{**layout, **text})))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(1.5)
        model.grounder.open_gates(0.5)
    return model


def write_int8(source: Path, feeds: dict[str, NDArray[Any]]) -> Path:
    """The graph with Q/DQ pairs at every layer that may have them, ranges the largest values on this very input."""
    import onnxruntime
    from onnx import helper

    from tclkit.export.layers import quantizable_layers
    from tclkit.export.quantized_graph import quantized_graph

    path = source.with_suffix(".int8.onnx")
    if path.exists():
        return path
    model, opened = onnx.load(source), onnx.load(source)
    layers = quantizable_layers(model)
    inner = sorted({layer.activation for layer in layers} - set(feeds))
    opened.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in inner)
    session = onnxruntime.InferenceSession(opened.SerializeToString(), providers=["CPUExecutionProvider"])
    ranges = {name: float(np.abs(values).max()) for name, values in zip(inner, session.run(inner, feeds), strict=True)}
    onnx.save(quantized_graph(model, layers, ranges), path)
    return path


def scenes(count: int, size: int, seed: int) -> NDArray[np.uint8]:
    from tclkit.tcl.world import WorldConfig, scenes

    return np.stack([scene.image for scene in scenes(WorldConfig(size=size, seed=seed), count=count)])


def runner(path: Path, runtime: str, feeds: dict[str, NDArray[Any]], threads: int) -> Run:
    if runtime == "ort":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return lambda: list(session.run(None, feeds))
    import openvino

    hints = {"INFERENCE_PRECISION_HINT": runtime, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    model = openvino.Core().read_model(path)
    model.reshape({name: openvino.PartialShape(list(value.shape)) for name, value in feeds.items()})
    request = openvino.Core().compile_model(model, "CPU", hints).create_infer_request()
    return lambda: [np.array(value) for value in request.infer(feeds).values()]


def compare(
    runs: dict[str, Run], rounds: int, judge: Callable[[list[NDArray[np.float32]]], dict[str, float]]
) -> Iterator[dict[str, Any]]:
    """Time every run in turn; the first is what the others are compared with."""
    figures = {name: judge(run()) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - began))
    for name, taken in times.items():
        first = statistics.median(times[next(iter(times))])
        median = statistics.median(taken)
        yield {
            "run": name,
            "median_ms": round(median, 1),
            "least_ms": round(min(taken), 1),
            "times_faster": round(first / median, 2),
            **figures[name],
        }


def gflop(path: Path) -> float:
    """Of products of matrices and convolutions with constant weights."""
    from tclkit.export.layers import quantizable_layers

    return round(2 * sum(layer.multiplications for layer in quantizable_layers(onnx.load(path))) / 1e9, 1)


def judge_block() -> Callable[[list[NDArray[np.float32]]], dict[str, float]]:
    reference: list[NDArray[np.float32]] = []

    def judged(outputs: list[NDArray[np.float32]]) -> dict[str, float]:
        reference.extend(outputs[: not reference])
        error = outputs[0] - reference[0]
        relative = float(np.sqrt(np.square(error).mean() / np.square(reference[0]).mean()))
        return {"largest_error": float(f"{np.abs(error).max():.1e}"), "relative_error": float(f"{relative:.1e}")}

    return judged


def judge_model() -> Callable[[list[NDArray[np.float32]]], dict[str, float]]:
    masks = MasksGraph(vit_b_model())
    text = torch.nn.functional.normalize(torch.randn(20, 512, generator=torch.Generator().manual_seed(1)), dim=1)
    reference: list[tuple[torch.Tensor, torch.Tensor]] = []

    def judged(outputs: list[NDArray[np.float32]]) -> dict[str, float]:
        grounded, kp = (torch.from_numpy(output) for output in outputs)
        labels = masks(grounded, text, kp, torch.tensor(0.3)).argmax(1)
        reference.extend([(grounded, labels)][: not reference])
        agreement = (labels == reference[0][1]).float().mean().item()
        cosine = (grounded * reference[0][0]).sum(1).mean().item()
        return {"label_agreement": round(agreement, 5), "cosine": round(cosine, 6)}

    return judged


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the graphs; those that are there are taken")
    parser.add_argument("--grid", type=int, help="time one block from this grid")
    parser.add_argument("--width", type=int, default=768, help="channels of the block")
    parser.add_argument("--size", type=int, help="time the image graph at this many pixels a side")
    parser.add_argument("--forms", nargs="*", default=list(DECODER_FORMS), help="the first is compared with")
    parser.add_argument("--runtimes", nargs="*", default=list(RUNTIMES), choices=RUNTIMES)
    parser.add_argument("--int8", action="store_true", help="INT8 graphs beside the others")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write-only", action="store_true", help="write the graphs and time nothing")
    arguments = parser.parse_args()
    folder, size, grid = arguments.folder, arguments.size, arguments.grid
    folder.mkdir(parents=True, exist_ok=True)
    direct = folder / (f"image-{size}-direct.onnx" if size else f"block-{grid}-{arguments.width}-direct.onnx")
    if not direct.exists():
        if size:
            write_image_graph(ImageGraph(vit_b_model(), (size, size)), direct)
        else:
            write_block(direct, arguments.width, grid)
    graphs = {form: rewritten(direct, form) for form in arguments.forms}
    image = scenes(1, size, seed=9) if size else None
    block = np.random.default_rng(0).standard_normal((1, grid or 1, grid or 1, arguments.width)).astype(np.float32)
    feeds: dict[str, NDArray[Any]] = {"x": block} if image is None else {"image": image}
    if arguments.int8:
        graphs |= {f"{form} int8": write_int8(path, feeds) for form, path in graphs.items()}
    print(json.dumps({"gflop": {form: gflop(path) for form, path in graphs.items() if "int8" not in form}}), flush=True)
    if arguments.write_only:
        return
    runs = {
        f"{runtime} {form}": runner(path, runtime, feeds, arguments.threads)
        for runtime in arguments.runtimes
        for form, path in graphs.items()
    }
    for row in compare(runs, arguments.rounds, judge_model() if size else judge_block()):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
