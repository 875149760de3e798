"""Examples read ahead by several threads, in order, each either there or with the reason why not."""

import collections
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from tclkit.runtime.errors import InputError

from .datasets import Dataset, Example

_AHEAD_PER_THREAD = 2


def loaded_examples(
    dataset: Dataset, indices: Sequence[int], *, threads: int = 2
) -> Iterator[tuple[int, Example | InputError]]:
    """Yield (index, example or what is wrong with it), in the order of `indices`.

    At most two examples a thread are read ahead, so that memory does not grow with the data set.

    Args:
        dataset: where they come from.
        indices: which.
        threads: decode this many files at once.
    """
    waiting: collections.deque[tuple[int, Future[Example | InputError]]] = collections.deque()
    remaining = iter(indices)
    with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="tclkit-load") as pool:
        try:
            while True:
                while len(waiting) < threads * _AHEAD_PER_THREAD and (index := next(remaining, None)) is not None:
                    waiting.append((index, pool.submit(_loaded, dataset, index)))
                if not waiting:
                    return
                index, future = waiting.popleft()
                yield index, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


def _loaded(dataset: Dataset, index: int) -> Example | InputError:
    try:
        return dataset.load(index)
    except InputError as error:
        return error
    except MemoryError as error:
        return InputError(f"{dataset.name(index)} does not fit into memory: {error}")
