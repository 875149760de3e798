"""What a benchmark found: milliseconds by stage and contender, as frozen values and as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .bench_machine import Machine
from .gemm_peak import GemmPeak

SCHEMA_VERSION = 1
STAGES = ("decode", "preprocess", "image graph", "mask graph", "post-process", "draw")
GRAPHS = ("image graph", "mask graph")


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Times of one thing over the rounds.

    median_ms, p95_ms: of the samples; the 95th percentile is interpolated between them.
    samples_ms: one a round, in the order of the rounds.
    """

    median_ms: float
    p95_ms: float
    samples_ms: tuple[float, ...]


def spread_from_samples(samples_ms: Sequence[float]) -> Spread:
    """Median and 95th percentile of one sample or more."""
    values = np.asarray(samples_ms, np.float64)
    return Spread(
        median_ms=float(np.median(values)),
        p95_ms=float(np.percentile(values, 95)),
        samples_ms=tuple(float(value) for value in values),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchRow:
    """One contender with one size, batch and number of prompts.

    contender: its name, such as "openvino int8".
    height, width: pixels that the image graph takes.
    batch: images that go through the graphs at once.
    prompts: texts they are compared with.
    stages: times by stage of `STAGES`; with more images than one, of the two graphs alone.
    total: from the file's bytes to the drawn overlay; with more images than one, both graphs.
    graphs: both graphs.
    new_prompts: the same image once more with other prompts, from its features to its labels; None with more images.
    gflop: billions of operations in both graphs; None where nothing could be counted.
    peak_fraction: these operations in the median time of both graphs, over the best matrix multiplication measured in
        the contender's data type in the same run; None where one of them is not known.
    """

    contender: str
    height: int
    width: int
    batch: int
    prompts: int
    stages: Mapping[str, Spread]
    total: Spread
    graphs: Spread
    new_prompts: Spread | None
    gflop: float | None
    peak_fraction: float | None

    @property
    def images_per_second(self) -> float:
        """Images a second at the median, one run after the other."""
        return 1000 * self.batch / self.total.median_ms


@dataclass(frozen=True, kw_only=True, slots=True)
class ContenderReport:
    """One contender, whether it ran or not.

    name: such as "openvino int8".
    backend, precision: what it is.
    reason: what the backend says of itself; empty if it did not run.
    problem: why it did not run; empty if it did.
    peak_memory_bytes: of a process of its own that opens the model, embeds prompts and segments; None if not measured.
    text_cold: embedding prompts that no cache holds, tokens included.
    text_cached: the same prompts from the disk cache.
    """

    name: str
    backend: str
    precision: str
    reason: str = ""
    problem: str = ""
    peak_memory_bytes: int | None = None
    text_cold: Spread | None = None
    text_cached: Spread | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchResult:
    """What a benchmark found.

    model: name of the bundle.
    picture: what was segmented.
    settings: how it was measured: rounds, warm-up, seed, threads.
    text_prompts, text_templates: how many were embedded for the times of text.
    contenders: all that were asked for, in this order.
    rows: of those that ran.
    peaks: matrix multiplications, measured between the rounds.
    reference_gflop: operations of the reference model for the first size, batch and number of prompts; None if unknown.
    machine: what it ran on.
    notes: what to know when reading the figures.
    """

    model: str
    picture: str
    settings: Mapping[str, Any]
    text_prompts: int
    text_templates: int
    contenders: tuple[ContenderReport, ...]
    rows: tuple[BenchRow, ...]
    peaks: tuple[GemmPeak, ...]
    reference_gflop: float | None
    machine: Machine
    notes: tuple[str, ...]

    @property
    def base_rows(self) -> tuple[BenchRow, ...]:
        """The row of the first size, batch and number of prompts of each contender that ran."""
        first: dict[str, BenchRow] = {}
        for row in self.rows:
            first.setdefault(row.contender, row)
        return tuple(first.values())

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "schema_version": SCHEMA_VERSION,
            "model": self.model,
            "picture": self.picture,
            "settings": dict(self.settings),
            "text": {"prompts": self.text_prompts, "templates": self.text_templates},
            "contenders": [_contender_dict(contender) for contender in self.contenders],
            "rows": [_row_dict(row) for row in self.rows],
            "gemm_peaks": [asdict(peak) for peak in self.peaks],
            "reference_gflop": self.reference_gflop,
            "machine": self.machine.to_dict(),
            "notes": list(self.notes),
        }


def _contender_dict(contender: ContenderReport) -> dict[str, Any]:
    return {
        "name": contender.name,
        "backend": contender.backend,
        "precision": contender.precision,
        "reason": contender.reason,
        "problem": contender.problem,
        "peak_memory_bytes": contender.peak_memory_bytes,
        "text_cold": _spread_dict(contender.text_cold),
        "text_cached": _spread_dict(contender.text_cached),
    }


def _row_dict(row: BenchRow) -> dict[str, Any]:
    return {
        "contender": row.contender,
        "height": row.height,
        "width": row.width,
        "batch": row.batch,
        "prompts": row.prompts,
        "images_per_second": round(row.images_per_second, 3),
        "total": _spread_dict(row.total),
        "graphs": _spread_dict(row.graphs),
        "new_prompts": _spread_dict(row.new_prompts),
        "stages": {stage: _spread_dict(spread) for stage, spread in row.stages.items()},
        "gflop": row.gflop,
        "peak_fraction": row.peak_fraction,
    }


def _spread_dict(spread: Spread | None) -> dict[str, Any] | None:
    if spread is None:
        return None
    return {
        "median_ms": round(spread.median_ms, 4),
        "p95_ms": round(spread.p95_ms, 4),
        "samples_ms": [round(sample, 4) for sample in spread.samples_ms],
    }
