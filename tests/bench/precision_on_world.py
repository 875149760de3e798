"""What each precision costs on the synthetic world: mIoU on unseen scenes, for prepared bundles.

    tclkit build-engine --fp16 --calibration scenes/ --prepare-only -o bundles/fp16      # and so on, then
    python tests/bench/precision_on_world.py bundles/fp16:fp32 bundles/fp16:fp16 bundles/int8:int8 --scenes 512

Half precision is emulated as the gate does it: every tensor rounded. Prompts are the objects in the scene; labels are
those of `tclkit segment`, at the bundle's own threshold, without PAMR.
"""

import argparse
import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import onnx

from tclkit.calib import count_pixels, iou_from_confusion, mean_iou
from tclkit.export.graph_runner import GraphRunner
from tclkit.runtime import Segmenter, open_bundle
from tclkit.runtime.onnxruntime_backend import OnnxRuntimeBackend
from tclkit.runtime.text_cache import TextCache
from tclkit.tcl.world import OBJECT_NAMES, Scene, WorldConfig, scenes

_SEED = 5_000_011  # neither training, nor threshold choice, nor the evaluation of docs/tcl-shapes.md draws these


class EmulatedBackend(GraphRunner):
    """A prepared graph as a backend for the Segmenter, half precision rounded in the open."""

    reason = "bench"

    def __init__(self, folder: Path, precision: str) -> None:
        bundle = open_bundle(folder)
        self._exact, self.precision = OnnxRuntimeBackend(bundle), precision
        file = bundle.manifest.images[0].files[precision]
        super().__init__(onnx.load(bundle.path(file)), self._exact)

    def encode_text(self, token_ids_ML: np.ndarray) -> np.ndarray:
        return self._exact.encode_text(token_ids_ML)

    def close(self) -> None:
        self._exact.close()


@dataclass
class Candidate:
    """One bundle in one precision, and what it scored so far."""

    name: str
    segmenter: Segmenter
    confusion: np.ndarray
    same: int = 0


def label_map(segmenter: Segmenter, scene: Scene) -> np.ndarray:
    names = [OBJECT_NAMES[index] for index in scene.present]
    found = segmenter(scene.image, names).label_map
    lookup = np.array([*scene.present, len(OBJECT_NAMES)])  # -1, the background, is the last
    return np.asarray(lookup[found])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", metavar="FOLDER:PRECISION", help="the first is what others are held to")
    parser.add_argument("--scenes", type=int, default=512)
    arguments = parser.parse_args()
    classes = len(OBJECT_NAMES) + 1
    candidates = []
    for text in arguments.bundles:
        folder, _, precision = text.rpartition(":")
        backend = EmulatedBackend(Path(folder), precision)
        segmenter = Segmenter(open_bundle(folder), backend, cache=TextCache())
        candidates.append(Candidate(text, segmenter, np.zeros((classes, classes), np.int64)))
    for scene in islice(scenes(WorldConfig(size=128, seed=_SEED)), arguments.scenes):
        truth = np.where(scene.label_map < 0, classes - 1, scene.label_map)
        reference = None
        for candidate in candidates:
            found = label_map(candidate.segmenter, scene)
            reference = found if reference is None else reference
            candidate.confusion += count_pixels(found, truth, classes)[:-1]
            candidate.same += int((found == reference).sum())
    pixels = arguments.scenes * 128 * 128
    for candidate in candidates:
        row = {
            "bundle": candidate.name,
            "miou": round(float(mean_iou(candidate.confusion)) * 100, 2),
            "background_iou": round(float(iou_from_confusion(candidate.confusion)[-1]) * 100, 2),
            "agreement": round(candidate.same / pixels, 4),
        }
        print(json.dumps(row))


if __name__ == "__main__":
    main()
