"""Training the grounder on a frozen CLIP: first its decoder alone, then its CLIP block too.

Source: TCL (Cha et al., CVPR 2023), sections 3.2 and 4.1.
"""

from typing import Literal

import torch
from torch import Tensor

from .batches import Batches
from .config import TrainConfig
from .distributed import parallel
from .model import TCL
from .schedule import parameter_groups


class GrounderStage:
    """TCL as a stage of the training loop."""

    name = "grounder"

    def __init__(self, config: TrainConfig, model: TCL, batches: Batches) -> None:
        self.settings = config.grounder_training
        self.model = model.train()
        self.batches = batches
        self._config = config
        groups = parameter_groups(model, self.settings.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=self.settings.lr, betas=(0.9, 0.999), eps=1e-6)
        self._parallel: torch.nn.Module | None = None
        self._learning = ""

    def losses(self, step: int) -> dict[str, Tensor]:
        """TCL's six weighted losses of the next batch."""
        parallel_model = self._enter("decoder" if step < self._config.grounder.decoder_only_steps else "full")
        batch = self.batches.next()
        with torch.autocast("cpu", torch.bfloat16, enabled=self._config.precision == "bf16"):
            losses: dict[str, Tensor] = parallel_model(
                batch.images_BCHW, batch.token_ids_BL, weights=self._config.losses
            )
        return {name: loss.float() for name, loss in losses.items()}

    def _enter(self, learning: Literal["decoder", "full"]) -> torch.nn.Module:
        """Make the model learn what it should now, and return it as the processes share it."""
        self.model.train_stage(learning)
        if self._parallel is None or (learning != self._learning and not self._config.losses.reference_bugs):
            self._parallel = parallel(self.model)
        self._learning = learning
        return self._parallel

    def after_step(self) -> None:
        """TCL bounds nothing: its temperatures are clamped where they are used."""
