"""A benchmark's result made up for tests of what shows it: no figure in it was measured."""

from collections.abc import Sequence

from tclkit.calib.bench_machine import Machine
from tclkit.calib.bench_results import GRAPHS, STAGES, BenchResult, BenchRow, ContenderReport, spread_from_samples
from tclkit.calib.gemm_peak import GemmPeak

_MACHINE = Machine(
    processor="Made-up CPU",
    usable_cpus=2,
    system="Linux",
    python="3.11",
    packages={"tclkit": "0.1.0"},
    load_before=0.0,
    load_after=1.0,
)


def made_up_row(
    contender: str, image_ms: float, *, size: int = 448, batch: int = 1, prompts: int = 20, gflop: float | None = 100.0
) -> BenchRow:
    """A row in which the image graph takes `image_ms` an image, every other stage 1 ms."""
    stages = {
        stage: spread_from_samples([image_ms * batch if stage == "image graph" else 1.0] * 3)
        for stage in (STAGES if batch == 1 else GRAPHS)
    }
    return BenchRow(
        contender=contender,
        height=size,
        width=size,
        batch=batch,
        prompts=prompts,
        stages=stages,
        total=spread_from_samples([sum(spread.median_ms for spread in stages.values())] * 3),
        graphs=spread_from_samples([image_ms * batch + 1] * 3),
        new_prompts=spread_from_samples([2.0] * 3) if batch == 1 else None,
        gflop=None if gflop is None else gflop * batch,
        peak_fraction=None if gflop is None else 0.5,
    )


def made_up_result(rows: Sequence[BenchRow], problems: dict[str, str] | None = None) -> BenchResult:
    """A result with these rows, and contenders that did not run for the reason given."""
    ran = [
        ContenderReport(
            name=name,
            backend=name.split()[0],
            precision=name.split()[1],
            peak_memory_bytes=200_000_000 * (1 + number),
            text_cold=spread_from_samples([30.0]),
            text_cached=spread_from_samples([3.0]),
        )
        for number, name in enumerate(dict.fromkeys(row.contender for row in rows))
    ]
    failed = [
        ContenderReport(name=name, backend=name.split()[0], precision=name.split()[1], problem=problem)
        for name, problem in (problems or {}).items()
    ]
    return BenchResult(
        model="made-up",
        picture="a picture",
        settings={"rounds": 3, "seed": 0},
        text_prompts=20,
        text_templates=9,
        contenders=(*ran, *failed),
        rows=tuple(rows),
        peaks=(GemmPeak(data_type="fp32", library="library 1", side=2048, gflops=400.0),),
        reference_gflop=130.0,
        machine=_MACHINE,
        notes=(),
    )
