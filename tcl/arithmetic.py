"""Where training computes, and in what precision: the device, autocast, and the loss scale of half precision.

Source: mixed-precision training (Micikevicius et al., ICLR 2018), by torch.amp.
"""

import os

import torch

from tclkit.runtime.errors import ConfigError

_AUTOCAST = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Arithmetic:
    """A device and a precision, resolved.

    device: this process's own; with several CUDA devices the one of its LOCAL_RANK.
    precision: "fp32", "bf16" or "fp16".
    scaler: scales the loss in fp16, so that small gradients do not vanish; does nothing otherwise.
    """

    def __init__(self, device: str = "cpu", precision: str = "fp32") -> None:
        """Resolve a configuration's device and precision.

        Raises:
            ConfigError: CUDA is asked for and there is none, or the device cannot compute bf16.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device is cuda, but torch finds no CUDA device; take device=cpu or auto", key="device")
        self.device = torch.device("cuda", _local_rank()) if device == "cuda" else torch.device("cpu")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            if precision == "bf16" and not torch.cuda.is_bf16_supported():
                raise ConfigError("this CUDA device cannot compute bf16; take precision=fp16", key="precision")
        self.precision = precision
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")

    def autocast(self) -> torch.autocast:
        """A context in which the towers compute in this precision."""
        return torch.autocast(self.device.type, _AUTOCAST[self.precision], enabled=self.precision != "fp32")

    @property
    def peak_memory_bytes(self) -> int:
        """Most memory used so far: CUDA's own of this process, or the process's resident set."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def random_state(self) -> dict[str, torch.Tensor]:
        """The state of every generator that training draws from."""
        state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def set_random_state(self, state: dict[str, torch.Tensor]) -> None:
        """Go on drawing where `random_state` was taken."""
        torch.set_rng_state(state["cpu"])
        if self.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.device)


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0")) % max(1, torch.cuda.device_count())
