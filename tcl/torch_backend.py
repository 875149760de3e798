"""The reference model as a backend: what a bundle was exported from, run by torch, to judge the bundle's graphs by.

Shapes: B batch, N prompts, M texts, L tokens, D embedding, H W pixels, h w patches, s mask cells a patch side.
"""

import functools
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tclkit.calib import Contender
from tclkit.runtime.backend_inputs import check_features, check_images, check_prompts, check_token_ids
from tclkit.runtime.backends import Features, HostFeatures
from tclkit.runtime.bundle import Bundle
from tclkit.runtime.errors import CheckpointError, ConfigError, InputError
from tclkit.runtime.files import sha256_from_file

from .batches import images_to_tensor
from .checkpoint import load_model
from .model import TCL, TCLConfig, kp_masks, mix_masks, normalize, similarity


class TorchBackend:
    """Runs a TCL model in float32, on the device it lies on, where a bundle's graphs would run; see `Backend`.

    Args:
        model: what the bundle was exported from, in float32; its KP attention is set to the bundle's.
        bundle: says which sizes there are, whether there is a KP branch, and which.
        threads: CPU threads of the whole process; None leaves torch its own choice.

    Raises:
        InputError: threads is below 1.
    """

    name = "torch"
    precision = "fp32"

    def __init__(self, model: TCL, bundle: Bundle, *, threads: int | None = None) -> None:
        if threads is not None:
            if threads < 1:
                raise InputError(f"threads should be 1 or more, found {threads}")
            torch.set_num_threads(threads)
        self._model = model.eval()
        self._model.use_kp_attention(bundle.manifest.provenance.get("kp_attention", "self"))
        self._bundle = bundle
        self._device = next(model.parameters()).device
        where = "CPU" if self._device.type == "cpu" else str(self._device)
        self.reason = f"asked for (torch {torch.__version__}, fp32, {where})"

    @torch.inference_mode()
    def image_features(self, images_BHWC: NDArray[np.uint8]) -> HostFeatures:
        """Embed images of one of the bundle's sizes, normalised as by its image graph; see `Backend.image_features`."""
        check_images(self._bundle, images_BHWC, [image.size for image in self._bundle.manifest.images])
        features = self._model.image_features(images_to_tensor(images_BHWC).to(self._device))
        kp_BDhw = features.kp_BDhw if self._bundle.manifest.has_kp else None
        return HostFeatures(
            grounded=_array(normalize(features.grounded_BDhw, 1)),
            kp=None if kp_BDhw is None else _array(normalize(kp_BDhw, 1)),
        )

    @torch.inference_mode()
    def masks(self, features: Features, text_ND: NDArray[np.float32], kp_w: float) -> NDArray[np.float32]:
        """Compare features with text embeddings; see `Backend.masks`."""
        check_features(self._bundle, features)
        check_prompts(self._bundle, text_ND, kp_w)
        text = torch.tensor(text_ND, device=self._device)  # copied: prompts may be read-only, and torch warns of that
        grounded = torch.from_numpy(features.grounded).to(self._device)
        masks_BNhw = torch.sigmoid(self._model.grounder.mask(similarity(grounded, text)))
        if kp_w > 0:
            masks_BNhw = mix_masks(masks_BNhw, kp_masks(torch.from_numpy(features.kp).to(self._device), text), kp_w)
        return _array(masks_BNhw)

    @torch.inference_mode()
    def encode_text(self, token_ids_ML: NDArray[np.int64]) -> NDArray[np.float32]:
        """Embed texts with CLIP's text tower; see `Backend.encode_text`."""
        check_token_ids(self._bundle, token_ids_ML)
        return _array(self._model.encode_text(torch.tensor(token_ids_ML, device=self._device)))

    def close(self) -> None:
        """Nothing to release: the weights go when the backend does."""


def torch_contender(checkpoint: str | Path, *, clip: str | Path | None = None) -> Contender:
    """The checkpoint of a bundle as one more row of an evaluation, `torch`.

    Args:
        checkpoint: what the bundle was exported from.
        clip: CLIP for a checkpoint that holds none; see `load_model`.

    Raises:
        CheckpointError: there is no such file.
    """
    if not Path(checkpoint).is_file():
        raise CheckpointError(f"there is no file {checkpoint}.", path=str(checkpoint))
    opener = functools.partial(open_torch_backend, checkpoint=checkpoint, clip=clip)
    return Contender(name="torch", identity=f"{sha256_from_file(checkpoint)} {_clip_identity(clip)}", open=opener)


def open_torch_backend(
    bundle: Bundle, threads: int | None = None, *, checkpoint: str | Path, clip: str | Path | None = None
) -> TorchBackend:
    """Load the checkpoint that a bundle was exported from.

    Raises:
        CheckpointError: the checkpoint, or a CLIP file, is not the one that bundle.json names; or see `load_model`.
    """
    given = {"checkpoint_sha256": checkpoint} | ({"clip_sha256": clip} if clip and Path(clip).is_file() else {})
    for key, path in given.items():
        expected = bundle.manifest.provenance.get(key)
        found = sha256_from_file(path)
        if found != expected and (expected is not None or key == "checkpoint_sha256"):
            raise CheckpointError(
                f"{bundle.name} was not exported from {path}: expected SHA-256 {expected}, found {found}. Name the "
                f"file that it was exported from, or export this one: tclkit export {checkpoint} -o FOLDER",
                path=str(path),
                expected=expected,
                found=found,
            )
    return TorchBackend(load_model(checkpoint, clip=clip), bundle, threads=threads)


def random_torch_contender() -> Contender:
    """The reference model with random weights as one more row of a benchmark of speed, `torch`: it needs no checkpoint.

    Time does not depend on the weights; what it finds means nothing.
    """
    return Contender(name="torch", identity="random weights", open=open_random_torch_backend)


def open_random_torch_backend(bundle: Bundle, threads: int | None = None) -> TorchBackend:
    """Build the model a bundle was exported from, of the sizes that bundle.json's provenance states, untrained.

    Raises:
        CheckpointError: the provenance states no sizes, or none that make a model.
    """
    config = bundle.manifest.provenance.get("configs", {}).get("model")
    try:
        if config is None:
            raise ConfigError("there is no provenance.configs.model.")
        model = TCL(TCLConfig.from_dict(config))
    except (ConfigError, TypeError) as error:
        raise CheckpointError(
            f"bundle.json of {bundle.name} does not say what model it was exported from: {error} Export it again: "
            "tclkit export CHECKPOINT -o FOLDER",
        ) from error
    return TorchBackend(model, bundle, threads=threads)


def _clip_identity(clip: str | Path | None) -> str:
    return sha256_from_file(clip) if clip and Path(clip).is_file() else str(clip)


def _array(tensor: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.float().cpu().contiguous().numpy()
    return array
