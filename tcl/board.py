"""TensorBoard: scalars of a run, and pictures of what captions cover."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import tokenizers
import torch
from numpy.typing import NDArray
from torch import Tensor

from tclkit.runtime.drawing import draw_overlay
from tclkit.runtime.errors import ConfigError
from tclkit.runtime.extras import install_command
from tclkit.runtime.labels import BACKGROUND
from tclkit.runtime.tokenizer import shortened
from tclkit.runtime.upsample import resize_masks

from .batches import IMAGE_MEAN, IMAGE_STD, Batch
from .model import TCL, similarity

_PICTURES = 6


class Board:
    """Writes a run's scalars and pictures to a folder that `tensorboard --logdir` shows.

    Raises:
        ConfigError: tensorboard is not installed.
    """

    def __init__(self, folder: Path, *, first_step: int = 0) -> None:
        """Open a folder; what an earlier run has written there from `first_step` on is hidden."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                f"monitoring.tensorboard needs a package: {install_command('train')}. Or set it to false",
                key="tensorboard",
            ) from error
        self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def add_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add one point to the curve of every name."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def add_pictures(self, step: int, model: TCL, batch: Batch, tokenizer_json: str) -> None:
        """Add the first images of a batch, coloured where the model sees their caption."""
        for i, picture_hwc in enumerate(caption_pictures(model, batch, tokenizer_json)):
            self._writer.add_image(f"captions/{i}", picture_hwc, step, dataformats="HWC")

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


def caption_pictures(
    model: TCL, batch: Batch, tokenizer_json: str, *, count: int = _PICTURES, threshold: float = 0.5
) -> list[NDArray[np.uint8]]:
    """Images of a batch with the mask of their own caption and the caption as legend.

    Args:
        model: its mode and random state are left as they are.
        batch: on the model's device.
        tokenizer_json: text of the tokenizer that the batch's captions were tokenised with.
        count: pictures, at most.
        threshold: soft masks above it are coloured.

    Returns:
        (H', W', 3) uint8 each.
    """
    images_BCHW, token_ids_BL = batch.images_BCHW[:count], batch.token_ids_BL[:count]
    with torch.no_grad():
        text_BD = model.encode_text(token_ids_BL)
        features = model.image_features(images_BCHW)
        logits_BNhw = model.grounder.mask(similarity(features.grounded_BDhw, text_BD))
        own_Bhw = torch.sigmoid(logits_BNhw.diagonal(dim1=0, dim2=1).permute(2, 0, 1)).float().cpu().numpy()
    words = reader_of_captions(tokenizer_json)
    height, width = images_BCHW.shape[-2:]
    pictures = []
    for image_CHW, mask_hw, ids_L in zip(images_BCHW, own_Bhw, token_ids_BL, strict=True):
        covered = resize_masks(mask_hw[None], (height, width))[0] > threshold
        labels = np.where(covered, 0, BACKGROUND).astype(np.int16)
        pictures.append(draw_overlay(_bytes(image_CHW), labels, [caption_from_ids(words, ids_L)]))
    return pictures


def reader_of_captions(tokenizer_json: str) -> tokenizers.Tokenizer:
    """A tokenizer whose `decode` gives words, which CLIP's own file does not say how to do."""
    words = tokenizers.Tokenizer.from_str(tokenizer_json)
    words.decoder = tokenizers.decoders.BPEDecoder(suffix="</w>")
    return words


def caption_from_ids(words: tokenizers.Tokenizer, token_ids_L: Tensor) -> str:
    """The text that token ids (L,) stand for, shortened; what stands behind the end-of-text token is padding."""
    end = int(token_ids_L.argmax())  # the largest id of the vocabulary
    return shortened(words.decode(token_ids_L[: end + 1].tolist()).strip() or "(no text)")


def _bytes(image_CHW: Tensor) -> NDArray[np.uint8]:
    mean, std = (torch.tensor(values, device=image_CHW.device).view(3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
    pixels: NDArray[np.uint8] = (
        (image_CHW.float() * std + mean).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
    )
    return np.ascontiguousarray(pixels)
