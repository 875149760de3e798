"""How the gate's verdicts are shown, the same for every command that has some."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ._console import plain, printer, say, table

if TYPE_CHECKING:
    from tclkit.export.gates import Verdict


_REST_WIDTH = 57  # of a row whose thresholds stand beside the figures: all but the artefact's name


def show_verdicts(verdicts: Sequence["Verdict"], *, title: str) -> None:
    """Print a table of figures and what each had to reach, beside or below them; what fell short is red."""
    figures_of = ("agree", "IoU", "cosine")
    shown = table("artefact", *figures_of, "gate", right=figures_of, title=title)
    for column in shown.columns:
        column.no_wrap = True
    console = printer()
    longest = max(len(verdict.artefact) for verdict in verdicts)
    between = "" if longest + _REST_WIDTH <= console.width else "\n"
    if between:
        shown.padding = (0, 1, 0, 0)
    ran_on = dict.fromkeys(verdict.ran_on for verdict in verdicts)
    for verdict in verdicts:
        failures = verdict.figures.failures(verdict.thresholds)
        figures = [
            _figure(getattr(verdict.figures, name), getattr(verdict.thresholds, name), name in failures, between)
            for name in ("label_agreement", "mask_iou", "features_cosine")
        ]
        shown.add_row(plain(verdict.artefact), *figures, _word(failures))
    console.print(shown)
    say(f"ran on   {'; '.join(ran_on)}")


def _figure(found: float, least: float, failed: bool, between: str) -> str:
    return f"[red]{found:.4f}{between}<{least:g}[/red]" if failed else f"{found:.4f}{between}≥{least:g}"


def _word(failures: Sequence[str]) -> str:
    return "[bold red]failed[/bold red]" if failures else "[green]passed[/green]"
