import numpy as np
import pytest

from tclkit.runtime.errors import InputError
from tclkit.runtime.fitted_masks import FittedMasks
from tclkit.runtime.upsample import resize_masks

GRID = np.random.default_rng(0).random((3, 14, 16), np.float32)


@pytest.mark.parametrize("cell", [(1, 1), (2, 2), (4, 4), (8, 2)])
@pytest.mark.parametrize("cut", [False, True])
def test_bands_are_those_of_the_whole_bit_for_bit(cell: tuple[int, int], cut: bool) -> None:
    height, width = 14 * cell[0], 16 * cell[1]
    rows, columns = (slice(3, height - 2), slice(1, width - 4)) if cut else (slice(0, height), slice(0, width))
    whole = resize_masks(GRID, (height, width))[:, rows, columns]
    masks = FittedMasks(grid=GRID, cell=cell, rows=rows, columns=columns)
    assert masks.size == whole.shape[1:]
    assert len(masks) == 3
    np.testing.assert_array_equal(masks.array(), whole)
    np.testing.assert_array_equal(masks.first(2).array(), whole[:2])
    for start in range(masks.size[0]):
        for stop in range(start + 1, min(start + 9, masks.size[0]) + 1):
            np.testing.assert_array_equal(masks.band(1, slice(start, stop)), whole[1, start:stop])


@pytest.mark.parametrize("cell", [(1, 1), (2, 2), (4, 4), (8, 8)])
def test_pixels_lie_between_the_cells_that_are_named(cell: tuple[int, int]) -> None:
    height, width = 14 * cell[0], 16 * cell[1]
    masks = FittedMasks(grid=GRID, cell=cell, rows=slice(2, height), columns=slice(5, width))
    whole = masks.array()
    for row in range(masks.size[0]):
        cells = GRID[:, masks.grid_rows(slice(row, row + 1))]
        assert cells.shape[1] == 2
        first = masks.grid_column(np.arange(masks.size[1]))
        for column in range(masks.size[1] - 1):
            around = cells[:, :, first[column] : first[column] + 3].reshape(3, -1)
            pair = whole[:, row, column : column + 2]
            assert (pair.max(axis=1) <= around.max(axis=1) + 1e-6).all()
            assert (pair.min(axis=1) >= around.min(axis=1) - 1e-6).all()


def test_an_array_is_taken_as_it_is() -> None:
    masks = FittedMasks.from_array(GRID)
    assert masks.array() is GRID
    assert masks.size == (14, 16)
    with pytest.raises(InputError, match=r"masks should be float32 \(N, h, w\), found float64 \(2, 2\)"):
        FittedMasks.from_array(np.zeros((2, 2)))  # type: ignore[arg-type]
