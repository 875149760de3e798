"""Progress of long work, drawn on stderr: bars at a terminal, a line now and then elsewhere."""

import collections
import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

from ._console import say, size_text

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn, TaskID

    from tclkit.tcl.loop import TrainProgress

T = TypeVar("T")
_LINE_EVERY_S = 30.0
_PACE_STEPS = 50


def tracked(items: Sequence[T], description: str, *, shown: bool = True) -> Iterator[T]:
    """Iterate with a bar, where there is one to see: at a terminal to which the results do not go themselves."""
    if not shown or not sys.stderr.isatty() or sys.stdout.isatty():
        yield from items
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with _bars(*columns, transient=True) as progress:
        yield from progress.track(items, description=description)


@contextlib.contextmanager
def training_display() -> Iterator[Callable[["TrainProgress"], None]]:
    """Yield the callback that draws a training run: one bar a stage, with the losses of the last step."""
    if not sys.stderr.isatty():
        yield _TrainingLines()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[pace]}"),
        TextColumn("[dim]{task.fields[losses]}"),
    )
    with _bars(*columns) as progress:
        yield _TrainingBars(progress)


@contextlib.contextmanager
def work_display() -> Iterator["WorkDisplay"]:
    """Yield the display of downloads and of work in named steps: one bar a file, and one for all steps."""
    if not sys.stderr.isatty():
        yield _WorkLines()
        return
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:32}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with _bars(*columns) as progress:
        yield _WorkBars(progress)


class WorkDisplay(Protocol):
    """Callbacks of `work_display`."""

    def download(self, file: str, done_bytes: int, total_bytes: int | None) -> None:
        """Show how far a file has come; `total_bytes` is None when the server does not say."""

    def step(self, what: str, done: int, total: int) -> None:
        """Show which step begins, after how many of all."""

    def phase(self, what: str, done: int, total: int) -> None:
        """Show how far a phase has come; what stands before ": " in `what` names it."""


def _bars(*columns: "ProgressColumn", transient: bool = False) -> "Progress":
    """Rich progress on stderr that leaves stdout alone, whatever it is connected to."""
    from rich.console import Console
    from rich.progress import Progress

    return Progress(*columns, console=Console(stderr=True), transient=transient, redirect_stdout=False)


class _TrainingBars:
    def __init__(self, progress: "Progress") -> None:
        self._progress, self._pace = progress, _Pace()
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, at: "TrainProgress") -> None:
        task = self._tasks.get(at.stage)
        if task is None:
            task = self._tasks[at.stage] = self._progress.add_task(at.stage, total=at.steps, losses="", pace="")
        self._progress.update(task, completed=at.step, losses=_losses_text(at), pace=self._pace(at))


class _TrainingLines:
    def __init__(self) -> None:
        self._last_s, self._pace = -_LINE_EVERY_S, _Pace()

    def __call__(self, at: "TrainProgress") -> None:
        now_s, pace = time.monotonic(), self._pace(at)
        if at.step == at.steps or now_s - self._last_s >= _LINE_EVERY_S:
            self._last_s = now_s
            parts = (f"{at.stage} {at.step}/{at.steps}", pace, _losses_text(at))
            say("  ".join(part for part in parts if part))


class _Pace:
    """Pairs a second over the last steps, and the most memory used."""

    def __init__(self) -> None:
        self._stage, self._since = "", collections.deque[tuple[float, int]](maxlen=_PACE_STEPS)

    def __call__(self, at: "TrainProgress") -> str:
        if at.stage != self._stage:
            self._stage = at.stage
            self._since.clear()
        self._since.append((time.monotonic(), at.step))
        (began_s, first), (now_s, last) = self._since[0], self._since[-1]
        parts = []
        if at.pairs and now_s > began_s:
            parts.append(f"{(last - first) * at.pairs / (now_s - began_s):.0f} pairs/s")
        if at.memory_bytes:
            parts.append(size_text(at.memory_bytes))
        return "  ".join(parts)


class _WorkBars:
    def __init__(self, progress: "Progress") -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def download(self, file: str, done_bytes: int, total_bytes: int | None) -> None:
        self._update(file, file, done_bytes, total_bytes, _bytes_text(done_bytes, total_bytes))

    def step(self, what: str, done: int, total: int) -> None:
        self._update("steps", what, done, total, f"{done}/{total}")

    def phase(self, what: str, done: int, total: int) -> None:
        self._update(what.partition(": ")[0], what, done, total, f"{done}/{total}")

    def _update(self, key: str, description: str, done: int, total: int | None, amount: str) -> None:
        if key not in self._tasks:
            self._tasks[key] = self._progress.add_task(description, total=total, amount=amount)
        self._progress.update(self._tasks[key], description=description, completed=done, total=total, amount=amount)


class _WorkLines:
    def __init__(self) -> None:
        self._last_s = -_LINE_EVERY_S
        self._last_phase = ""

    def download(self, file: str, done_bytes: int, total_bytes: int | None) -> None:
        now_s = time.monotonic()
        if done_bytes == total_bytes or now_s - self._last_s >= _LINE_EVERY_S:
            self._last_s = now_s
            say(f"{file}: {_bytes_text(done_bytes, total_bytes)}")

    def step(self, what: str, done: int, total: int) -> None:
        say(f"[{done}/{total}] {what}")

    def phase(self, what: str, done: int, total: int) -> None:
        now_s = time.monotonic()
        text = f"{what} {done}/{total}"
        if text != self._last_phase and (done == total or now_s - self._last_s >= _LINE_EVERY_S):
            self._last_s, self._last_phase = now_s, text
            say(text)


def _bytes_text(done_bytes: int, total_bytes: int | None) -> str:
    return size_text(done_bytes) + ("" if total_bytes is None else f" of {size_text(total_bytes)}")


def _losses_text(at: "TrainProgress") -> str:
    return "  ".join(f"{name} {value:.3g}" for name, value in at.losses.items())
