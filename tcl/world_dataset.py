"""Unseen scenes of the synthetic world as a data set to evaluate on. Needs no torch."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tclkit.calib.benchmarks import Benchmark
from tclkit.calib.datasets import Example, fingerprint_from
from tclkit.runtime.errors import InputError
from tclkit.runtime.manifest import Manifest

from .world import EVALUATION_SEED, OBJECT_NAMES, PALETTE, Palette, WorldConfig, scene

PRESENT = "present"
ALL = "all"
DEFAULT_SCENES = 1024

_BENCHMARK = Benchmark(
    key="shapes",
    title="Synthetic shapes (64 names and the background)",
    root="",
    images="",
    labels="",
    split=None,
    image_suffix="",
    label_suffix="",
    names=OBJECT_NAMES,
    background=True,
    reduce_zero_label=False,
    threshold=None,
    threshold_pamr=None,
    kp_w=None,
    short_side=0,
    long_side=0,
    window=0,
    stride=0,
    published_miou=None,
    published_miou_pamr=None,
    templates=(),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class WorldDataset:
    """A `Dataset` of scenes, each asked twice: for the objects that are in it, and for all names of the palette.

    world: what scenes look like; its seed is one that training never draws from.
    count: how many scenes.
    palette: the objects' colours, and so the names.
    """

    world: WorldConfig
    count: int = DEFAULT_SCENES
    palette: Palette = PALETTE
    views: tuple[str, ...] = field(default=(PRESENT, ALL), init=False)
    fit: str = field(default="whole", init=False)

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InputError(f"an evaluation needs 1 scene or more, got {self.count}")

    @property
    def benchmark(self) -> Benchmark:
        """Classes and prompts: the background, then the palette's names."""
        if self.palette == PALETTE:
            return _BENCHMARK
        title = f"Synthetic shapes ({len(self.palette.names)} names and the background)"
        return replace(_BENCHMARK, title=title, names=self.palette.names)

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        """Name of a scene."""
        return f"scene {index}"

    def load(self, index: int) -> Example:
        """Draw one scene."""
        drawn = scene(self.world, index, palette=self.palette)
        truth = (drawn.label_map + 1).astype(np.uint8)  # background is -1 there
        return Example(image_hwc=drawn.image, truth=truth, prompts={PRESENT: drawn.present, ALL: None})

    def fingerprint(self) -> str:
        """Hex digest of the world; see `Dataset.fingerprint`. Scene i does not depend on how many there are."""
        identity: dict[str, Any] = dataclasses.asdict(self.world)
        if self.palette != PALETTE:  # journals of the default palette stay good
            identity["colours"] = self.palette.colours
        return fingerprint_from(self.benchmark, self.fit, identity)


def evaluation_world(manifest: Manifest) -> WorldConfig:
    """The world that a model was trained on, with the seed of evaluations; our default at the graph's size for others.

    Raises:
        InputError: the model was trained on scenes of the evaluation's seed.
    """
    training = manifest.provenance.get("configs", {}).get("train", {}).get("world")
    if not isinstance(training, Mapping):
        return WorldConfig(size=min(manifest.images[0].height, manifest.images[0].width), seed=EVALUATION_SEED)
    known: dict[str, Any] = {name: training[name] for name in WorldConfig.__dataclass_fields__ if name in training}
    world = WorldConfig(**known)
    if world.seed == EVALUATION_SEED:
        raise InputError(f"{manifest.name} was trained on the very scenes of the evaluation (seed {world.seed})")
    return replace(world, seed=EVALUATION_SEED)
