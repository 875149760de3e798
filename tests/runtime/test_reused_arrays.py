"""Arrays that are given out again are nobody's: whoever holds one, or a view of it, keeps it to himself."""

import gc

import numpy as np
import pytest

from tclkit.runtime.reused_arrays import _MOST_KEPT, ReusedArrays

SHAPE = (1, 512, 48, 48)


def place(array: np.ndarray) -> int:
    return int(array.ctypes.data)


def test_one_that_nobody_has_is_given_out_again_in_any_shape() -> None:
    arrays = ReusedArrays()
    first = arrays.take(SHAPE)
    assert (first.shape, first.dtype) == (SHAPE, np.float32)
    assert first.flags.c_contiguous
    assert first.flags.writeable
    at = place(first)
    del first
    assert place(arrays.take((2, 256, 2304))) == at
    assert place(arrays.take(SHAPE)) == at


@pytest.mark.parametrize(
    "hold",
    [
        lambda array: array,
        lambda array: array[0, 3],
        lambda array: array.reshape(-1)[5:].view(np.uint32),
        lambda array: memoryview(array),
        lambda array: {"deep": [iter(array)]},
    ],
    ids=["itself", "a view", "a view of another type", "a buffer", "an iterator"],
)
def test_one_that_somebody_has_is_left_to_him(hold: object) -> None:
    arrays = ReusedArrays()
    held = [hold(arrays.take(SHAPE)) for _ in range(3)]  # type: ignore[operator]
    taken = [arrays.take(SHAPE) for _ in range(3)]
    assert len({place(array) for array in taken}) == 3
    for array in taken:
        array.fill(7)
    again = ReusedArrays().take(SHAPE)
    again.fill(9)
    first = np.asarray(held[0]) if not isinstance(held[0], dict) else next(held[0]["deep"][0])
    assert not np.shares_memory(first, taken[0])
    del held, first
    gc.collect()


def test_what_is_kept_is_bounded_and_dropped_ones_stay_whole() -> None:
    arrays = ReusedArrays()
    held = [arrays.take(SHAPE) for _ in range(3 * _MOST_KEPT)]
    for number, array in enumerate(held):
        array.fill(number)
    assert len(arrays._kept) == _MOST_KEPT
    assert [float(array.max()) for array in held] == list(range(3 * _MOST_KEPT))
    arrays.clear()
    assert [float(array.min()) for array in held] == list(range(3 * _MOST_KEPT))


def test_small_ones_are_not_kept() -> None:
    arrays = ReusedArrays()
    arrays.take((3, 4))
    assert arrays._kept == []
