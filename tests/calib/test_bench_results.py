import json

import pytest

from tclkit.calib.bench_machine import Machine
from tclkit.calib.bench_results import BenchResult, BenchRow, ContenderReport, spread_from_samples


@pytest.mark.parametrize(
    ("samples", "median", "p95"),
    [([3.0], 3.0, 3.0), ([4.0, 1.0], 2.5, 3.85), ([1.0, 2.0, 3.0, 4.0, 100.0], 3.0, 80.8), (list(range(101)), 50, 95)],
)
def test_statistics(samples: list[float], median: float, p95: float) -> None:
    spread = spread_from_samples(samples)
    assert (spread.median_ms, spread.p95_ms) == (pytest.approx(median), pytest.approx(p95))
    assert spread.samples_ms == tuple(samples)


def row(**changes: object) -> BenchRow:
    spread = spread_from_samples([50.0])
    fields = {
        "contender": "onnxruntime fp32",
        "height": 32,
        "width": 64,
        "batch": 1,
        "prompts": 2,
        "stages": {"image graph": spread},
        "total": spread,
        "graphs": spread,
        "new_prompts": None,
        "gflop": None,
        "peak_fraction": None,
    }
    return BenchRow(**(fields | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(("batch", "expected"), [(1, 20.0), (4, 80.0)])
def test_images_a_second(batch: int, expected: float) -> None:
    assert row(batch=batch).images_per_second == pytest.approx(expected)


def test_the_document_keeps_its_form() -> None:
    """Scripts read it: a key that goes or changes its meaning needs another schema_version."""
    machine = Machine(processor="p", usable_cpus=1, system="s", python="3", packages={}, load_before=0, load_after=0)
    result = BenchResult(
        model="m",
        picture="p",
        settings={"rounds": 1},
        text_prompts=1,
        text_templates=1,
        contenders=(ContenderReport(name="onnxruntime fp32", backend="onnxruntime", precision="fp32"),),
        rows=(row(), row(prompts=9)),
        peaks=(),
        reference_gflop=None,
        machine=machine,
        notes=("n",),
    )
    document = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert document["schema_version"] == 1
    assert " ".join(document) == (
        "schema_version model picture settings text contenders rows gemm_peaks reference_gflop machine notes"
    )
    assert " ".join(document["rows"][0]) == (
        "contender height width batch prompts images_per_second total graphs new_prompts stages gflop peak_fraction"
    )
    assert " ".join(document["contenders"][0]) == (
        "name backend precision reason problem peak_memory_bytes text_cold text_cached"
    )
    assert document["rows"][0]["total"] == {"median_ms": 50.0, "p95_ms": 50.0, "samples_ms": [50.0]}
    assert result.base_rows == (result.rows[0],)
