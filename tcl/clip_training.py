"""Training a small CLIP from scratch on the synthetic world, with open_clip's classes and loss.

Source: CLIP (Radford et al., ICML 2021); the loss is open_clip's ClipLoss.
"""

import math

import torch
from open_clip.loss import ClipLoss
from open_clip.model import CLIP
from torch import Tensor

from .arithmetic import Arithmetic
from .batches import Batch, WorldBatches
from .config import CurriculumConfig, StageConfig
from .model import encode_text, normalize
from .schedule import parameter_groups
from .vision import global_embedding, run_trunk
from .world import WorldConfig

_MAX_LOGIT_SCALE = math.log(100)


class ClipStage:
    """CLIP as a stage of the training loop; its batches come from the world that the curriculum has reached."""

    name = "clip"
    frozen = ""

    def __init__(
        self,
        settings: StageConfig,
        world: WorldConfig,
        curriculum: CurriculumConfig,
        model: CLIP,
        batches: WorldBatches,
        arithmetic: Arithmetic,
    ) -> None:
        self.settings, self.batches, self.arithmetic = settings, batches, arithmetic
        self.model = model.to(arithmetic.device).train()
        self.batch: Batch | None = None
        self._world, self._curriculum, self._loss = world, curriculum, ClipLoss()
        groups = parameter_groups(model, settings.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.98))

    def losses(self, step: int) -> dict[str, Tensor]:
        """The symmetric contrastive loss of the next batch."""
        world = self._curriculum.world_at(step / self.settings.steps, self._world)
        self.batch = batch = self.batches.next(world).to(self.arithmetic.device)
        with self.arithmetic.autocast():
            trunk_BLC = run_trunk(self.model.visual, batch.images_BCHW)
            image_BD = global_embedding(self.model.visual, trunk_BLC)
            text_BD = encode_text(self.model, batch.token_ids_BL)
        image_BD, text_BD = normalize(image_BD.float(), -1), normalize(text_BD.float(), -1)
        return {"contrastive_loss": self._loss(image_BD, text_BD, self.model.logit_scale.exp())}

    def backward(self, total: Tensor) -> None:
        """Carry the gradient of the loss to the parameters."""
        torch.autograd.backward(total)

    def after_step(self) -> None:
        """Keep the temperature within CLIP's bounds."""
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, _MAX_LOGIT_SCALE)
