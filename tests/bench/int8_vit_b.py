"""What INT8 costs on a model of ViT-B/16's size: a table of variants, and calibration's time and memory.

The weights are random, with channels far larger than the others planted in the norms and in the residual stream, as
trained transformers have them; so the figures say which method copes better, not what a trained model loses.

    python tests/bench/int8_vit_b.py --folder /tmp/vit-b                       # the table
    python tests/bench/int8_vit_b.py --folder /tmp/vit-b --memory 64 512       # calibration's peak memory and time
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

VARIANTS: dict[str, dict[str, Any]] = {
    "FP16": {"precision": "fp16"},
    "INT8 plain (minmax, no smoothing)": {"precision": "int8", "range_method": "minmax", "smoothing": None},
    "INT8 mse, no smoothing": {"precision": "int8", "range_method": "mse", "smoothing": None},
    "INT8 minmax, SmoothQuant": {"precision": "int8", "range_method": "minmax"},
    "INT8 percentile, SmoothQuant": {"precision": "int8", "range_method": "percentile"},
    "INT8 entropy, SmoothQuant": {"precision": "int8", "range_method": "entropy"},
    "INT8 mse, SmoothQuant": {"precision": "int8", "range_method": "mse"},
    "INT8 decoder only": {"precision": "int8", "range_method": "mse", "tier": "decoder-only"},
    "INT8 SmoothQuant, auto": {"precision": "int8", "tier": "auto"},
}
_OUTLIERS, _NORM_GAIN, _RESIDUAL_OFFSET = 6, 20.0, 15.0


def write_model(folder: Path, size: int) -> Path:
    """Write the bundle of a randomly initialised TCL of ViT-B/16's layout (a text tower of one layer) with outliers."""
    import torch

    from tclkit.export import export_bundle
    from tclkit.tcl import TCL, ClipConfig, TCLConfig, save_checkpoint

    torch.manual_seed(0)
    clip = ClipConfig(
        embed_dim=512,
        image_size=224,
        patch_size=16,
        vision_width=768,
        vision_layers=12,
        text_width=512,
        text_heads=8,
        text_layers=1,
        quick_gelu=True,
    )
    model = TCL(TCLConfig(clip=clip))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(1.5)
        model.grounder.open_gates(0.5)
        blocks = [*model.clip.visual.transformer.resblocks, model.grounder.block]
        for i, block in enumerate(blocks):
            channels = torch.from_numpy(np.random.default_rng(i).choice(768, _OUTLIERS, replace=False))
            for norm in (block.ln_1, block.ln_2):
                norm.weight[channels] *= _NORM_GAIN
            block.mlp.c_proj.bias[channels] += _RESIDUAL_OFFSET
    checkpoint = folder / "tcl.pt"
    save_checkpoint(checkpoint, model)
    return export_bundle(checkpoint, folder / "bundle", sizes=[(size, size)], name="vit-b-random")


def write_scenes(folder: Path, count: int, size: int) -> Path:
    """Write scenes of the synthetic world as PNG files."""
    from tclkit.tcl.world import WorldConfig, scenes

    images = folder / "scenes"
    images.mkdir(parents=True, exist_ok=True)
    for i, scene in enumerate(scenes(WorldConfig(size=size, seed=4), count=count)):
        path = images / f"{i:05d}.png"
        if not path.exists():
            cv2.imwrite(str(path), scene.image[..., ::-1])
    return images


def compare(bundle: Path, images: Path, count: int, names: list[str]) -> Iterator[dict[str, Any]]:
    """Build every variant past a gate that lets all through, and yield what it measured on held-back images."""
    from tclkit.export.build import BuildConfig, build_engine
    from tclkit.export.gates import GateThresholds

    open_gate = GateThresholds(label_agreement=0, mask_iou=0, features_cosine=0)
    for name in names:
        variant = VARIANTS[name]
        thresholds = None if variant.get("tier") == "auto" else open_gate
        began = time.perf_counter()
        config = BuildConfig(
            calibration=str(images), calibration_images=count, thresholds=thresholds, prepare_only=True, **variant
        )
        result = build_engine(bundle, config, output=bundle.parent / "variants" / str(list(VARIANTS).index(name)))
        figures, graph = result.verdicts[0].figures, result.graphs[0]
        yield {
            "variant": name,
            "label_agreement": round(figures.label_agreement, 4),
            "mask_iou": round(figures.mask_iou, 4),
            "cosine": round(figures.features_cosine, 5),
            "int8_share": round(graph.int8_share, 3),
            "seconds": round(time.perf_counter() - began),
        }


def measure_memory(bundle: Path, images: Path, count: int) -> dict[str, Any]:
    """Calibrate on `count` images in a process of its own; its peak memory and time."""
    code = (
        "import resource, sys, time, json, onnx\n"
        "from pathlib import Path\n"
        "from tclkit.calib import select_images, activation_ranges\n"
        "from tclkit.export.layers import quantizable_layers\n"
        "bundle, images, count = sys.argv[1], sys.argv[2], int(sys.argv[3])\n"
        "model = onnx.load(bundle + '/image.onnx')\n"
        "size = json.loads(Path(bundle, 'bundle.json').read_text())['images'][0]\n"
        "began = time.perf_counter()\n"
        "chosen = select_images(images, size=(size['height'], size['width']), count=count, batch_size=1)\n"
        "tensors = sorted({layer.activation for layer in quantizable_layers(model)})\n"
        "activation_ranges(model, tensors, chosen.calibration)\n"
        "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "print(json.dumps({'images': chosen.calibration.images, 'tensors': len(tensors), 'peak_mib': round(peak),\n"
        "                  'seconds': round(time.perf_counter() - began)}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(bundle), str(images), str(count)], check=True, capture_output=True, text=True
    )
    return dict(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the model, the images and the variants")
    parser.add_argument("--size", type=int, default=224, help="pixels a side of the image graph")
    parser.add_argument("--images", type=int, default=16, help="to calibrate on")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), help="which rows of the table")
    parser.add_argument("--memory", type=int, nargs="*", default=[], help="measure calibration on this many images")
    arguments = parser.parse_args()
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    bundle = folder / "bundle" if (folder / "bundle").exists() else write_model(folder, arguments.size)
    images = write_scenes(folder, max([arguments.images, *arguments.memory]) + 40, arguments.size)
    rows = (
        (measure_memory(bundle, images, count) for count in arguments.memory)
        if arguments.memory
        else compare(bundle, images, arguments.images, arguments.variants)
    )
    for row in rows:
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
