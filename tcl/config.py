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
from .clip import ClipConfig
from .losses import LossWeights
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
    batch_size: image-text pairs a step.
    lr, min_lr: learning rate at its peak and at the end.
    warmup_steps: steps until the peak.
    weight_decay: AdamW's, on every tensor but biases and vectors.
    clip_grad: the gradient's global norm is cut to this.
    """

    steps: int
    batch_size: int
    lr: float
    min_lr: float
    warmup_steps: int
    weight_decay: float = 0.05
    clip_grad: float = 1.0

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


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Everything that decides what `tclkit train` makes.

    name: of the model.
    description: one sentence, kept in the bundle.
    seed: of weights, noise and the order of scenes.
    precision: "fp32", or "bf16" for autocast of the towers.
    save_every: steps between checkpoints to resume from.
    clip_checkpoint: a finished clip.pt to start from instead of training one; empty to train it.
    world: the scenes.
    clip: sizes of the CLIP; vocab_size is that of the world's pruned vocabulary.
    clip_training, curriculum: how CLIP is trained.
    grounder, grounder_training, losses: how TCL is trained on it.
    evaluation: what is measured at the end.
    """

    name: str
    description: str = ""
    seed: int = 0
    precision: str = "fp32"
    save_every: int = 100
    clip_checkpoint: str = ""
    world: WorldConfig
    clip: ClipConfig
    clip_training: StageConfig
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    grounder: GrounderConfig = field(default_factory=GrounderConfig)
    grounder_training: StageConfig
    losses: LossWeights = field(default_factory=LossWeights)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        if self.precision not in ("fp32", "bf16"):
            raise ConfigError(f"precision is {self.precision!r}; choose fp32 or bf16", key="precision")
        if self.save_every < 1:
            raise ConfigError(f"save_every is {self.save_every}; it must be 1 or more", key="save_every")
        for name, size in (("world.size", self.world.size), ("curriculum.small_size", self.curriculum.small_size)):
            if size % self.clip.patch_size:
                raise ConfigError(f"{name} ({size}) must be a multiple of clip.patch_size ({self.clip.patch_size})")
        if self.world.seed in (self.evaluation.seed, self.evaluation.seed + 1):
            raise ConfigError("evaluation.seed equals world.seed: the model would be judged on scenes it has seen")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, one entry a field, one dict a section."""
        return dataclasses.asdict(self)

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
    "clip": ClipConfig,
    "clip_training": StageConfig,
    "curriculum": CurriculumConfig,
    "grounder": GrounderConfig,
    "grounder_training": StageConfig,
    "losses": LossWeights,
    "evaluation": EvaluationConfig,
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
