import numpy as np
import pytest

from tclkit.calib import confusion_from_labels, iou_from_confusion, mean_iou
from tclkit.runtime.errors import InputError


def test_counts_by_truth_and_prediction() -> None:
    truth = np.array([[0, 0, 1], [1, 2, 2]])
    predicted = np.array([[0, 1, 1], [1, 2, 0]])
    confusion = confusion_from_labels(predicted, truth, 3)
    np.testing.assert_array_equal(confusion, [[1, 1, 0], [0, 2, 0], [1, 0, 1]])
    np.testing.assert_allclose(iou_from_confusion(confusion), [1 / 3, 2 / 3, 1 / 2])
    assert mean_iou(confusion) == pytest.approx(0.5)


def test_absent_class_is_left_out_of_the_mean() -> None:
    confusion = confusion_from_labels(np.zeros((2, 2), int), np.zeros((2, 2), int), 3)
    assert np.isnan(iou_from_confusion(confusion)[1:]).all()
    assert mean_iou(confusion) == 1.0


def test_ignored_pixels_do_not_count() -> None:
    confusion = confusion_from_labels(np.array([0, 1, 1]), np.array([0, 1, 255]), 2, ignore=255)
    assert confusion.sum() == 2


def test_no_pixel_at_all_gives_nan() -> None:
    assert np.isnan(mean_iou(confusion_from_labels(np.zeros((0,), int), np.zeros((0,), int), 2)))


def test_many_matrices_at_once() -> None:
    both = np.stack([np.eye(3, dtype=np.int64), np.ones((3, 3), np.int64)])
    np.testing.assert_allclose(mean_iou(both), [1.0, 0.2])


@pytest.mark.parametrize(
    ("predicted", "truth", "text"),
    [
        (np.zeros((2, 2), int), np.zeros((2, 3), int), "resize the prediction"),
        (np.array([3]), np.array([0]), r"prediction holds labels 3..3; expected 0..2"),
        (np.array([0]), np.array([-1]), r"truth holds labels -1..-1"),
    ],
)
def test_bad_labels_are_refused(predicted: np.ndarray, truth: np.ndarray, text: str) -> None:
    with pytest.raises(InputError, match=text):
        confusion_from_labels(predicted, truth, 3)
