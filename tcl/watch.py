"""What a run shows and keeps on the way: curves, pictures, validations and the models that go with them."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tclkit.calib.datasets import Dataset
from tclkit.runtime.prompts import PROTOCOL_TEMPLATES

from .board import Board
from .config import TrainConfig
from .distributed import current_place, wait_for_all
from .grounder_training import GrounderStage
from .journal import add_to_journal, cut_journal, read_journal
from .model import TCL
from .start import Facts
from .validation import ValidationScore, open_validation, validate

_SCORE = "miou_percent"  # with every class asked for
_IMAGE_SIZE = 448  # of the published protocol's windows

Save = Callable[[Path, TCL, Facts, Mapping[str, Any]], None]


class Watch:
    """Does after every step what [monitoring] asks for; draws from no random generator."""

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        stage: GrounderStage,
        facts: Facts,
        *,
        averaged: Callable[[], AbstractContextManager[None]],
        save: Save,
    ) -> None:
        """Open the validation's data, and the board when the first step comes.

        Args:
            config: its [monitoring].
            folder: of the run.
            stage: what is trained.
            facts: of its texts.
            averaged: a context in which the model has the weights that are judged and kept.
            save: writes a model to a path, with more values in its extra.

        Raises:
            InputError: the validation's data are not there.
        """
        self._settings, self._folder, self._stage, self._facts = config.monitoring, folder, stage, facts
        self._averaged, self._save = averaged, save
        self._dataset: Dataset | None = None
        if self._settings.validate_every:
            data = self._settings.validation_data
            self._dataset = open_validation(self._settings.validation, Path(data) if data else None, world=config.world)
        self._board: Board | None = None

    def before_steps(self, step: int) -> None:
        """Forget what was noted after so many steps: those that follow are taken again."""
        if current_place().is_first:
            cut_journal(self._folder / "validation.jsonl", lambda row: row.get("step", 0) <= step)

    def after_step(self, step: int, values: Mapping[str, float]) -> None:
        """Show and keep what is due after so many steps; every process calls it."""
        if self._settings.tensorboard and current_place().is_first:
            self._show(step, values)
        if _is_due(step, self._settings.keep_every) and current_place().is_first:
            with self._averaged():
                self._save(self._folder / f"step-{step}.pt", self._stage.model, self._facts, {})
        if _is_due(step, self._settings.validate_every):
            self._validate(step)

    def close(self) -> None:
        """Write what the board still holds."""
        if self._board is not None:
            self._board.close()

    def _show(self, step: int, values: Mapping[str, float]) -> None:
        board = self._opened_board(step)
        board.add_scalars(step, {f"train/{name}": value for name, value in values.items()})
        if _is_due(step, self._settings.pictures_every) and self._stage.batch is not None:
            with self._averaged():
                board.add_pictures(step, self._stage.model, self._stage.batch, self._facts.tokenizer_json)

    def _opened_board(self, step: int) -> Board:
        if self._board is None:
            self._board = Board(self._folder / "tensorboard", first_step=step)
        return self._board

    def _validate(self, step: int) -> None:
        with self._averaged():
            found = self._score()
            if current_place().is_first:
                self._note(step, found)
        wait_for_all()

    def _score(self) -> ValidationScore:
        assert self._dataset is not None  # opened where validations are due
        return validate(
            self._stage.model,
            self._facts.tokenizer_json,
            self._dataset,
            image_size=self._facts.image_size or _IMAGE_SIZE,
            templates=self._facts.templates or PROTOCOL_TEMPLATES,
            limit=self._settings.validation_limit or None,
        )

    def _note(self, step: int, found: ValidationScore) -> None:
        path, settings = self._folder / "validation.jsonl", self._settings
        row = {"step": step, _SCORE: found.miou, **found.to_dict(), "data": settings.validation_data}
        before = [other.get(_SCORE) for other in read_journal(path) if _on_the_same(other, row)]
        best = max((score for score in before if score is not None), default=float("-inf"))
        if found.miou > best:
            self._save(self._folder / "best.pt", self._stage.model, self._facts, {"validation": row})
        add_to_journal(path, row)
        if self._settings.tensorboard:
            self._opened_board(step).add_scalars(step, {"validation/miou_percent": found.miou})


def _on_the_same(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two validations looked at the same images; those of version 0.1 do not name their folder."""
    ours, theirs = (
        (one.get("benchmark"), one.get("images", {}).get("total"), one.get("data", other["data"]))
        for one in (row, other)
    )
    return ours == theirs


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
