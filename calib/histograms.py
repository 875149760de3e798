"""Where to cut a distribution of magnitudes before it is squeezed into 8 bits: by error, entropy or percentile."""

import math
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from tclkit.runtime.errors import InputError

RangeMethod = Literal["mse", "entropy", "minmax", "percentile"]
RANGE_METHODS: tuple[str, ...] = get_args(RangeMethod)
_CUTS_TRIED = 2048
LEVELS = 128  # magnitudes of a symmetric 8-bit number


def percentile_limit(counts: NDArray[np.int64], width: float, percentile: float) -> float:
    """The magnitude below which `percentile` % of the values lie: numpy's percentile, to within a bin.

    Args:
        counts: (bins,) values in [k * width, (k + 1) * width).
        width: of a bin, in the tensor's unit.
        percentile: in (0, 100].

    Raises:
        InputError: percentile is out of range, or there is no value.
    """
    if not 0 < percentile <= 100:
        raise InputError(f"percentile should be in (0, 100], found {percentile}")
    total = _total(counts)
    below = np.concatenate([[0], np.cumsum(counts)])  # values below each edge
    rank = (total - 1) * percentile / 100
    lower, upper = (_ordered_value(counts, below, place) for place in (math.floor(rank), math.ceil(rank)))
    return (lower + (upper - lower) * (rank - math.floor(rank))) * width


def _ordered_value(counts: NDArray[np.int64], below: NDArray[np.int64], place: int) -> float:
    """The value at a place in ascending order, in bins; values of one bin are taken to be spread evenly."""
    index = int(np.searchsorted(below, place, side="right")) - 1
    return float(index + (place - below[index] + 0.5) / counts[index])


def mse_limit(counts: NDArray[np.int64], width: float) -> float:
    """The magnitude at which to clip so that rounding to 8 bits and clipping together cost the least squared error.

    Rounding costs a twelfth of the squared step for every value kept, clipping the squared distance for every value
    beyond. Against entropy, far values count for what they weigh: a few large channels of a transformer carry meaning.

    Args:
        counts: (bins,) values in [k * width, (k + 1) * width).
        width: of a bin, in the tensor's unit.

    Returns:
        Upper edge of the last bin kept.

    Raises:
        InputError: the histogram holds no value.
    """
    _total(counts)
    values = counts.astype(np.float64)
    centres = np.arange(values.size) + 0.5
    cuts = np.unique(np.rint(np.geomspace(1, values.size, _CUTS_TRIED)).astype(np.intp))
    kept, first, second = (
        np.concatenate([[0.0], np.cumsum(values * centres**power)]) for power in range(3)
    )  # sums of 1, x and x^2 below each edge
    beyond, beyond_first, beyond_second = (sums[-1] - sums[cuts] for sums in (kept, first, second))
    rounding = kept[cuts] * (cuts / (LEVELS - 1)) ** 2 / 12
    clipping = beyond_second - 2 * cuts * beyond_first + cuts**2 * beyond
    return float(cuts[int(np.argmin(rounding + clipping))]) * width


def entropy_limit(counts: NDArray[np.int64], width: float) -> float:
    """The magnitude at which to clip so that 8 bits keep most of the distribution's information.

    For every cut at a bin's edge from the 128th on, the clipped distribution P (what lies beyond is added to the last
    bin) is compared with Q, what is left of it after 128 levels; the cut of least Kullback-Leibler divergence wins, the
    widest of equals.

    Args:
        counts: (bins,) values in [k * width, (k + 1) * width); 128 bins or more.
        width: of a bin, in the tensor's unit.

    Returns:
        Upper edge of the last bin kept.

    Raises:
        InputError: fewer than 128 bins, or no value.

    Source: S. Migacz, "8-bit Inference with TensorRT", GTC 2017 (TensorRT's entropy calibrator). The first bin gets the
    count of the second, as in NVIDIA's pytorch-quantization (calib/histogram.py): zeros are exact at any scale, and
    those of an activation function would outweigh the rest. The slides leave open what happens at a cut whose last bin
    is empty in Q but gets the values beyond it in P (an infinite divergence, so that a range could never end in the gap
    before an outlier): here that bin counts as one value in Q.
    """
    if counts.size < LEVELS:
        raise InputError(f"entropy needs {LEVELS} bins or more, found {counts.size}")
    _total(counts)
    values = counts.astype(np.float64)
    values[0] = values[1]
    if not values.any():  # all values lie in the first bin
        return width * LEVELS
    return _best_cut(values) * width


def _best_cut(values: NDArray[np.float64]) -> int:
    """Number of bins kept; all cuts at once: prefix sums give every level's mass without a loop over bins."""
    bins = values.size
    cuts = np.arange(LEVELS, bins + 1)
    edges = cuts[:, None] * np.arange(LEVELS + 1) // LEVELS  # (cuts, levels + 1): bins of level j are edges[j]..[j + 1]
    mass_below = np.concatenate([[0.0], np.cumsum(values)])
    filled_below = np.concatenate([[0], np.cumsum(values > 0)])
    plogp_below = np.concatenate([[0.0], np.cumsum(_xlogx(values))])
    total = mass_below[-1]
    kept = mass_below[cuts]
    last = values[cuts - 1]
    beyond = total - kept
    p_mass = np.diff(mass_below[edges])  # (cuts, levels), without what lies beyond
    q_mass, q_filled = p_mass.copy(), np.diff(filled_below[edges])
    stand_in = (last <= 0) & (beyond > 0)
    q_mass[:, -1] += stand_in
    q_filled[:, -1] += stand_in
    # Each filled bin of a level gets the level's mean mass.
    log_mean = np.log(np.divide(q_mass, q_filled, out=np.ones_like(q_mass), where=q_filled > 0))
    p_log_p = plogp_below[cuts] - _xlogx(last) + _xlogx(last + beyond)
    p_log_q = (p_mass * log_mean).sum(axis=1) + beyond * log_mean[:, -1]
    # sum P log(P / Q) with P = p / total and Q = q / (kept + stand_in)
    divergence = (p_log_p - p_log_q) / total - np.log(total) + np.log(np.maximum(kept + stand_in, 1))
    divergence[kept <= 0] = np.inf
    widest_best = cuts.size - 1 - int(np.argmin(divergence[::-1]))
    return int(cuts[widest_best])


def _xlogx(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values * np.log(np.where(values > 0, values, 1.0))


def _total(counts: NDArray[np.int64]) -> int:
    total = int(counts.sum())
    if total < 1:
        raise InputError("the histogram holds no value")
    return total
