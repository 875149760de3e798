"""Training configurations: TOML files, checked before anything runs.

A configuration is a file of its own, or one of those shipped in tcl/configs, named without its suffix. Single values
are overridden as `section.key=value`.
"""

import dataclasses
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tclkit.runtime.errors import ConfigError

from ._strict import dataclass_from_dict
from .augmentation import AugmentationConfig
from .clip import ClipConfig
from .losses import LossWeights
from .pairs import PairsConfig
from .world import EVALUATION_SEED, WorldConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_CONFIGS_FOLDER = Path(__file__).parent / "configs"


@dataclass(frozen=True, kw_only=True, slots=True)
class StageConfig:
    """How one model is optimised: AdamW, linear warm-up, cosine to min_lr.

    steps: optimiser steps in all.
    batch_size: image-text pairs that a process has in memory at a time.
    lr, min_lr: learning rate at its peak and at the end.
    warmup_steps: steps until the peak.
    weight_decay: AdamW's, on every tensor but biases and vectors.
    clip_grad: the gradient's global norm is cut to this.
    accumulate: batches of a process that make up one step; the losses contrast all of them with each other, and with
        those of the other processes, as if they were one batch.
    scale_lr: lr and min_lr are meant for 4096 pairs a step and are scaled to those of all processes.
    ema: decay of the moving average of the weights that is validated and kept, in 0..1; 0 keeps the weights themselves.
    """

    steps: int
    batch_size: int
    lr: float
    min_lr: float
    warmup_steps: int
    weight_decay: float = 0.05
    clip_grad: float = 1.0
    accumulate: int = 1
    scale_lr: bool = False
    ema: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_steps < self.steps:
            raise ConfigError(
                f"0 <= warmup_steps ({self.warmup_steps}) < steps ({self.steps}) does not hold", key="steps"
            )
        if self.batch_size < 2:
            raise ConfigError(f"batch_size is {self.batch_size}; a contrastive loss needs 2 or more", key="batch_size")
        if not 0 <= self.min_lr <= self.lr:
            raise ConfigError(f"0 <= min_lr ({self.min_lr}) <= lr ({self.lr}) does not hold", key="min_lr")
        if self.clip_grad <= 0:
            raise ConfigError(f"clip_grad is {self.clip_grad}; it must be positive", key="clip_grad")
        if self.accumulate < 1:
            raise ConfigError(f"accumulate is {self.accumulate}; it must be 1 or more", key="accumulate")
        if not 0 <= self.ema < 1:
            raise ConfigError(f"ema is {self.ema}; it must be 0 or more and below 1", key="ema")


@dataclass(frozen=True, kw_only=True, slots=True)
class CurriculumConfig:
    """Easy scenes first: single objects, then pairs, then the world's own; and small pictures before full ones.

    single_until, pair_until: fractions of the steps with one object, then with two at most.
    single_max_radius: single objects may be this large, as a fraction of the side.
    small_until: fraction of the steps on small pictures, which cost less.
    small_size: pixels a side of a small picture.
    """

    single_until: float = 0.0
    pair_until: float = 0.0
    single_max_radius: float = 0.45
    small_until: float = 0.0
    small_size: int = 64

    def __post_init__(self) -> None:
        if not 0 <= self.single_until <= self.pair_until <= 1:
            raise ConfigError(
                f"0 <= single_until ({self.single_until}) <= pair_until ({self.pair_until}) <= 1 does not hold"
            )
        if not 0 <= self.small_until <= 1:
            raise ConfigError(f"small_until is {self.small_until}; a fraction in [0, 1] is needed", key="small_until")

    def world_at(self, progress: float, world: WorldConfig) -> WorldConfig:
        """The world to draw from at this fraction of the training."""
        if progress < self.small_until:
            world = replace(world, size=self.small_size)
        if progress < self.single_until:
            return replace(world, max_objects=1, max_radius=max(self.single_max_radius, world.max_radius))
        return replace(world, max_objects=min(2, world.max_objects)) if progress < self.pair_until else world


@dataclass(frozen=True, kw_only=True, slots=True)
class GrounderConfig:
    """The grounder and its two stages.

    decoder_blocks: doublings of the patch grid.
    decoder_only_steps: steps before the grounder's CLIP block learns too.
    initial_gate: where the decoder's gates start. The authors' 0 needs their 50,000 steps to open: an optimiser moves a
        gate by the learning rate a step at most.
    kp_w: weight of the KP branch in the finished model.
    """

    decoder_blocks: int = 2
    initial_gate: float = 0.0
    decoder_only_steps: int = 0
    kp_w: float = 0.3


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """The final evaluation, on scenes that training never draws.

    scenes: how many.
    seed: of their world; must differ from the training world's.
    threshold_scenes: how many more, of seed + 1, choose the model's background threshold.
    batch_size: images at a time.
    """

    scenes: int = 1024
    seed: int = EVALUATION_SEED
    threshold_scenes: int = 256
    batch_size: int = 64

    def __post_init__(self) -> None:
        for name in ("scenes", "threshold_scenes", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"evaluation.{name} is {getattr(self, name)}; it must be 1 or more", key=name)


@dataclass(frozen=True, kw_only=True, slots=True)
class MonitoringConfig:
    """What a run shows and keeps on the way; none of it changes the model.

    tensorboard: write scalars, and pictures where they are asked for, to the run folder's tensorboard/.
    pictures_every: steps between pictures of images with the mask of their caption; 0 for none.
    keep_every: steps between checkpoints that stay, step-N.pt, ready for `tclkit export`; 0 for none.
    validate_every: steps between validations; 0 for none. The best model stays as best.pt.
    validation: what is validated on, by the name that `tclkit eval -b` takes.
    validation_data: its folder, as for `tclkit eval --data`.
    validation_limit: the first so many images only; 0 for all.
    """

    tensorboard: bool = False
    pictures_every: int = 0
    keep_every: int = 0
    validate_every: int = 0
    validation: str = ""
    validation_data: str = ""
    validation_limit: int = 0

    def __post_init__(self) -> None:
        for name in ("pictures_every", "keep_every", "validate_every", "validation_limit"):
            if getattr(self, name) < 0:
                raise ConfigError(f"monitoring.{name} is {getattr(self, name)}; it must be 0 or more", key=name)
        if self.validate_every and not self.validation:
            raise ConfigError(
                "monitoring.validate_every is set, but not monitoring.validation: name a benchmark, folder or shapes",
                key="validation",
            )
        if self.pictures_every and not self.tensorboard:
            raise ConfigError(
                "monitoring.pictures_every is set, but monitoring.tensorboard is false: pictures go there",
                key="pictures_every",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Everything that decides what `tclkit train` makes.

    There are two kinds: one with [world] draws scenes of the synthetic world, trains a CLIP of its own on them and is
    judged there; one with [pairs] reads image-text pairs and stands on a CLIP, or goes on from a TCL model, that is
    there already.

    name: of the model.
    description: one sentence, kept in the bundle.
    seed: of weights, noise and the order of scenes.
    precision: "fp32"; or "bf16" or "fp16" for autocast of the towers, fp16 with a scaled loss.
    device: "cpu", "cuda", or "auto" for CUDA where there is a device.
    workers: processes that read pairs for each training process; 0 reads in it.
    save_every: steps between checkpoints to resume from.
    clip_checkpoint: the CLIP to start from. With [pairs] a file or open_clip's name of one, see `load_clip`; with
        [world] a finished clip.pt, or empty to train it.
    checkpoint: a TCL checkpoint whose weights are the start, ours or the authors'; with clip_checkpoint for one that
        holds no CLIP. Empty: a new grounder.
    world: the scenes.
    pairs, augmentation: the pairs, and how their images are changed.
    clip: sizes of the world's CLIP; vocab_size is that of the world's pruned vocabulary.
    clip_training, curriculum: how that CLIP is trained.
    grounder, grounder_training, losses: how TCL is trained on it.
    evaluation: what is measured in the world at the end.
    monitoring: what is shown and kept on the way.
    """

    name: str
    description: str = ""
    seed: int = 0
    precision: str = "fp32"
    device: str = "auto"
    workers: int = 2
    save_every: int = 100
    clip_checkpoint: str = ""
    checkpoint: str = ""
    world: WorldConfig | None = None
    pairs: PairsConfig | None = None
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    clip: ClipConfig | None = None
    clip_training: StageConfig | None = None
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    grounder: GrounderConfig = field(default_factory=GrounderConfig)
    grounder_training: StageConfig
    losses: LossWeights = field(default_factory=LossWeights)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    monitoring: MonitoringConfig = field(default_factory=MonitoringConfig)

    def __post_init__(self) -> None:
        if self.precision not in ("fp32", "bf16", "fp16"):
            raise ConfigError(f"precision is {self.precision!r}; choose fp32, bf16 or fp16", key="precision")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"device is {self.device!r}; choose auto, cpu or cuda", key="device")
        if self.save_every < 1:
            raise ConfigError(f"save_every is {self.save_every}; it must be 1 or more", key="save_every")
        if self.workers < 0:
            raise ConfigError(f"workers is {self.workers}; it must be 0 or more", key="workers")
        sections = {"world.": self.world, "pairs.": self.pairs, "evaluation.": self.evaluation}
        seeds = {f"{name}seed": section.seed for name, section in sections.items() if section is not None}
        for name, seed in {"seed": self.seed, **seeds}.items():
            if seed < 0:
                raise ConfigError(f"{name} is {seed}; it must be 0 or more", key="seed")
        if self.losses.reference_bugs and self.grounder_training.accumulate > 1:
            raise ConfigError("losses.reference_bugs needs grounder_training.accumulate = 1, as the authors have it")
        if (self.world is None) == (self.pairs is None):
            found = "neither" if self.world is None else "both"
            raise ConfigError(f"there must be either [world] or [pairs] to learn from; there is {found}")
        if self.world is None:
            self._check_pairs()
        else:
            self._check_world(self.world)

    def _check_pairs(self) -> None:
        if not self.clip_checkpoint and not self.checkpoint:
            raise ConfigError(
                "pairs need a CLIP to stand on: set clip_checkpoint (a file, or a name such as ViT-B-16), or "
                "checkpoint to go on from a TCL model",
                key="clip_checkpoint",
            )
        if self.clip is not None or self.clip_training is not None:
            raise ConfigError("[clip] and [clip_training] belong to a [world]; a CLIP is not trained on [pairs]")

    def _check_world(self, world: WorldConfig) -> None:
        if self.world_clip is None and not self.checkpoint:
            raise ConfigError("a [world] needs [clip] and [clip_training], or checkpoint to go on from a TCL model")
        if self.clip_training is not None and (self.clip_training.accumulate > 1 or self.clip_training.ema):
            raise ConfigError("accumulate and ema are for [grounder_training] alone", key="accumulate")
        if self.clip is not None:
            for name, size in (("world.size", world.size), ("curriculum.small_size", self.curriculum.small_size)):
                if size % self.clip.patch_size:
                    raise ConfigError(f"{name} ({size}) must be a multiple of clip.patch_size ({self.clip.patch_size})")
        if world.seed in (self.evaluation.seed, self.evaluation.seed + 1):
            raise ConfigError("evaluation.seed equals world.seed: the model would be judged on scenes it has seen")

    @property
    def world_clip(self) -> tuple[ClipConfig, StageConfig] | None:
        """Sizes and training of the world's own CLIP; None where the configuration has none."""
        if self.clip is None or self.clip_training is None:
            return None
        return self.clip, self.clip_training

    def to_dict(self) -> dict[str, Any]:
        """Plain values, one entry a field, one dict a section; without the sections that are not there."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = "the configuration") -> "TrainConfig":
        """Build from plain values; unknown or missing keys raise ConfigError with the nearest valid name."""
        values = dict(values)
        for name, kind in _SECTIONS.items():
            section = values.get(name)
            if isinstance(section, Mapping):
                values[name] = dataclass_from_dict(kind, section, f"{where}, [{name}]")
        return dataclass_from_dict(cls, values, where)


_SECTIONS: dict[str, type[Any]] = {
    "world": WorldConfig,
    "pairs": PairsConfig,
    "augmentation": AugmentationConfig,
    "clip": ClipConfig,
    "clip_training": StageConfig,
    "curriculum": CurriculumConfig,
    "grounder": GrounderConfig,
    "grounder_training": StageConfig,
    "losses": LossWeights,
    "evaluation": EvaluationConfig,
    "monitoring": MonitoringConfig,
}


def shipped_configs() -> list[str]:
    """Names of the configurations that come with tclkit."""
    return sorted(path.stem for path in _CONFIGS_FOLDER.glob("*.toml"))


def load_config(source: str | Path, overrides: Iterable[str] = ()) -> TrainConfig:
    """Read a configuration.

    Args:
        source: a TOML file, or the name of a shipped configuration.
        overrides: texts "section.key=value"; the value is TOML, a bare word counts as a string.

    Raises:
        ConfigError: the file is missing or no TOML, or a key or value is wrong.
    """
    path = _find(source)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a TOML file: {error}") from error
    for override in overrides:
        _apply(values, override)
    return TrainConfig.from_dict(values, where=str(source))


def _find(source: str | Path) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    shipped = _CONFIGS_FOLDER / f"{source}.toml"
    if path.name == str(source) and shipped.is_file():
        return shipped
    raise ConfigError(
        f"no configuration {str(source)!r}: neither a file nor one of those shipped ({', '.join(shipped_configs())})"
    )


def _apply(values: dict[str, Any], override: str) -> None:
    """Set one "section.key=value" in place."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted.strip():
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    *sections, key = dotted.strip().split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"override {override!r}: {section!r} is a value, not a section")
    values[key] = _toml_value(text.strip())


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
