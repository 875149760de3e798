import functools
from pathlib import Path
from typing import Any

import pytest

from tclkit.calib.bench_contenders import open_named
from tclkit.calib.bench_memory import MemoryJob, measure_peak_memory
from tclkit.runtime.errors import BackendError


def job(folder: Path, **changes: Any) -> MemoryJob:
    fields: dict[str, Any] = {
        "folder": folder,
        "size": (64, 64),
        "open": functools.partial(open_named, backend="onnxruntime", precision="fp32"),
        "threads": 1,
        "image": None,
        "prompts": ("red", "green"),
    }
    return MemoryJob(**(fields | changes))


def test_a_process_of_its_own(tiny_bundle_folder: Path) -> None:
    """What this process holds is not counted."""
    held = bytearray(700_000_000)
    peak = measure_peak_memory(job(tiny_bundle_folder))
    assert peak is not None
    assert 30_000_000 < peak < len(held)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"open": functools.partial(open_named, backend="onnxruntime", precision="int8")}, "no image graph in int8"),
        ({"image": Path("missing.png")}, "missing.png does not exist"),
        ({"size": (64, 65)}, "no image graph for 64x65"),
    ],
    ids=["precision", "image", "size"],
)
def test_what_goes_wrong_there_is_told_here(tiny_bundle_folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BackendError) as caught:
        measure_peak_memory(job(tiny_bundle_folder, **changes))
    assert message in str(caught.value)
