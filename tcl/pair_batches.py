"""Batches of image-text pairs for training: read, augmented and put together in worker processes, resumable.

Shapes: B batch, H W pixels, L tokens.
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from tclkit.runtime.errors import InputError
from tclkit.runtime.tokenizer import Tokenizer

from .augmentation import Augmentation, AugmentationConfig
from .batches import Batch
from .distributed import current_place
from .pairs import Pair, PairReader, PairsConfig

# Images, token ids and where the reader stands after them; or what ended the reading.
_Made = tuple[Tensor, Tensor, dict[str, Any]] | InputError


class _WorkerBatches(IterableDataset[_Made]):
    """Every worker yields the batches of its own part."""

    def __init__(self, parts: list["_Part"]) -> None:
        self._parts = parts

    def __iter__(self) -> Iterator[_Made]:
        info = torch.utils.data.get_worker_info()
        return iter(self._parts[info.id if info else 0])


@dataclass(frozen=True, slots=True)
class _Part:
    """The share of one reader, from a position on."""

    pairs: PairsConfig
    augmentation: AugmentationConfig
    tokenizer: Tokenizer
    batch_size: int
    reader: int
    readers: int
    position: dict[str, Any] | None

    def __iter__(self) -> Iterator[_Made]:
        try:
            reader = PairReader(self.pairs, reader=self.reader, readers=self.readers)
            if self.position is not None:
                reader.position = self.position
        except InputError as error:  # as a value: raised in a worker it would come wrapped into a traceback's text
            yield error
            return
        augment, stream = Augmentation(self.augmentation), iter(reader)
        while True:
            try:
                pairs = list(itertools.islice(stream, self.batch_size))
            except InputError as error:
                yield error
                return
            images = torch.stack([augment(pair.image_hwc, self._seed(pair)) for pair in pairs])
            token_ids = torch.from_numpy(self.tokenizer.encode([pair.caption for pair in pairs]))
            yield images, token_ids, reader.position

    def _seed(self, pair: Pair) -> int:
        sequence = np.random.SeedSequence([self.pairs.seed, self.reader, pair.number])
        return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


class PairBatches:
    """Endless batches of this process, `batch_size` pairs each.

    Processes and their workers each read their own part of every source. The workers take turns, so that the order is
    the same for the same number of processes and workers.
    """

    def __init__(
        self,
        pairs: PairsConfig,
        augmentation: AugmentationConfig,
        tokenizer: Tokenizer,
        batch_size: int,
        *,
        workers: int = 0,
    ) -> None:
        """Open the sources.

        Args:
            pairs, augmentation: what to read, and how images are changed.
            tokenizer: captions longer than its context are cut.
            batch_size: of this process.
            workers: processes that read for this one; 0 reads in it.

        Raises:
            InputError: a source has no files, or too few for all readers.
        """
        self._settings = pairs, augmentation, tokenizer, batch_size
        self._workers, self._readers = workers, max(1, workers)
        place = current_place()
        self._first_reader, self._all_readers = place.rank * self._readers, place.count * self._readers
        last = self._first_reader + self._readers - 1  # has the fewest pairs or shards: enough for it is for all
        PairReader(pairs, reader=last, readers=self._all_readers)  # says now what is wrong with the sources
        self._states: list[dict[str, Any] | None] = [None] * self._readers
        self._turn = 0
        self._stream: Iterator[_Made] | None = None

    @property
    def position(self) -> dict[str, Any]:
        """How far the batches that were handed out have come, as plain values; set it to go on there."""
        return {"turn": self._turn, "readers": list(self._states)}

    @position.setter
    def position(self, position: dict[str, Any]) -> None:
        if len(position["readers"]) != self._readers:
            raise InputError(
                f"the position is one of {len(position['readers'])} workers, but there are {self._readers}; "
                "go on with as many workers as the run began with"
            )
        self._turn, self._states = position["turn"], list(position["readers"])
        self._stream = None

    @property
    def broken(self) -> Counter[str]:
        """How many pairs were passed over so far, by reason; see `PairReader`."""
        return sum((Counter(state["broken"]) for state in self._states if state), Counter())

    def next(self) -> Batch:
        """Hand out the next batch.

        Raises:
            InputError: too many pairs are broken.
        """
        if self._stream is None:
            self._stream = self._opened()
        made = next(self._stream)
        if isinstance(made, InputError):
            raise made
        images_BCHW, token_ids_BL, self._states[self._turn] = made
        self._turn = (self._turn + 1) % self._readers
        return Batch(images_BCHW, token_ids_BL)

    def _opened(self) -> Iterator[_Made]:
        """A loader whose first worker is the reader whose turn it is."""
        order = [(self._turn + i) % self._readers for i in range(self._readers)]
        parts = [_Part(*self._settings, self._first_reader + i, self._all_readers, self._states[i]) for i in order]
        dataset = _WorkerBatches(parts)
        own_generator = torch.Generator()  # else it draws from torch's own, and a run gone on with would differ
        loader = DataLoader(dataset, batch_size=None, num_workers=self._workers, generator=own_generator)
        return iter(loader)
