import numpy as np
import pytest

from tclkit.calib import count_pixels, mean_iou
from tclkit.tcl.evaluate import ThresholdSweep


def _scores() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    prompts = np.array([4, 1, 3])
    label_map = rng.choice([-1, 1, 3, 4], size=(20, 30)).astype(np.int16)
    scores = rng.random((3, 20, 30), np.float32)
    return scores, prompts, label_map


@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.5, 0.9])
def test_each_threshold_counts_as_if_it_were_the_only_one(threshold: float) -> None:
    scores, prompts, label_map = _scores()
    sweep = ThresholdSweep(5)
    sweep.add(scores, prompts, label_map)
    predicted = np.where(scores.max(0) >= threshold, prompts[scores.argmax(0)], 5)
    expected = count_pixels(predicted, np.where(label_map < 0, 5, label_map), 6)[:-1]
    np.testing.assert_array_equal(sweep.confusions()[round(threshold * 400)], expected)


def test_perfect_masks_score_a_hundred() -> None:
    _, prompts, label_map = _scores()
    sweep = ThresholdSweep(5)
    sweep.add((label_map[None] == prompts[:, None, None]).astype(np.float32) * 0.9, prompts, label_map)
    best = sweep.best("oracle", "present")
    assert best.miou == 100
    assert best.background_iou == 100


def test_the_best_threshold_is_the_best() -> None:
    scores, prompts, label_map = _scores()
    sweep = ThresholdSweep(5)
    for _ in range(3):
        sweep.add(scores, prompts, label_map)
    assert sweep.best("noise", "present").miou == pytest.approx(float(np.nanmax(mean_iou(sweep.confusions()))) * 100)
