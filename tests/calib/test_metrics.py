from pathlib import Path

import numpy as np
import pytest

from tclkit.calib import count_pixels, iou_from_confusion, mean_iou, scores_from_counts
from tclkit.calib.metrics import figure_or_none
from tclkit.runtime.errors import InputError


def test_counts_by_truth_and_prediction() -> None:
    truth = np.array([[0, 0, 1], [1, 2, 2]])
    predicted = np.array([[0, 1, 1], [1, 2, 0]])
    counts = count_pixels(predicted, truth, 3)
    np.testing.assert_array_equal(counts, [[1, 1, 0], [0, 2, 0], [1, 0, 1], [0, 0, 0]])
    np.testing.assert_allclose(iou_from_confusion(counts[:-1]), [1 / 3, 2 / 3, 1 / 2])
    assert mean_iou(counts[:-1]) == pytest.approx(0.5)


def test_absent_class_is_left_out_of_the_mean() -> None:
    confusion = count_pixels(np.zeros((2, 2), int), np.zeros((2, 2), int), 3)[:-1]
    assert np.isnan(iou_from_confusion(confusion)[1:]).all()
    assert mean_iou(confusion) == 1.0


def test_ignored_pixels_do_not_count() -> None:
    assert count_pixels(np.array([0, 1, 1]), np.array([0, 1, 255]), 2).sum() == 2


def test_no_pixel_at_all_gives_nan() -> None:
    assert np.isnan(mean_iou(np.zeros((2, 2), np.int64)))


def test_many_matrices_at_once() -> None:
    both = np.stack([np.eye(3, dtype=np.int64), np.ones((3, 3), np.int64)])
    np.testing.assert_allclose(mean_iou(both), [1.0, 0.2])


@pytest.mark.parametrize("reduce_zero_label", [False, True])
def test_areas_and_scores_equal_the_reference(golden: Path, reduce_zero_label: bool) -> None:
    """Six pairs of mmsegmentation 0.27; labels out of range are among them."""
    tag = f"rz{int(reduce_zero_label)}"
    with np.load(golden / "miou.npz") as expected:
        total = np.zeros((8, 7), np.int64)
        for index in range(6):
            counts = count_pixels(
                expected[f"pred{index}"], expected[f"label{index}"], 7, reduce_zero_label=reduce_zero_label
            )
            hits, of_class, as_class = np.diagonal(counts), counts[:-1].sum(1), counts.sum(0)
            areas = np.stack([hits, of_class + as_class - hits, as_class, of_class])
            np.testing.assert_array_equal(areas, expected[f"{tag}/areas{index}_I_U_P_L"])
            total += counts
        scores = scores_from_counts(total)
        np.testing.assert_allclose(scores.iou, expected[f"{tag}/IoU"], rtol=0, atol=1e-7)
        np.testing.assert_allclose(scores.accuracy, expected[f"{tag}/Acc"], rtol=0, atol=1e-7)
        assert scores.pixel_accuracy == pytest.approx(float(expected[f"{tag}/aAcc"]), abs=1e-7)
        assert scores.miou_percent == pytest.approx(float(expected[f"{tag}/mIoU_percent_rounded"]), abs=1e-5)
        assert total[-1].any() != reduce_zero_label  # label 7 is out of range, and the last class once 0 is dropped


def test_absent_classes_equal_the_reference(golden: Path) -> None:
    with np.load(golden / "miou.npz") as expected:
        scores = scores_from_counts(count_pixels(expected["absent/pred"], expected["absent/label"], 5))
        np.testing.assert_allclose(scores.iou, expected["absent/IoU"])
        assert np.isnan(scores.iou[3:]).all()
        assert scores.miou_percent == pytest.approx(float(expected["absent/mIoU_percent"]), abs=1e-5)


def test_nothing_counted_is_not_a_number() -> None:
    scores = scores_from_counts(count_pixels(np.zeros((2, 2), int), np.full((2, 2), 255), 3))
    assert np.isnan([scores.miou, scores.mean_accuracy, scores.pixel_accuracy, scores.miou_percent]).all()


def test_a_label_out_of_range_counts_against_the_prediction() -> None:
    counts = count_pixels(np.array([[0, 1]]), np.array([[0, 9]]), 2)
    assert counts.tolist() == [[1, 0], [0, 0], [0, 1]]
    assert scores_from_counts(counts).iou.tolist() == [1.0, 0.0]


def test_the_truth_is_not_changed() -> None:
    truth = np.array([[0, 1]], np.uint8)
    count_pixels(np.array([[0, 0]]), truth, 1, reduce_zero_label=True)
    assert truth.tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("predicted", "text"), [(np.zeros((1, 3), int), "resize the prediction"), (np.array([[0, 5]]), "labels 0..5")]
)
def test_bad_predictions_are_refused(predicted: np.ndarray, text: str) -> None:
    with pytest.raises(InputError, match=text):
        count_pixels(predicted, np.zeros((1, 2), int), 3)


def test_a_figure_in_json_is_a_number_or_none() -> None:
    assert [figure_or_none(value) for value in (float("nan"), 0.12345678)] == [None, 0.123457]
