"""How the gate's verdicts are shown, the same for every command that has some."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ._console import plain, printer, say, table

if TYPE_CHECKING:
    from tclkit.export.gates import Verdict


def show_verdicts(verdicts: Sequence["Verdict"], *, title: str) -> None:
    """Print a table of figures beside what each had to reach, in 80 columns; what fell short is red."""
    figures_of = ("agreement", "mask IoU", "cosine")
    shown = table("artefact", *figures_of, "gate", right=figures_of, title=title)
    for column in shown.columns[1:]:
        column.no_wrap = True
    ran_on = dict.fromkeys(verdict.ran_on for verdict in verdicts)
    for verdict in verdicts:
        failures = verdict.figures.failures(verdict.thresholds)
        figures = [
            _figure(getattr(verdict.figures, name), getattr(verdict.thresholds, name), name in failures)
            for name in ("label_agreement", "mask_iou", "features_cosine")
        ]
        shown.add_row(plain(verdict.artefact), *figures, _word(failures))
    printer().print(shown)
    say(f"ran on   {'; '.join(ran_on)}")


def _figure(found: float, least: float, failed: bool) -> str:
    text = f"{found:.4f}≥{least:g}"
    return f"[red]{text.replace('≥', '<')}[/red]" if failed else text


def _word(failures: Sequence[str]) -> str:
    return "[bold red]failed[/bold red]" if failures else "[green]passed[/green]"
