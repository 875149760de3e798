"""`tclkit train`: from a configuration to a TCL checkpoint, in one run folder.

With [world]: a CLIP on the synthetic world, TCL on that CLIP, and the final evaluation. With [pairs]: TCL on a CLIP, or
on from a TCL model, by image-text pairs.

    runs/NAME/
      config.json         the resolved configuration
      log.jsonl           losses, every ten steps
      last-clip.pt        where an interrupted CLIP stage goes on
      clip.pt             the finished CLIP of a world
      last-grounder.pt    where an interrupted grounder stage goes on
      step-N.pt, best.pt  models on the way, where monitoring asks for them
      validation.jsonl    their scores
      tensorboard/        curves and pictures
      tcl.pt              the finished model: `tclkit export runs/NAME/tcl.pt` takes it from here
      evaluation.json     the final scores in the world

A run that was interrupted, even killed, goes on with the same command and ends with the same bits.
"""

import contextlib
import dataclasses
import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from open_clip.model import CLIP

from tclkit.runtime.errors import CheckpointError, ConfigError
from tclkit.runtime.files import atomic_file
from tclkit.runtime.tokenizer import Tokenizer

from .arithmetic import Arithmetic
from .batches import Batches, WorldBatches
from .checkpoint import load_checkpoint, save_checkpoint
from .clip import ClipConfig, build_clip
from .clip_training import ClipStage
from .config import StageConfig, TrainConfig
from .distributed import current_place, gather_values, wait_for_all
from .evaluate import WorldScore, choose_thresholds, evaluate_on_world
from .grounder_training import GrounderStage
from .loop import ProgressCallback, TrainProgress, digest_of_tensors, run_stage, stopped_error
from .model import TCL
from .moving_average import MovingAverage
from .pair_batches import PairBatches
from .start import Facts, new_model, read_own_clip, start_from_checkpoint, start_from_clip, start_identity, world_facts
from .stopping import StopRequest, stop_on_signals
from .tokenizer_file import vocabulary_size
from .watch import Watch

_MADE_OF = "made_of"  # key of a digest, in tcl.pt and evaluation.json
_GROUNDER_FIRST_SCENE = 1 << 40  # far from every scene that CLIP saw

# Choices that came after version 0.1, and what it did: they are left out of fingerprints where they ask for just that,
# so that its runs can go on.
_SINCE_0_1: Mapping[str, Mapping[str, Any]] = {
    "losses": {"tile": 0, "reference_bugs": False, "image_level": True, "feature_level": True},
    "clip_training": {"accumulate": 1, "scale_lr": False, "ema": 0.0},
    "grounder_training": {"accumulate": 1, "scale_lr": False, "ema": 0.0},
}
_OWN_FILES = (
    "config.json",
    "log.jsonl",
    "last-clip.pt",
    "clip.pt",
    "last-grounder.pt",
    "step-*.pt",
    "best.pt",
    "validation.jsonl",
    "tcl.pt",
    "evaluation.json",
    "broken-batch-*.pt",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingResult:
    """What a run leaves behind.

    checkpoint: the finished model. scores: the final evaluation in the world; none for pairs. seconds: this call took.
    broken: pairs that all processes passed over, by reason.
    """

    checkpoint: Path
    scores: Sequence[WorldScore] = ()
    seconds: float
    broken: Mapping[str, int] = field(default_factory=dict)


def train(
    config: TrainConfig,
    *,
    run_folder: str | Path,
    resume: Literal["auto", "never"] = "auto",
    progress: ProgressCallback | None = None,
) -> TrainingResult:
    """Train what `config` describes, going on where an earlier call with the same folder stopped.

    Over several processes (torchrun) every process calls it with the same folder on a disk that all see. The first one
    writes, evaluates and reports; on the others the result has no scores and its checkpoint may not be written yet.
    SIGINT and SIGTERM end it after a step, with a checkpoint, and between two batches of the evaluation.

    Args:
        config: the whole recipe.
        run_folder: made when missing.
        resume: "never" begins anew and removes what an earlier run left there.
        progress: called after every step of every stage.

    Raises:
        ConfigError: the configuration does not fit itself or this machine, or its start is a file of this run.
        CheckpointError: the folder holds the run of another configuration, or a start cannot be read.
        InputError: the pairs cannot be found, or too many of them are broken.
        TrainingError: a loss is not finite.
        TrainingStoppedError: a signal ended it.
    """
    began = time.monotonic()
    with stop_on_signals() as stop:
        run = _Run(config, Path(run_folder), progress, stop)
        run.open(resume)
        model, facts = run.started_model()
        broken = run.train_grounder(model, facts)
        scores = run.finish(model.eval().cpu(), facts) if current_place().is_first else ()
        return TrainingResult(checkpoint=run.checkpoint, scores=scores, seconds=time.monotonic() - began, broken=broken)


class _Run:
    """One run folder and what happens in it."""

    def __init__(self, config: TrainConfig, folder: Path, progress: ProgressCallback | None, stop: StopRequest) -> None:
        self._config, self._folder, self._progress, self._stop = config, folder, progress, stop
        # One for each stage: a loss scale is no other stage's, whether the run is interrupted between them or not.
        self._clip_arithmetic, self._grounder_arithmetic = (
            Arithmetic(config.device, config.precision) for _ in range(2)
        )
        self._average: MovingAverage | None = None
        self.checkpoint = folder / "tcl.pt"

    def open(self, resume: Literal["auto", "never"]) -> None:
        _require_start_stays(self._config, self._folder, resume)
        if current_place().is_first:
            self._folder.mkdir(parents=True, exist_ok=True)
            _remove_temporaries(self._folder)
            if resume == "never":
                _clear(self._folder)
        wait_for_all()

    def _note_config(self, step: int) -> None:
        """Written once a stage goes on or begins: a run that is refused leaves the other's configuration."""
        if current_place().is_first:
            _write_json(self._folder / "config.json", self._config.to_dict())

    def started_model(self) -> tuple[TCL, Facts]:
        config = self._config
        if config.checkpoint:
            torch.manual_seed(config.seed + 1)
            return start_from_checkpoint(config)
        if config.world_clip is None:
            return start_from_clip(config)
        sizes, settings = config.world_clip
        facts = world_facts(None if config.world is None else config.world.size)
        _require_world_vocabulary(sizes, facts)
        return new_model(config, sizes, self._finished_clip(sizes, settings, facts)), facts

    def _finished_clip(self, sizes: ClipConfig, settings: StageConfig, facts: Facts) -> CLIP:
        config = self._config
        if config.clip_checkpoint:
            return _own_clip(Path(config.clip_checkpoint), sizes)
        fingerprint = _fingerprint(config, "world", "clip", "clip_training", "curriculum")
        finished = self._folder / "clip.pt"
        if finished.exists():
            return _own_clip(finished, sizes, fingerprint)
        require_one_process()
        torch.manual_seed(config.seed)
        clip = build_clip(sizes)
        assert config.world is not None  # where there is a CLIP to train there is a world
        batches = WorldBatches(config.world, facts.tokenizer(sizes.context_length), settings.batch_size)
        stage = ClipStage(settings, config.world, config.curriculum, clip, batches, self._clip_arithmetic)
        run_stage(
            stage,
            self._folder,
            fingerprint=fingerprint,
            save_every=config.save_every,
            progress=self._progress,
            before=[self._note_config],
            stop=self._stop,
        )
        clip = clip.cpu()
        state = {"clip_config": sizes.to_dict(), "clip": clip.state_dict(), "fingerprint": json.dumps(fingerprint)}
        with atomic_file(finished) as temporary:
            torch.save(state, temporary)
        return clip.eval()

    def train_grounder(self, model: TCL, facts: Facts) -> dict[str, int]:
        """Train to the end; returns the pairs that all processes passed over, by reason."""
        config, settings = self._config, self._config.grounder_training
        batches = grounder_batches(config, facts.tokenizer(model.config.clip.context_length))
        stage = GrounderStage(settings, config.grounder, config.losses, model, batches, self._grounder_arithmetic)
        self._average = MovingAverage(model, settings.ema) if settings.ema else None
        with contextlib.closing(
            Watch(config, self._folder, stage, facts, averaged=self._averaged_weights, save=self._save)
        ) as watch:
            run_stage(
                stage,
                self._folder,
                fingerprint=grounder_fingerprint(config),
                save_every=config.save_every,
                progress=self._progress,
                before=[self._note_config, watch.before_steps],
                after=[watch.after_step],
                average=self._average,
                stop=self._stop,
            )
        own = dict(batches.broken) if isinstance(batches, PairBatches) else {}
        return dict(sum(map(Counter, gather_values(own)), Counter()))

    def finish(self, model: TCL, facts: Facts) -> list[WorldScore]:
        """Write the finished model and, in the world, judge it; what stands already is made anew if it is of others."""
        config = self._config
        with self._averaged_weights():
            made_of = _digest(model, _extra(config, facts))
            is_made = _made_of(self.checkpoint) == made_of
            if config.world is None:
                if not is_made:
                    self._save(self.checkpoint, model, facts, {_MADE_OF: made_of})
                return []
            tokenizer = facts.tokenizer(model.config.clip.context_length)
            if not is_made:
                thresholds = choose_thresholds(model, tokenizer, config, progress=self._tell_or_stop)
                self._save(self.checkpoint, model, facts, {"thresholds": thresholds, _MADE_OF: made_of})
            return self._scores(model, tokenizer, made_of)

    def _tell_or_stop(self, progress: TrainProgress) -> None:
        """Progress of what follows the training, which a signal may end too."""
        if self._progress:
            self._progress(progress)
        if self._stop.signal_number:
            raise stopped_error(progress.stage, progress.step, progress.steps, self._stop)

    def _averaged_weights(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._average is None else self._average.in_place()

    def _save(self, path: Path, model: TCL, facts: Facts, more: Mapping[str, Any]) -> None:
        save_checkpoint(path, model, extra={**_extra(self._config, facts), **more})

    def _scores(self, model: TCL, tokenizer: Tokenizer, made_of: str) -> list[WorldScore]:
        path = self._folder / "evaluation.json"
        if path.exists():
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored.get(_MADE_OF) == made_of:
                return [WorldScore(**row) for row in stored["scores"]]
        scores = evaluate_on_world(model, tokenizer, self._config, progress=self._tell_or_stop)
        settings = dataclasses.asdict(self._config.evaluation)
        rows = [dataclasses.asdict(score) for score in scores]
        _write_json(path, {"evaluation": settings, _MADE_OF: made_of, "scores": rows})
        return scores


def require_one_process() -> None:
    """Refuse to train a CLIP by several processes."""
    if current_place().count > 1:
        raise ConfigError(
            "a CLIP is trained by one process; train it so first, then give its clip.pt as clip_checkpoint",
            key="clip_checkpoint",
        )


def grounder_batches(config: TrainConfig, tokenizer: Tokenizer) -> Batches:
    """Where the grounder's pairs come from: the world, or the sources of [pairs]."""
    size = config.grounder_training.batch_size
    if config.pairs is not None:
        return PairBatches(config.pairs, config.augmentation, tokenizer, size, workers=config.workers)
    assert config.world is not None  # a configuration has one of the two
    batches = WorldBatches(config.world, tokenizer, size)
    batches.position = _GROUNDER_FIRST_SCENE
    return batches


def grounder_fingerprint(config: TrainConfig) -> dict[str, Any]:
    """All that decides what the grounder becomes, as plain values."""
    if config.pairs is not None:
        sections = ("pairs", "augmentation", "workers", "grounder", "grounder_training", "losses")
        return _fingerprint(config, *sections) | start_identity(config)
    start = {"checkpoint": start_identity(config)["checkpoint"]} if config.checkpoint else {}
    own_clip = () if config.clip is None else ("clip",)
    return _fingerprint(config, "world", *own_clip, "grounder", "grounder_training", "losses") | start


def _own_clip(path: Path, sizes: ClipConfig, fingerprint: Mapping[str, Any] | None = None) -> CLIP:
    """A finished clip.pt; of this very recipe, when a fingerprint is given."""
    found = read_own_clip(path, fingerprint)
    if found is None:
        raise ConfigError(f"{path} is not a clip.pt of tclkit train, which a [world] needs", key="clip_checkpoint")
    if found[0] != sizes:
        raise ConfigError(f"{path} holds a CLIP of other sizes than [clip] says: {found[0]} against {sizes}")
    return found[1]


def _require_world_vocabulary(sizes: ClipConfig, facts: Facts) -> None:
    size = vocabulary_size(facts.tokenizer_json)
    if sizes.vocab_size != size:
        raise ConfigError(
            f"clip.vocab_size is {sizes.vocab_size}, but the world's vocabulary has {size} tokens; set it so"
        )


def _extra(config: TrainConfig, facts: Facts) -> dict[str, Any]:
    """What the exporter needs besides weights."""
    return {
        "name": config.name,
        "description": config.description,
        **facts.to_extra(),
        "train_config": config.to_dict(),
    }


def _digest(model: TCL, extra: Mapping[str, Any]) -> str:
    """Of all that a finished model and its scores are made of."""
    content = [digest_of_tensors(model.state_dict()), model.config.to_dict(), extra]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _made_of(path: Path) -> str | None:
    """The digest in a finished model; None where there is none that can be read: such a model is made anew."""
    try:
        found = load_checkpoint(path)["extra"].get(_MADE_OF)
    except CheckpointError:
        return None
    return found if isinstance(found, str) else None


def _fingerprint(config: TrainConfig, *sections: str) -> dict[str, Any]:
    values = config.to_dict()
    values["grounder"].pop("kp_w")  # changes what is made of the model, not the model
    for section, choices in _SINCE_0_1.items():
        for key, before in choices.items():
            if values.get(section, {}).get(key) == before:
                values[section].pop(key)
    place = current_place()
    processes = {"processes": place.count} if place.count > 1 else {}
    return {**{name: values[name] for name in ("seed", "precision", *sections)}, **processes}


def _write_json(path: Path, values: Any) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _require_start_stays(config: TrainConfig, folder: Path, resume: Literal["auto", "never"]) -> None:
    """Refuse a start that this run would remove, or write over."""
    named = {"checkpoint": config.checkpoint} | (
        {"clip_checkpoint": config.clip_checkpoint} if resume == "never" else {}
    )
    own = {path.resolve() for path in _own_files(folder)}
    for key, source in named.items():
        if source and Path(source).resolve() in own:
            raise ConfigError(
                f"{key} {source} is one of the files of the run in {folder}, which would not keep it; choose another "
                "run folder, or copy it to elsewhere",
                key=key,
            )


def _clear(folder: Path) -> None:
    for path in _own_files(folder):
        path.unlink(missing_ok=True)
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)


def _remove_temporaries(folder: Path) -> None:
    """Remove what a process that was killed while it wrote has left beside its files."""
    for pattern in _OWN_FILES:
        for path in folder.glob(f".{pattern}.*.tmp"):
            path.unlink(missing_ok=True)


def _own_files(folder: Path) -> Iterator[Path]:
    for pattern in _OWN_FILES:
        yield from folder.glob(pattern)
