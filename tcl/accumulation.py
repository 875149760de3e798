"""One contrastive batch in several parts, for memory that does not hold it at once; losses and gradients are its own.

Adding up the gradients of small batches would contrast each with itself only. Instead every part is computed twice:
without a graph for the few numbers that the losses take from it, and, once the losses of all parts together have given
the gradients of those numbers, with a graph to carry them on.

Shapes: A parts, B pairs a part, N texts of all processes and parts, D embedding, h w mask grid.
Source: GradCache (Gao et al., 2021), here on similarities and areas instead of embeddings.
"""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tclkit.runtime.errors import InputError

from .arithmetic import Arithmetic
from .batches import Batch
from .distributed import current_place, gather, parallel
from .losses import LossWeights
from .model import TCL, BatchStatistics


class StatisticsModule(nn.Module):
    """`TCL.statistics` as a module's forward, so that DistributedDataParallel can wrap it."""

    def __init__(self, model: TCL) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, images_BCHW: Tensor, text_ND: Tensor, noise_Bhw: Tensor, first_own: int, weights: LossWeights
    ) -> dict[str, Tensor]:
        """The statistics that are there, by name, in float32."""
        found = self.model.statistics(images_BCHW, text_ND, first_own=first_own, noise_Bhw=noise_Bhw, weights=weights)
        values = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
        return {name: value.float() for name, value in values.items() if value is not None}


class Accumulation:
    """The losses of several parts as of one batch.

    Call `losses`, then `backward` on their sum; gradients end up in the model's parameters, averaged over processes.
    """

    def __init__(self, model: TCL, weights: LossWeights, arithmetic: Arithmetic) -> None:
        """Wrap the model; wrap anew when other parameters of it learn.

        Raises:
            InputError: the weights ask for the reference's faults, which belong to undivided batches.
        """
        if weights.reference_bugs:
            raise InputError("reference_bugs is for batches in one part; set accumulate to 1")
        self._model, self._weights, self._arithmetic = model, weights, arithmetic
        self._parallel = parallel(StatisticsModule(model))
        self._calls: list[tuple[Tensor, Tensor, Tensor, int]] = []
        self._leaves: dict[str, Tensor] = {}

    def losses(self, parts: Sequence[Batch]) -> dict[str, Tensor]:
        """Weighted losses of all parts of all processes together; see `TCL.forward`.

        Args:
            parts: of this process, equally many pairs in each.
        """
        model, weights = self._model, self._weights
        with torch.no_grad(), self._arithmetic.autocast():
            text_ND = gather(torch.cat([model.encode_text(part.token_ids_BL) for part in parts]))
            self._calls = self._planned(parts, text_ND)
            found = [self._parallel_forward(call) for call in self._calls]
        joined = {name: _join(name, [one[name] for one in found]) for name in found[0]}
        self._leaves = {name: value.requires_grad_() for name, value in joined.items()}
        leaves = self._leaves
        statistics = BatchStatistics(
            image_similarity_BN=leaves.get("image_similarity_BN"),
            similarity_KBN=leaves["similarity_KBN"],
            area_BN=leaves["area_BN"],
            embedding_variation=leaves["embedding_variation"],
            mask_variation=leaves["mask_variation"],
        )
        return model.losses_from_statistics(statistics, weights)

    def backward(self, total: Tensor) -> None:
        """Carry the gradient of the losses' sum, which may be scaled, to the parameters."""
        scales = [scale for scale in self._model.logit_scales.values() if scale.requires_grad]
        wanted = [*self._leaves.values(), *scales]
        found = torch.autograd.grad(total, wanted, allow_unused=True)
        gradients = dict(zip(self._leaves, found, strict=False))
        # The temperatures' share joins the last part: their gradients are averaged over the processes with the rest.
        temperatures = [
            scale * gradient
            for scale, gradient in zip(scales, found[len(self._leaves) :], strict=True)
            if gradient is not None
        ]
        for index, call in enumerate(self._calls):
            is_last = index == len(self._calls) - 1
            with _unsynchronised(self._parallel, unless=is_last):
                with self._arithmetic.autocast():
                    part = self._parallel_forward(call)
                carried = [(part[name] * gradient).sum() for name, gradient in self._shares(gradients, index).items()]
                torch.autograd.backward(torch.stack(carried + (temperatures if is_last else [])).sum())
        self._calls = []

    def _planned(self, parts: Sequence[Batch], text_ND: Tensor) -> list[tuple[Tensor, Tensor, Tensor, int]]:
        """Arguments of every part's call, with noise that every process draws for all, as one process would."""
        count, place = len(parts[0].images_BCHW), current_place()
        grid = self._model.mask_grid(parts[0].images_BCHW)
        noise_Nhw = torch.rand(len(text_ND), *grid, device=text_ND.device)
        first = place.rank * len(parts) * count
        starts = range(first, first + len(parts) * count, count)
        return [
            (part.images_BCHW, text_ND, noise_Nhw[start : start + count], start)
            for part, start in zip(parts, starts, strict=True)
        ]

    def _parallel_forward(self, call: tuple[Tensor, Tensor, Tensor, int]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = self._parallel(*call, self._weights)
        return found

    def _shares(self, gradients: Mapping[str, Tensor | None], index: int) -> dict[str, Tensor]:
        """The gradients of one part's numbers."""
        parts = len(self._calls)
        shares: dict[str, Tensor] = {}
        for name, gradient in gradients.items():
            if gradient is None:
                continue
            if gradient.ndim == 0:  # a mean over parts
                shares[name] = gradient / parts
            else:
                shares[name] = gradient.chunk(parts, dim=_image_axis(name))[index]
        return shares


def _image_axis(name: str) -> int:
    return 1 if name == "similarity_KBN" else 0


def _join(name: str, parts: Sequence[Tensor]) -> Tensor:
    if parts[0].ndim == 0:
        return torch.stack(list(parts)).mean()
    return torch.cat(list(parts), dim=_image_axis(name))


def _unsynchronised(module: nn.Module, *, unless: bool) -> contextlib.AbstractContextManager[None]:
    """Keep gradients of a wrapped module to this process, for now."""
    if unless or not isinstance(module, DistributedDataParallel):
        return contextlib.nullcontext()
    return module.no_sync()
