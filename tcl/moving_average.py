"""A moving average of the weights that learn, which often segments better than the weights of the last step.

Source: Polyak and Juditsky, 1992; the exponential form is the usual one of deep learning.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class MovingAverage:
    """decay · average + (1 - decay) · weights after every step, of all that can learn; the frozen CLIP is left out."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._weights = {name: p for name, p in model.named_parameters() if not name.startswith("clip.")}
        self._average = {name: weight.detach().clone() for name, weight in self._weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now."""
        for name, weight in self._weights.items():
            self._average[name].lerp_(weight, 1 - self._decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the average into the model, and the weights back afterwards."""
        kept = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self._fill(self._average)
        try:
            yield
        finally:
            self._fill(kept)

    def state_dict(self) -> dict[str, Tensor]:
        """The average, by parameter name."""
        return dict(self._average)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from an earlier average."""
        for name, average in self._average.items():
            average.copy_(state[name])

    @torch.no_grad()
    def _fill(self, values: Mapping[str, Tensor]) -> None:
        for name, weight in self._weights.items():
            weight.copy_(values[name])
