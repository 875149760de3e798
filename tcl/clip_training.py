"""Training a small CLIP from scratch on the synthetic world, with open_clip's classes and loss.

Source: CLIP (Radford et al., ICML 2021); the loss is open_clip's ClipLoss.
"""

import math

import torch
from open_clip.loss import ClipLoss
from open_clip.model import CLIP
from torch import Tensor

from .batches import WorldBatches
from .config import TrainConfig
from .model import encode_text, normalize
from .schedule import parameter_groups
from .vision import global_embedding, run_trunk

_MAX_LOGIT_SCALE = math.log(100)


class ClipStage:
    """CLIP as a stage of the training loop."""

    name = "clip"

    def __init__(self, config: TrainConfig, model: CLIP, batches: WorldBatches) -> None:
        self.settings = config.clip_training
        self.model = model.train()
        self.batches = batches
        self._config, self._loss = config, ClipLoss()
        groups = parameter_groups(model, self.settings.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=self.settings.lr, betas=(0.9, 0.98))

    def losses(self, step: int) -> dict[str, Tensor]:
        """The symmetric contrastive loss of the next batch."""
        batch = self.batches.next(self._config.curriculum.world_at(step / self.settings.steps, self._config.world))
        with torch.autocast("cpu", torch.bfloat16, enabled=self._config.precision == "bf16"):
            trunk_BLC = run_trunk(self.model.visual, batch.images_BCHW)
            image_BD = global_embedding(self.model.visual, trunk_BLC)
            text_BD = encode_text(self.model, batch.token_ids_BL)
        image_BD, text_BD = normalize(image_BD.float(), -1), normalize(text_BD.float(), -1)
        return {"contrastive_loss": self._loss(image_BD, text_BD, self.model.logit_scale.exp())}

    def after_step(self) -> None:
        """Keep the temperature within CLIP's bounds."""
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, _MAX_LOGIT_SCALE)
