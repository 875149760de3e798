"""What the losses over all pairs cost, direct and in tiles: peak memory and time of forward + backward.

Every figure comes from a process of its own; its memory is the peak of the resident set above what it was once the
inputs stood. The forms take turns, so that a machine that slows down slows both. The tiled form's own gradient of the
embedding is in its figure, as it is in the direct form's.

    python tests/bench/tiled_loss.py                                    # the whole table, about an hour on two cores
    python tests/bench/tiled_loss.py --images 4 --texts 8 16 --grid 8 --width 32 --rounds 1
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

_GIB = 2**30
_DIRECT = 0


def measure(images: int, texts: int, grid: int, width: int, tile: int, threads: int, repeats: int) -> None:
    """Run one form in this process and print its figures; tile 0 is the direct form."""
    import resource

    import torch
    import torch.nn.functional as F

    from tclkit.tcl.losses import contrastive_loss, mean_areas, pooled_similarity, total_variation
    from tclkit.tcl.model import similarity
    from tclkit.tcl.tiled_losses import pair_statistics

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    embedding = torch.randn(images, grid, grid, width).permute(0, 3, 1, 2).requires_grad_()  # as the grounder lays it
    text = F.normalize(torch.randn(texts, width), dim=-1)
    scale, shift, temperature = (torch.tensor(value, requires_grad=True) for value in (10.0, -2.5, 2.66))

    def step() -> None:
        embedding.grad = None
        if tile == _DIRECT:
            masks = torch.sigmoid(similarity(embedding, text) * scale + shift)
            area = masks.mean(dim=(2, 3))
            pooled, variation = pooled_similarity(embedding, masks, text), total_variation(masks)
            del masks
        else:
            found = pair_statistics(embedding, text, text.unsqueeze(0), scale, shift, tile=tile)
            pooled, area, variation = found.similarity_KBN[0], found.area_BN, found.variation_BN.mean()
        own, others = mean_areas(area)
        total = contrastive_loss(pooled, temperature) + (own - 0.4).abs() + others + variation
        total.backward()

    small = F.normalize(torch.randn(2, width, 4, 4), dim=1).requires_grad_()
    similarity(small, text[:2]).sum().backward()  # wakes the threads and libraries
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"gib": (peak - before) * 1024 / _GIB, "seconds": seconds}))


def run_apart(arguments: argparse.Namespace, texts: int, tile: int) -> dict[str, object]:
    values = [arguments.images, texts, arguments.grid, arguments.width, tile, arguments.threads, arguments.repeats]
    command = [sys.executable, __file__, "--measure", *map(str, values)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def table(arguments: argparse.Namespace) -> None:
    print(f"B = {arguments.images}, grid {arguments.grid} x {arguments.grid}, width {arguments.width}, fp32,")
    print(f"{arguments.threads} threads, tile {arguments.tile}, {arguments.rounds} rounds of {arguments.repeats}\n")
    print(f"{'texts':>6} {'direct GiB':>11} {'tiled GiB':>10} {'ratio':>6} {'direct s':>9} {'tiled s':>8} {'ratio':>6}")
    gib_a_text = 0.0
    for texts in arguments.texts:
        forms = [_DIRECT, arguments.tile]
        expected = gib_a_text * texts
        if expected > arguments.limit_gib:
            forms.remove(_DIRECT)
        figures: dict[int, list[dict[str, object]]] = {form: [] for form in forms}
        for _ in range(arguments.rounds):
            for form in forms:
                figures[form].append(run_apart(arguments, texts, form))
        gib = {form: max(float(str(row["gib"])) for row in rows) for form, rows in figures.items()}
        seconds = {
            form: statistics.median(value for row in rows for value in list(row["seconds"]))  # type: ignore[call-overload]
            for form, rows in figures.items()
        }
        tiled = f"{gib[arguments.tile]:10.3f}", f"{seconds[arguments.tile]:8.2f}"
        if _DIRECT in forms:
            gib_a_text = gib[_DIRECT] / texts
            share, slower = gib[arguments.tile] / gib[_DIRECT], seconds[arguments.tile] / seconds[_DIRECT]
            print(f"{texts:6} {gib[0]:11.3f} {tiled[0]} {share:6.3f} {seconds[0]:9.2f} {tiled[1]} {slower:6.2f}")
        else:
            print(f"{texts:6} {'≈' + format(expected, '.1f'):>11} {tiled[0]} {'':6} {'no room':>9} {tiled[1]}")
        sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--texts", type=int, nargs="+", default=[64, 256, 1024, 4096])
    parser.add_argument("--grid", type=int, default=56, help="cells a side of a mask")
    parser.add_argument("--width", type=int, default=512, help="of the embeddings")
    parser.add_argument("--tile", type=int, default=256, help="texts at a time")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="processes a figure")
    parser.add_argument("--repeats", type=int, default=1, help="runs in a process; the first one pays for fresh memory")
    parser.add_argument("--limit-gib", type=float, default=10.0, help="the direct form is left out above this")
    parser.add_argument("--measure", type=int, nargs=7, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(*arguments.measure)
    else:
        table(arguments)


if __name__ == "__main__":
    main()
