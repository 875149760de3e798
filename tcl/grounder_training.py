"""Training the grounder on a frozen CLIP: first its decoder alone, then its CLIP block too.

Source: TCL (Cha et al., CVPR 2023), sections 3.2 and 4.1.
"""

from typing import Literal

import torch
from torch import Tensor

from .accumulation import Accumulation
from .arithmetic import Arithmetic
from .batches import Batch, Batches, joined
from .config import GrounderConfig, StageConfig
from .distributed import parallel
from .losses import LossWeights
from .model import TCL
from .schedule import parameter_groups


class GrounderStage:
    """TCL as a stage of the training loop.

    batch: the last step's pairs of this process.
    frozen: what stands before the names of tensors that never change, so that checkpoints to resume from need not hold
        them.
    """

    name = "grounder"
    frozen = "clip."

    def __init__(
        self,
        settings: StageConfig,
        grounder: GrounderConfig,
        losses: LossWeights,
        model: TCL,
        batches: Batches,
        arithmetic: Arithmetic,
    ) -> None:
        self.settings, self.batches, self.arithmetic = settings, batches, arithmetic
        self.model = model.to(arithmetic.device).train()
        self.batch: Batch | None = None
        self._decoder_only_steps, self._weights = grounder.decoder_only_steps, losses
        model.logit_scales["image"].requires_grad_(losses.image_level)
        model.logit_scales["feature"].requires_grad_(losses.feature_level)
        groups = parameter_groups(model, settings.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.999), eps=1e-6)
        self._parallel: torch.nn.Module | None = None
        self._accumulation: Accumulation | None = None
        self._learning = ""

    def losses(self, step: int) -> dict[str, Tensor]:
        """TCL's six weighted losses of the next batch."""
        self._enter("decoder" if step < self._decoder_only_steps else "full")
        parts = [self.batches.next().to(self.arithmetic.device) for _ in range(self.settings.accumulate)]
        self.batch = joined(parts)
        if self._accumulation is not None:
            return self._accumulation.losses(parts)
        assert self._parallel is not None
        with self.arithmetic.autocast():
            losses: dict[str, Tensor] = self._parallel(
                parts[0].images_BCHW, parts[0].token_ids_BL, weights=self._weights
            )
        return {name: loss.float() for name, loss in losses.items()}

    def backward(self, total: Tensor) -> None:
        """Carry the gradient of the losses' sum to the parameters."""
        if self._accumulation is not None:
            self._accumulation.backward(total)
        else:
            torch.autograd.backward(total)

    def after_step(self) -> None:
        """TCL bounds nothing: its temperatures are clamped where they are used."""

    def _enter(self, learning: Literal["decoder", "full"]) -> None:
        """Make the model learn what it should now, and share it among the processes accordingly."""
        self.model.train_stage(learning)
        is_begun = self._parallel is not None or self._accumulation is not None
        if not is_begun or (learning != self._learning and not self._weights.reference_bugs):
            if self.settings.accumulate > 1:
                self._accumulation = Accumulation(self.model, self._weights, self.arithmetic)
            else:
                self._parallel = parallel(self.model)
        self._learning = learning
