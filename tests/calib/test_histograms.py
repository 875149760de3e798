import numpy as np
import pytest
from numpy.typing import NDArray

from tclkit.calib import entropy_limit, mse_limit, percentile_limit
from tclkit.calib.histograms import LEVELS
from tclkit.runtime.errors import InputError


def counts_of(values: NDArray[np.float64], bins: int) -> tuple[NDArray[np.int64], float]:
    magnitudes = np.abs(values)
    counts, edges = np.histogram(magnitudes, bins, range=(0.0, float(magnitudes.max())))
    return counts.astype(np.int64), float(edges[1])


def divergence_of_cut(counts: NDArray[np.int64], cut: int) -> float:
    """The method word for word, as the slides write it; a last bin of clipped values alone counts as one value."""
    values = counts.astype(np.float64)
    values[0] = values[1]
    if values[:cut].sum() == 0:
        return np.inf
    p = values[:cut].copy()
    p[-1] += values[cut:].sum()
    if p[-1] > 0 and values[cut - 1] == 0:
        values[cut - 1] = 1
    q = np.zeros(cut)
    for level in range(LEVELS):
        bins = slice(level * cut // LEVELS, (level + 1) * cut // LEVELS)
        filled = values[bins] > 0
        if filled.any():
            q[bins] = filled * (values[bins].sum() / filled.sum())
    p, q = p / p.sum(), q / q.sum()
    return float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())


@pytest.mark.parametrize("name", ["normal", "laplace", "uniform", "exponential", "sparse"])
def test_entropy_equals_the_plain_loop(name: str) -> None:
    rng = np.random.default_rng(0)
    values = {
        "normal": rng.standard_normal(20_000),
        "laplace": rng.laplace(size=20_000),
        "uniform": rng.uniform(-3, 3, 20_000),
        "exponential": np.maximum(0, rng.exponential(size=20_000) - 0.5),
        "sparse": rng.choice([0.5, 1.0, 4.0, 64.0], 20_000),
    }[name]
    counts, width = counts_of(values, 512)
    divergences = np.array([divergence_of_cut(counts, cut) for cut in range(LEVELS, 513)])
    cut = round(entropy_limit(counts, width) / width)
    assert divergences[cut - LEVELS] == pytest.approx(divergences.min(), abs=1e-12)


def test_entropy_keeps_a_uniform_distribution_whole() -> None:
    assert entropy_limit(np.full(2048, 100), 0.5) == 1024.0


def test_entropy_clips_a_normal_distribution_a_little() -> None:
    counts, width = counts_of(np.random.default_rng(0).standard_normal(200_000), 2048)
    assert 3.0 < entropy_limit(counts, width) < 0.95 * counts.size * width


def test_entropy_clips_outliers() -> None:
    values = np.random.default_rng(0).standard_normal(200_000)
    values[:3] = (60.0, -80.0, 100.0)
    counts, width = counts_of(values, 2048)
    assert counts.size * width == pytest.approx(100)
    assert entropy_limit(counts, width) < 10


def test_zeros_do_not_decide() -> None:
    """A rectified tensor gets the range of its other values, however many zeros there are."""
    values = np.abs(np.random.default_rng(0).standard_normal(100_000))
    counts, width = counts_of(values, 2048)
    limit = entropy_limit(counts, width)
    counts[0] += 10_000_000
    assert entropy_limit(counts, width) == limit


def test_values_in_the_first_bin_only() -> None:
    counts = np.zeros(2048, np.int64)
    counts[0] = 5
    assert entropy_limit(counts, 0.5) == 64.0


def test_one_value_fills_one_bin() -> None:
    counts = np.zeros(2048, np.int64)
    counts[-1] = 5
    assert entropy_limit(counts, 0.5) == 1024.0


@pytest.mark.parametrize("percentile", [1.0, 50.0, 99.0, 99.99, 100.0])
def test_percentile_is_numpys_within_a_bin(percentile: float) -> None:
    values = np.random.default_rng(0).laplace(size=100_000)
    counts, width = counts_of(values, 4096)
    expected = float(np.percentile(np.abs(values), percentile))
    assert percentile_limit(counts, width, percentile) == pytest.approx(expected, abs=width)


def test_percentile_of_one_value() -> None:
    for percentile in (1, 50, 100):
        assert percentile_limit(np.array([0, 0, 1, 0]), 2.0, percentile) == 5.0


@pytest.mark.parametrize("percentile", [0.0, -1.0, 100.1])
def test_percentile_out_of_range(percentile: float) -> None:
    with pytest.raises(InputError, match=r"percentile should be in \(0, 100\], found"):
        percentile_limit(np.array([1]), 1.0, percentile)


def test_histograms_that_cannot_be_used() -> None:
    with pytest.raises(InputError, match="entropy needs 128 bins or more, found 127"):
        entropy_limit(np.ones(127, np.int64), 1.0)
    with pytest.raises(InputError, match="the histogram holds no value"):
        entropy_limit(np.zeros(128, np.int64), 1.0)
    with pytest.raises(InputError, match="the histogram holds no value"):
        percentile_limit(np.zeros(128, np.int64), 1.0, 50)


def _squared_error(values: np.ndarray, limit: float) -> float:
    step = limit / 127
    return float(np.mean((values - np.clip(np.rint(values / step), -127, 127) * step) ** 2))


@pytest.mark.parametrize("kind", ["normal", "uniform", "outliers", "few large channels"])
def test_mse_cuts_where_the_error_is_least(kind: str) -> None:
    rng = np.random.default_rng(0)
    values = {
        "normal": rng.normal(size=100_000),
        "uniform": rng.uniform(-1, 1, 100_000),
        "outliers": np.concatenate([rng.normal(size=100_000), [60.0, -55.0]]),
        "few large channels": rng.normal(size=100_000) * np.where(np.arange(100_000) % 100, 1.0, 20.0),
    }[kind]
    magnitudes = np.abs(values)
    bins = 32_000
    width = float(magnitudes.max()) / bins
    counts = np.bincount(np.minimum((magnitudes / width).astype(np.int64), bins - 1), minlength=bins)
    limit = mse_limit(counts, width)
    tried = np.geomspace(0.02, 1, 200) * magnitudes.max()
    assert _squared_error(values, limit) <= 1.01 * min(_squared_error(values, one) for one in tried)


def test_mse_of_one_value_keeps_it() -> None:
    assert mse_limit(np.array([0, 0, 0, 5]), 0.5) == 2.0


def test_mse_needs_values() -> None:
    with pytest.raises(InputError, match="holds no value"):
        mse_limit(np.zeros(10, np.int64), 1.0)
