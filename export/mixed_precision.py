"""The most INT8 that still passes the gate: which blocks to quantise, found by measuring each on its own.

1. Quantise one block alone, the rest exact, and measure how far the features move: its sensitivity.
2. Order the blocks by sensitivity per multiplication that INT8 would make cheap, and find by bisection how many of the
   first pass the gate together.
3. Try each block that is left once more, on top of those.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .gates import GateFigures, GateThresholds
from .layers import Layer

WORST_LOSS = 2.0
"""Of a block that leaves features which are not finite: as if they pointed the other way."""

Judge = Callable[[Sequence[Layer]], GateFigures]
"""Figures of the graph in which these layers are quantised."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockSensitivity:
    """How much one block suffers from INT8.

    block: its name. layers: those in it.
    loss: 1 - cosine of the features with it alone quantised; `WORST_LOSS` where a feature was not finite.
    share: of the multiplications of all layers, in 0..1. chosen: whether it became INT8.
    """

    block: str
    layers: tuple[Layer, ...]
    loss: float
    share: float
    chosen: bool = False


def choose_layers(
    layers: Sequence[Layer],
    judge: Judge,
    thresholds: GateThresholds,
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[list[Layer], list[BlockSensitivity]]:
    """Find the layers to quantise.

    Args:
        layers: all that may be.
        judge: measures a choice; called once a block, then about log2(blocks) times, then once a block that is left.
        thresholds: what the whole has to reach.
        progress: called as progress(what, done, in_all) before every measurement; in_all is the most it can take.

    Returns:
        The chosen layers in the order given (none, if no block passes), and every block's sensitivity, least first.
    """
    blocks: dict[str, list[Layer]] = {}
    for layer in layers:
        blocks.setdefault(layer.block, []).append(layer)
    in_all = 2 * len(blocks) + len(blocks).bit_length()
    done = 0

    def measured(what: str, choice: Sequence[Layer]) -> GateFigures:
        nonlocal done
        if progress:
            progress(f"INT8 search: {what}", done, in_all)
        done += 1
        return judge(choice)

    total = sum(layer.multiplications for layer in layers) or 1
    found = []
    for name, members in blocks.items():
        cosine = measured(f"sensitivity of {name}", members).features_cosine
        loss = 1 - cosine if math.isfinite(cosine) else WORST_LOSS
        share = sum(layer.multiplications for layer in members) / total
        found.append(BlockSensitivity(block=name, layers=tuple(members), loss=loss, share=share))
    order = sorted(found, key=lambda one: (one.loss == WORST_LOSS, one.loss / max(one.share, 1e-9)))

    def passes(chosen: Sequence[BlockSensitivity]) -> bool:
        choice = [layer for one in chosen for layer in one.layers]
        return not measured(f"{len(chosen)} of {len(order)} blocks", choice).failures(thresholds)

    count = _longest_passing_prefix(order, passes)
    chosen = order[:count]
    for one in order[count + 1 :]:  # the block right behind the prefix is known to fail on top of it
        if passes([*chosen, one]):
            chosen = [*chosen, one]
    names = {one.block for one in chosen}
    if progress:
        progress("INT8 search: done", in_all, in_all)
    sensitivities = [
        BlockSensitivity(block=o.block, layers=o.layers, loss=o.loss, share=o.share, chosen=o.block in names)
        for o in order
    ]
    return [layer for layer in layers if layer.block in names], sensitivities


def _longest_passing_prefix(
    order: Sequence[BlockSensitivity], passes: Callable[[Sequence[BlockSensitivity]], bool]
) -> int:
    """Length of the longest prefix that passes, if passing ends once and for all at some length."""
    least, most = 0, len(order)
    while least < most:
        middle = (least + most + 1) // 2
        if passes(order[:middle]):
            least = middle
        else:
            most = middle - 1
    return least
