"""A benchmark's figures as tables of text, for a terminal and for Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass

from .bench_results import STAGES, BenchResult, BenchRow, Spread
from .gemm_peak import best_peaks

_NONE = "-"
_REFERENCE = "torch fp32"
_SHORT = {"preprocess": "prepare", "image graph": "image", "mask graph": "masks", "post-process": "post"}


@dataclass(frozen=True, kw_only=True, slots=True)
class TextTable:
    """One table.

    title: what it shows, with units.
    columns: their names.
    right: those whose cells are numbers.
    rows: cells, one a column.
    """

    title: str
    columns: tuple[str, ...]
    right: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def to_markdown(self) -> str:
        """The table in Markdown, below its title."""
        rule = ["---:" if column in self.right else "---" for column in self.columns]
        lines = [" | ".join(cells) for cells in (self.columns, rule, *self.rows)]
        return f"{self.title}\n\n" + "\n".join(f"| {line} |" for line in lines) + "\n"


def tables_from_result(result: BenchResult) -> list[TextTable]:
    """All tables of a benchmark that have something in them."""
    tables = [
        _frames(result),
        _problems(result),
        _stages(result),
        _text_and_memory(result),
        _batches(result),
        _growth(result),
        _peaks(result),
    ]
    return [table for table in tables if table.rows]


def lines_from_result(result: BenchResult) -> list[str]:
    """What was measured on which machine, in a few lines."""
    machine = result.machine
    packages = ", ".join(f"{name} {version}" for name, version in machine.packages.items())
    load = " and ".join("unknown" if one is None else f"{one:g}" for one in (machine.load_before, machine.load_after))
    rounds, seed = result.settings["rounds"], result.settings["seed"]
    lines = [
        f"picture: {result.picture}; {rounds} {'round' if rounds == 1 else 'rounds'}, seed {seed}, medians",
        f"machine: {machine.processor}, {machine.usable_cpus} CPUs, {machine.system}; load before and after: {load}",
        f"versions: Python {machine.python}, {packages}",
    ]
    if result.reference_gflop is not None and result.rows:
        base = result.rows[0]
        counted = "" if base.gflop is None else f"; the graph of {base.contender} takes {three_figures(base.gflop)}"
        lines.append(
            f"matrix products of the first row's work: reference {three_figures(result.reference_gflop)} GFLOP{counted}"
        )
    return lines


def _frames(result: BenchResult) -> TextTable:
    rows = [row for row in result.rows if row.batch == 1]
    shown = {"size": len({(row.height, row.width) for row in rows}) > 1, "times": len(result.base_rows) > 1}
    right = ("prompts", "ms", "p95", "img/s", "times", "GFLOP", "of peak")
    columns = tuple(column for column in ("contender", "size", *right) if shown.get(column, True))
    cells = []
    for row in rows:
        reference = _reference(row, rows)
        of_row = {
            "contender": row.contender,
            "size": _size(row),
            "prompts": str(row.prompts),
            "ms": _ms(row.total),
            "p95": three_figures(row.total.p95_ms),
            "img/s": three_figures(row.images_per_second),
            "times": f"{reference.total.median_ms / row.total.median_ms:.2f}",
            "GFLOP": _NONE if row.gflop is None else three_figures(row.gflop),
            "of peak": _percent(row.peak_fraction),
        }
        cells.append(tuple(of_row[column] for column in columns))
    compared = f"; times: speed against {_reference(rows[0], rows).contender}" if shown["times"] else ""
    title = f"Frames of {result.model}, from the file's bytes to the overlay: median ms{compared}"
    return TextTable(title=title, columns=columns, right=right, rows=tuple(cells))


def _reference(row: BenchRow, rows: Sequence[BenchRow]) -> BenchRow:
    """Torch's row of the same work where there is one, else the first contender's."""
    alike = [other for other in rows if _work(other) == _work(row)]
    return next((other for other in alike if other.contender == _REFERENCE), alike[0])


def _work(row: BenchRow) -> tuple[int, int, int, int]:
    return row.height, row.width, row.batch, row.prompts


def _problems(result: BenchResult) -> TextTable:
    rows = tuple((contender.name, contender.problem) for contender in result.contenders if contender.problem)
    return TextTable(title="Did not run", columns=("contender", "why"), right=(), rows=rows)


def _stages(result: BenchResult) -> TextTable:
    rows = [row for row in result.base_rows if row.batch == 1]
    names = tuple(_SHORT.get(stage, stage) for stage in STAGES)
    right = (*names, "again", "share")
    cells = tuple(
        (row.contender, *(_ms(row.stages.get(stage)) for stage in STAGES), _ms(row.new_prompts), _share(row))
        for row in rows
    )
    work = f"{_size(rows[0])}, {_prompts(rows[0].prompts)}" if rows else ""
    title = f"Where the time goes ({work}), median ms; again: new prompts on the same image, and their share of a frame"
    return TextTable(title=title, columns=("contender", *right), right=right, rows=cells)


def _share(row: BenchRow) -> str:
    return _NONE if row.new_prompts is None else _percent(row.new_prompts.median_ms / row.total.median_ms)


def _text_and_memory(result: BenchResult) -> TextTable:
    ran = [contender for contender in result.contenders if not contender.problem]
    reference = next((one.peak_memory_bytes for one in ran if one.name == _REFERENCE), None)
    right = ("text cold", "text cached", "memory MB", *(["of torch"] if reference else []))
    cells = []
    for one in ran:
        memory = one.peak_memory_bytes
        of_one = [
            one.name,
            _ms(one.text_cold),
            _ms(one.text_cached),
            _NONE if memory is None else f"{memory / 1e6:.0f}",
        ]
        if reference:
            of_one.append(_percent(None if memory is None else memory / reference))
        cells.append(tuple(of_one))
    title = (
        f"{_prompts(result.text_prompts)} x {result.text_templates} templates embedded, without a cache and from it, "
        "median ms; peak memory of a process of its own"
    )
    return TextTable(title=title, columns=("contender", *right), right=right, rows=tuple(cells))


def _batches(result: BenchResult) -> TextTable:
    batches = {row.batch for row in result.rows}
    base = {row.contender: row for row in result.base_rows}
    rows = [row for row in result.rows if max(batches, default=1) > 1 and _is_batch_of(row, base[row.contender])]
    right = ("batch", "ms", "p95", "ms an image", "img/s", "of peak")
    cells = tuple(
        (
            row.contender,
            str(row.batch),
            _ms(row.graphs),
            three_figures(row.graphs.p95_ms),
            three_figures(row.graphs.median_ms / row.batch),
            three_figures(1000 * row.batch / row.graphs.median_ms),
            _percent(row.peak_fraction),
        )
        for row in sorted(rows, key=lambda row: row.batch)
    )
    title = "Images at once, through both graphs alone: median ms"
    return TextTable(title=title, columns=("contender", *right), right=right, rows=cells)


def _is_batch_of(row: BenchRow, base: BenchRow) -> bool:
    return (row.height, row.width, row.prompts) == (base.height, base.width, base.prompts)


def _growth(result: BenchResult) -> TextTable:
    right = ("graphs ms", "time", "arithmetic")
    cells = []
    for base in result.base_rows:
        for row in result.rows:
            if row.contender == base.contender and row is not base and row.gflop is not None and base.gflop is not None:
                time, arithmetic = row.graphs.median_ms / base.graphs.median_ms, row.gflop / base.gflop
                cells.append((row.contender, _change(row, base), _ms(row.graphs), f"{time:.2f}", f"{arithmetic:.2f}"))
    title = "How both graphs grow, as multiples of the first row's"
    return TextTable(title=title, columns=("contender", "with", *right), right=right, rows=tuple(cells))


def _change(row: BenchRow, base: BenchRow) -> str:
    if row.prompts != base.prompts:
        return _prompts(row.prompts)
    return f"batch {row.batch}" if row.batch != base.batch else _size(row)


def _peaks(result: BenchResult) -> TextTable:
    best = best_peaks(result.peaks).values()
    rows = tuple(
        (
            peak.data_type,
            peak.library,
            f"{peak.side} x {peak.side}",
            f"{peak.gflops:.0f}",
            "yes" if peak in best else "",
        )
        for peak in result.peaks
    )
    columns = ("data", "library", "matrices", "GFLOP/s", "is the peak")
    return TextTable(
        title="Matrix multiplication on this machine, best of the run", columns=columns, right=("GFLOP/s",), rows=rows
    )


def _prompts(count: int) -> str:
    return f"{count} prompt{'' if count == 1 else 's'}"


def _size(row: BenchRow) -> str:
    return f"{row.height}x{row.width}"


def _ms(spread: Spread | None) -> str:
    return _NONE if spread is None else three_figures(spread.median_ms)


def three_figures(value: float) -> str:
    """Three figures or so: 0.12, 4.56, 45.6, 456."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _percent(fraction: float | None) -> str:
    return _NONE if fraction is None else f"{fraction * 100:.0f} %" if fraction >= 0.1 else f"{fraction * 100:.1f} %"
