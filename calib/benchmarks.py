"""The eight published benchmarks: where their files lie, what their classes are called, and how they are scored.

They are data (benchmarks.json beside this module), from the unified protocol of TCL (Cha et al., CVPR 2023): class
names as prompts in nine templates, images at 448 pixels on the short side, windows of 448 every 224 pixels, masks
averaged, PAMR on the windows where it is asked for, a constant background channel, mIoU over all pixels of a split.
"""

import difflib
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tclkit.runtime.errors import InputError
from tclkit.runtime.manifest import Manifest

IGNORED: Final = 255
"""Value of a label map that no benchmark counts."""

BACKGROUND_NAME: Final = "background"

PREPARED: Final = ("coco_stuff", "coco_object", "context", "context59", "cityscapes")
"""Benchmarks whose label maps have to be made with `prepare_labels`; the others' are used as they are shipped."""

_FILE = Path(__file__).with_name("benchmarks.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """One benchmark.

    key: its name here and on the command line.
    title: its name in print.
    root: its folder inside a folder of several data sets.
    images, labels: folders below `root`.
    split: file below `root` that lists the images, one name a line; None takes every image.
    image_suffix, label_suffix: what follows an image's name in its two files.
    names: the N classes that are prompts, exactly as they go into the templates (ADE20K's "bed " ends in a space).
    background: whether label 0 is none of them.
    reduce_zero_label: label 0 is ignored and 1 is the first class.
    threshold, threshold_pamr: value of the background channel without and with PAMR; None without a background.
    kp_w: share of the KP branch.
    short_side, long_side: pixels; an image is scaled to the first unless its long side would pass the second.
    window, stride: pixels of a square window's side, and between windows.
    published_miou, published_miou_pamr: percent, without and with PAMR; None for what nobody published.
    templates: prompt templates, each with one "{}"; none means the model's own.
    """

    key: str
    title: str
    root: str
    images: str
    labels: str
    split: str | None
    image_suffix: str
    label_suffix: str
    names: tuple[str, ...]
    background: bool
    reduce_zero_label: bool
    threshold: float | None
    threshold_pamr: float | None
    kp_w: float | None
    short_side: int
    long_side: int
    window: int
    stride: int
    published_miou: float | None
    published_miou_pamr: float | None
    templates: tuple[str, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the K classes that are scored, in the order of the label maps."""
        return (BACKGROUND_NAME, *self.names) if self.background else self.names

    def published(self, *, pamr: bool) -> float | None:
        """mIoU in percent of the published model, ViT-B/16."""
        return self.published_miou_pamr if pamr else self.published_miou

    def texts(self, names: Sequence[str] | None = None) -> list[list[str]]:
        """Texts of each class, or of other names, (N, T): every template with the name as it stands, by no rule."""
        named = self.names if names is None else names
        return [[template.replace("{}", name) for template in self.templates] for name in named]

    def deviations(self, manifest: Manifest) -> list[str]:
        """What of the protocol a bundle cannot follow, in sentences; none for one like the published."""
        found = []
        sizes = [(image.height, image.width) for image in manifest.images]
        if (self.window, self.window) not in sizes:
            have = ", ".join(f"{height}x{width}" for height, width in sizes)
            found.append(f"windows are not {self.window}x{self.window}: {manifest.name} has image graphs for {have}")
        if not manifest.has_kp and self.kp_w:
            found.append(f"{manifest.name} has no KP branch, the protocol mixes in {self.kp_w:g} of it")
        return found


@functools.lru_cache(maxsize=1)
def published_benchmarks() -> dict[str, Benchmark]:
    """The eight, by key."""
    raw: dict[str, Any] = json.loads(_FILE.read_text(encoding="utf-8"))
    templates = tuple(raw["templates"])
    return {
        key: Benchmark(key=key, templates=templates, **{**values, "names": tuple(values["names"])})
        for key, values in raw["benchmarks"].items()
    }


def benchmark_named(key: str) -> Benchmark:
    """Look a benchmark up.

    Raises:
        InputError: there is none of this name; names the nearest.
    """
    known = published_benchmarks()
    if key not in known:
        (nearest,) = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
        raise InputError(f"no benchmark {key!r}; did you mean {nearest!r}? There are {', '.join(known)}", key=key)
    return known[key]
