"""PAMR's time: the runtime's, without torch, against the torch reference, side by side. No test: run it by hand.

    python tests/bench/pamr.py [--repeat 7] [--prompts 1 20 150]

An image of 448 x 448 pixels has masks of 112 x 112. Both get the same image and masks, one thread, and take turns, so
that a busy machine slows both alike; the table has the medians of CPU time (and of wall-clock time). Affinities are
part of each.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import cv2
import numpy as np
import torch

from tclkit.runtime.pamr import refine_masks
from tclkit.tcl import pamr as reference

_IMAGE_PX, _GRID = 448, 112


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """CPU and wall-clock milliseconds of one call."""
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    return (time.process_time() - cpu) * 1000, (time.perf_counter() - wall) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=7, help="turns of each")
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 20, 150], help="numbers of masks")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    rng = np.random.default_rng(0)
    picture = cv2.GaussianBlur(rng.random((_IMAGE_PX, _IMAGE_PX, 3), np.float32), (0, 0), 6)
    image_hwc = cv2.resize(picture, (_GRID, _GRID), interpolation=cv2.INTER_AREA)
    image_BCHW = torch.from_numpy(np.ascontiguousarray(image_hwc.transpose(2, 0, 1)))[None]
    print("| prompts | runtime ms | torch reference ms | torch sparse ms | reference / runtime | largest difference |")
    print("|---|---|---|---|---|---|")
    for count in options.prompts:
        masks = rng.random((count, _GRID, _GRID), np.float32)
        masks_BNHW = torch.from_numpy(masks)[None]
        runs: dict[str, Callable[[], object]] = {
            "runtime": lambda masks=masks: refine_masks(image_hwc, masks),
            "reference": lambda masks=masks_BNHW: reference.refine_masks(image_BCHW, masks),
            "sparse": lambda masks=masks_BNHW: reference.refine_many_masks(image_BCHW[0], masks[0]),
        }
        difference = np.abs(refine_masks(image_hwc, masks) - reference.refine_masks(image_BCHW, masks_BNHW)[0].numpy())
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        for run in runs.values():
            run()
        for _ in range(options.repeat):
            for name, run in runs.items():
                times[name].append(timed(run))
        cpu, wall = (
            {name: statistics.median(pair[which] for pair in pairs) for name, pairs in times.items()}
            for which in (0, 1)
        )
        cells = [f"{cpu[name]:.1f} ({wall[name]:.1f})" for name in runs]
        ratio = cpu["reference"] / cpu["runtime"]
        print(f"| {count} | {' | '.join(cells)} | {ratio:.1f} | {difference.max():.1e} |")


if __name__ == "__main__":
    main()
