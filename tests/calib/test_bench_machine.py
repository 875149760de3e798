import subprocess
import sys
from dataclasses import replace

import pytest

from tclkit.calib.bench_machine import Machine, current_load, describe_machine, peak_memory_bytes

QUIET = Machine(processor="p", usable_cpus=4, system="s", python="3", packages={}, load_before=0.1, load_after=4.0)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [(0.1, 4.0, 0), (None, None, 0), (0.51, 4.0, 1), (0.1, 5.1, 1), (3.0, 9.0, 2)],
)
def test_a_busy_machine_is_announced(before: float | None, after: float | None, expected: int) -> None:
    warnings = replace(QUIET, load_before=before, load_after=after).warnings()
    assert len(warnings) == expected
    assert all("not quiet" in warning for warning in warnings)


def test_this_machine_is_described() -> None:
    machine = describe_machine(load_before=current_load())
    assert machine.processor
    assert machine.usable_cpus >= 1
    assert machine.packages["numpy"]
    assert machine.to_dict()["packages"]["onnxruntime"]


def test_peak_memory_is_this_processes_own() -> None:
    """A child is not charged with what its parent held when it was made."""
    held = bytearray(300_000_000)
    ours = peak_memory_bytes()
    code = "from tclkit.calib.bench_machine import peak_memory_bytes; print(peak_memory_bytes())"
    theirs = int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert ours is not None
    assert ours > len(held)
    assert 1_000_000 < theirs < 150_000_000
