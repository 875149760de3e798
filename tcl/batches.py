"""Batches of the synthetic world for training: seeded, endless, resumable by one number."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tclkit.runtime.errors import ConfigError
from tclkit.runtime.tokenizer import Tokenizer

from .distributed import current_place
from .world import Scene, WorldConfig, scene

# ImageNet's statistics, which TCL uses instead of CLIP's (per RGB channel, of values in 0..255).
IMAGE_MEAN = (123.675, 116.28, 103.53)
IMAGE_STD = (58.395, 57.12, 57.375)
_GIVE_UP_AFTER = 20_000  # scenes in a row without a new caption


@dataclass(frozen=True, slots=True)
class Batch:
    """Image-text pairs: images_BCHW float32, normalised; token_ids_BL int64."""

    images_BCHW: Tensor  # noqa: N815
    token_ids_BL: Tensor  # noqa: N815

    def to(self, device: torch.device) -> "Batch":
        """The same pairs on a device."""
        if self.images_BCHW.device == device:
            return self
        return Batch(self.images_BCHW.to(device, non_blocking=True), self.token_ids_BL.to(device, non_blocking=True))


def joined(parts: Sequence[Batch]) -> Batch:
    """All pairs of several batches in one; shorter texts are padded with zeros, as the tokenizer does."""
    if len(parts) == 1:
        return parts[0]
    longest = max(part.token_ids_BL.shape[1] for part in parts)
    token_ids = [F.pad(part.token_ids_BL, (0, longest - part.token_ids_BL.shape[1])) for part in parts]
    return Batch(torch.cat([part.images_BCHW for part in parts]), torch.cat(token_ids))


class Batches(Protocol):
    """Where a stage of training gets its data.

    position: how far they have been read, as plain values; set it to continue an earlier run.
    """

    position: Any

    def next(self) -> Batch:
        """Draw the next batch of this process."""


def images_to_tensor(images_BHWC: np.ndarray) -> Tensor:
    """Normalise bytes as TCL does: (B, H, W, 3) uint8 RGB -> (B, 3, H, W) float32."""
    x_BCHW = torch.from_numpy(np.ascontiguousarray(images_BHWC)).permute(0, 3, 1, 2).float()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
    return (x_BCHW - mean) / std


class WorldBatches:
    """Draws batches in which no two captions are equal, since equal ones would be each other's false negatives.

    Over several processes each takes its part of one batch that all draw: `batch_size` pairs a process.

    position: index of the next scene; set it to continue an earlier run.
    """

    def __init__(self, world: WorldConfig, tokenizer: Tokenizer, batch_size: int) -> None:
        self._world, self._tokenizer, self._batch_size = world, tokenizer, batch_size
        self.position = 0

    def next(self, world: WorldConfig | None = None) -> Batch:
        """Draw the next batch, from another world than usual when one is given.

        Raises:
            ConfigError: the world has fewer captions than the batch has pairs.
        """
        world = world or self._world
        drawn: dict[str, Scene] = {}
        place = current_place()
        wanted, newest = self._batch_size * place.count, self.position
        while len(drawn) < wanted:
            candidate = scene(world, self.position)
            if candidate.caption not in drawn:
                drawn[candidate.caption], newest = candidate, self.position
            elif self.position - newest >= _GIVE_UP_AFTER:
                raise ConfigError(
                    f"a batch needs {wanted} different captions, but scenes of {world.min_objects} to "
                    f"{world.max_objects} objects gave {len(drawn)}, and {_GIVE_UP_AFTER} more no other; lower "
                    "batch_size, or raise world.max_objects (where single objects come first: single_until = 0)",
                    key="batch_size",
                )
            self.position += 1
        own = list(drawn.values())[place.rank * self._batch_size : (place.rank + 1) * self._batch_size]
        images = np.stack([one.image for one in own])
        token_ids = self._tokenizer.encode([one.caption for one in own])
        return Batch(images_to_tensor(images), torch.from_numpy(token_ids))
