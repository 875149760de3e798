"""Several processes on one batch: where this one stands, and values gathered over all with exact gradients.

torchrun starts the processes, DistributedDataParallel averages their gradients; here is only what the losses need
besides. Every process holds the same number of pairs. Nothing here changes what a single process computes.

Shapes: B rows of one process, R processes, N = R·B.
"""

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True, slots=True)
class Place:
    """This process among all: rank in 0..count-1."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process logs and saves."""
        return self.rank == 0


def current_place() -> Place:
    """Where this process stands; alone, when no process group has been set up."""
    if dist.is_available() and dist.is_initialized():
        return Place(dist.get_rank(), dist.get_world_size())
    return Place()


@contextmanager
def process_group() -> Iterator[Place]:
    """Join the processes that torchrun started (NCCL where there is CUDA, else gloo), and leave them at the end.

    Does nothing but to say the place when torchrun did not start this process or a group has been set up already.
    """
    started_here = int(os.environ.get("WORLD_SIZE", "1")) > 1 and dist.is_available() and not dist.is_initialized()
    if started_here:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield current_place()
    finally:
        if started_here:
            dist.destroy_process_group()


def gather_values(value: Any) -> list[Any]:
    """The plain value of every process, in the order of their ranks, on each."""
    place = current_place()
    found: list[Any] = [value] * place.count
    if place.count > 1:
        dist.all_gather_object(found, value)
    return found


def wait_for_all() -> None:
    """Return when every process has come here."""
    if current_place().count > 1:
        dist.barrier()


def parallel(model: nn.Module) -> nn.Module:
    """Wrap a model so that its gradients are averaged over the processes; alone it is returned as it is.

    What is frozen at this moment is never averaged, even if it learns later: wrap anew after freezing or unfreezing.
    """
    if current_place().count == 1:
        return model
    # The buffers are constants. torch 2.14 has another name for this choice and warns of the old one.
    options = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers"
    unshared: dict[str, Any] = {name: False}
    return DistributedDataParallel(model, **unshared)


def gather(x_B: Tensor) -> Tensor:
    """Join the rows of all processes in the order of their ranks, (B, ...) -> (N, ...).

    The gradient is that of the sum of all processes' losses, so that averaging the parameters' gradients gives the
    gradient of the mean loss.
    """
    if current_place().count == 1:
        return x_B
    joined_N: Tensor = _Gather.apply(x_B)
    return joined_N


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_B: Tensor) -> Tensor:
        sent_B = _sendable(x_B)
        parts = [torch.empty_like(sent_B) for _ in range(current_place().count)]
        dist.all_gather(parts, sent_B)
        return torch.cat(parts).to(x_B.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> Tensor:
        total_N = _sendable(grad_N).clone()
        dist.all_reduce(total_N)
        place = current_place()
        own: Tensor = total_N.chunk(place.count)[place.rank]
        return own.to(grad_N.dtype)


def _sendable(x: Tensor) -> Tensor:
    """Half precision travels as float32: gloo knows it only in newer versions, and sums of it round."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()


@torch.no_grad()
def mean_over_processes(values: dict[str, Tensor]) -> dict[str, float]:
    """Mean of every scalar over the processes, the same on each; a NaN anywhere makes it NaN."""
    place = current_place()
    if place.count == 1:
        return {name: value.item() for name, value in values.items()}
    total = torch.stack([value.detach().double() for value in values.values()])
    dist.all_reduce(total)
    return dict(zip(values, (total / place.count).tolist(), strict=True))
