import pytest
import torch

from tclkit.runtime.errors import ConfigError
from tclkit.tcl.arithmetic import Arithmetic


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_products_are_computed_in_the_precision(precision, dtype):
    arithmetic = Arithmetic("cpu", precision)
    with arithmetic.autocast():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == dtype
    assert arithmetic.scaler.is_enabled() == (precision == "fp16")


def test_the_random_state_goes_on_where_it_was():
    arithmetic = Arithmetic()
    state = arithmetic.random_state()
    first = torch.rand(3)
    arithmetic.set_random_state(state)
    assert torch.equal(torch.rand(3), first)


def test_memory_is_that_of_the_process():
    before = Arithmetic().peak_memory_bytes
    held = torch.ones(64 << 20, dtype=torch.uint8)
    assert held.sum().item() == 64 << 20
    assert Arithmetic().peak_memory_bytes >= before > 10 << 20


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what the test must lack")
def test_cuda_is_not_replaced():
    with pytest.raises(ConfigError, match="no CUDA device"):
        Arithmetic("cuda")
    assert Arithmetic("auto").device.type == "cpu"
