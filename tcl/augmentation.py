"""How an image is changed before it is learnt from.

Source: DeiT's augmentation (Touvron et al., 2021), which GroupViT and TCL train with.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tclkit.runtime.errors import ConfigError

from .batches import images_to_tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentationConfig:
    """How an image is changed before it is learnt from; the defaults are the authors' recipe.

    size: pixels a side.
    min_crop: smallest share of the image's area that is cropped and resized; 1 keeps all of it.
    flip: probability of mirroring.
    colour_jitter: range of brightness, contrast and saturation; it takes RandAugment's place where that is 0.
    rand_augment: magnitude of RandAugment, 0 to 30; 0 is without.
    erase: probability that a rectangle is replaced by noise.
    """

    size: int = 224
    min_crop: float = 0.08
    flip: float = 0.5
    colour_jitter: float = 0.4
    rand_augment: int = 9
    erase: float = 0.25

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"augmentation.size must be 1 pixel or more, not {self.size!r}", key="size")
        for name, low, high in (("min_crop", 1e-6, 1), ("flip", 0, 1), ("colour_jitter", 0, 1), ("erase", 0, 1)):
            if not low <= getattr(self, name) <= high:
                raise ConfigError(
                    f"augmentation.{name} must be in {low}..{high}, not {getattr(self, name)!r}", key=name
                )
        if not 0 <= self.rand_augment <= 30:
            raise ConfigError(
                f"augmentation.rand_augment must be in 0..30, not {self.rand_augment!r}", key="rand_augment"
            )


class Augmentation:
    """Turns an image into what the model learns from, the same for the same seed."""

    def __init__(self, config: AugmentationConfig) -> None:
        from torchvision.transforms import v2  # slow to import, and a configuration alone does not need it

        size = (config.size, config.size)
        if config.min_crop < 1:
            crop = v2.RandomResizedCrop(size, scale=(config.min_crop, 1.0), antialias=True)
        else:  # RandomResizedCrop would cut an oblong image to a ratio of 3:4 to 4:3
            crop = v2.Resize(size, antialias=True)
        steps: list[torch.nn.Module] = [crop, v2.RandomHorizontalFlip(config.flip)]
        if config.rand_augment:
            steps.append(v2.RandAugment(num_ops=2, magnitude=config.rand_augment))
        elif config.colour_jitter:
            steps.append(v2.ColorJitter(*[config.colour_jitter] * 3))
        self._on_bytes = v2.Compose(steps)
        self._erase = v2.RandomErasing(config.erase, value="random")

    def __call__(self, image_hwc: np.ndarray, seed: int) -> Tensor:
        """Augment one image.

        Args:
            image_hwc: (H, W, 3) uint8 RGB.
            seed: decides every random choice; torch's own generators are left as they were.

        Returns:
            (3, size, size) float32, normalised.
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed CUDA's as well
            augmented = np.array(self._on_bytes(Image.fromarray(image_hwc)))
            erased: Tensor = self._erase(images_to_tensor(augmented[None])[0])
            return erased
