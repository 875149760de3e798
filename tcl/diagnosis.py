"""What to look at when a loss or a gradient is not finite: the weights, the gradients and the batch."""

from pathlib import Path

import torch
from torch import Tensor, nn

from tclkit.runtime.files import atomic_file

from .batches import Batch

_NAMED = 3


def diagnosis(model: nn.Module, batch: Batch | None) -> str:
    """Sentences that say what of the batch, the weights and the gradients is not finite."""
    weights = [name for name, p in model.named_parameters() if not _is_finite(p)]
    gradients = [name for name, p in model.named_parameters() if p.grad is not None and not _is_finite(p.grad)]
    said = [_named("weights", weights), _largest(model), _named("gradients", gradients)]
    if batch is not None:
        pictures = [str(i) for i, image in enumerate(batch.images_BCHW) if not _is_finite(image)]
        said.append(_named("images of the batch", pictures))
        said.append(f"Its images lie in {batch.images_BCHW.min():.3g}..{batch.images_BCHW.max():.3g}.")
    return " ".join(said)


def save_batch(path: Path, batch: Batch | None, step: int) -> None:
    """Keep a step's pairs of this process, {"step", "images_BCHW", "token_ids_BL"}, readable with weights_only=True."""
    if batch is None:
        return
    with atomic_file(path) as temporary:
        torch.save(
            {"step": step, "images_BCHW": batch.images_BCHW.cpu(), "token_ids_BL": batch.token_ids_BL.cpu()}, temporary
        )


def _largest(model: nn.Module) -> str:
    size, name = max((float(p.detach().abs().max()), name) for name, p in model.named_parameters())
    return f"The largest weight is {size:.3g}, in {name}."


def _named(what: str, names: list[str]) -> str:
    if not names:
        return f"All {what} are finite."
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"Not finite among the {what}: {', '.join(names[:_NAMED])}{more}."


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
