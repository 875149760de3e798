import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from tclkit.calib.datasets import Example
from tclkit.calib.loading import loaded_examples
from tclkit.runtime.errors import InputError


class Slow:
    """A data set of which one image is broken and one too large. Its first loads wait until `threads` of them run."""

    def __init__(self, threads: int = 1) -> None:
        self.running = self.most_running = self.loaded = 0
        self._together = threading.Barrier(threads)
        self._meeting = threads
        self._lock = threading.Lock()

    def name(self, index: int) -> str:
        return f"image {index}"

    def load(self, index: int) -> Example:
        with self._lock:
            self.running += 1
            self.most_running = max(self.most_running, self.running)
            is_met, self._meeting = self._meeting > 0, self._meeting - 1
        if is_met:
            self._together.wait(timeout=30)
        time.sleep(0.02 if index % 2 == 0 else 0.001)
        with self._lock:
            self.running -= 1
            self.loaded += 1
        if index == 3:
            raise InputError("it is broken")
        if index == 4:
            raise MemoryError
        return Example(image_hwc=np.full((1, 1, 3), index, np.uint8), truth=np.zeros((1, 1), np.uint8), prompts={})


def loaded(dataset: Slow, indices: list[int], threads: int) -> Iterator[tuple[int, Example | InputError]]:
    return loaded_examples(dataset, indices, threads=threads)  # type: ignore[arg-type]


@pytest.mark.parametrize("threads", [1, 3])
def test_order_is_kept_and_errors_take_their_places(threads: int) -> None:
    dataset = Slow(threads)
    found = list(loaded(dataset, [6, 1, 3, 4, 0], threads))
    assert [index for index, _ in found] == [6, 1, 3, 4, 0]
    for index, example in found:
        if isinstance(example, InputError):
            assert (index, str(example)) in [(3, "it is broken"), (4, "image 4 does not fit into memory: ")]
        else:
            assert example.image_hwc[0, 0, 0] == index
    assert dataset.most_running == threads


def test_nothing_is_read_far_ahead_and_closing_ends_it() -> None:
    dataset = Slow()
    examples = loaded(dataset, list(range(0, 100, 2)), 2)
    next(examples)
    examples.close()  # type: ignore[attr-defined]
    assert dataset.loaded <= 2 * 2 + 2


def test_no_images() -> None:
    assert list(loaded(Slow(), [], 2)) == []
