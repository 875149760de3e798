"""The gate: a compiled artefact against the float32 graph of the same bundle, on images that tuned neither.

Three figures. Label agreement: the share of mask cells that get the same label. Mask IoU: of the cells labelled with a
prompt (or as background) by one and by the other, the share they have in common, all images together, averaged over
the labels that the reference gives to a thousandth of the cells or more. Cosine: the mean over cells between both
artefacts' features, the worse branch. Below a threshold nothing is shipped: ParityError names the figure, the threshold
and the ways on.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tclkit.runtime.backends import Features
from tclkit.runtime.errors import ConfigError, InputError, ParityError

BACKGROUND = -1
_RAREST_LABEL = 1e-3  # share of cells; the IoU of rarer labels hangs on single cells
_SMALLEST_LABELLED = 1e-3  # share of cells; below it the reference finds nothing, and all would agree on nothing


@dataclass(frozen=True, kw_only=True, slots=True)
class GateThresholds:
    """The least that an artefact must reach, each in 0..1.

    label_agreement: share of mask cells with the same label.
    mask_iou: mean over labels.
    features_cosine: mean over cells.
    """

    label_agreement: float
    mask_iou: float
    features_cosine: float

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 <= value <= 1:
                raise ConfigError(f"{name} is {value}; a threshold of the gate is in 0..1", key=name)

    def with_reserve(self, reserve: float) -> "GateThresholds":
        """Stricter thresholds, which leave this share (0..1) of the allowed loss unused."""
        return GateThresholds(**{name: value + reserve * (1 - value) for name, value in asdict(self).items()})


THRESHOLDS: Mapping[str, GateThresholds] = {
    "fp32": GateThresholds(label_agreement=0.999, mask_iou=0.995, features_cosine=0.9999),
    "fp16": GateThresholds(label_agreement=0.995, mask_iou=0.98, features_cosine=0.999),
    "bf16": GateThresholds(label_agreement=0.995, mask_iou=0.98, features_cosine=0.999),
    "int8": GateThresholds(label_agreement=0.97, mask_iou=0.90, features_cosine=0.98),
}
"""By precision; the fp32 row judges engines and OpenVINO, whose arithmetic differs from ONNX Runtime's."""

_REMEDIES = {
    "fp32": "Report it with the output of tclkit verify --report: an engine in float32 should be exact",
    "fp32 rewritten": "This form of the decoder rounds too coarsely for this model: take --decoder differences, which "
    "adds and subtracts only, or --decoder direct",
    "fp16": "Some values may be too large for half precision: give images of your own kind (--calibration FOLDER), so "
    "that the layers in question are found and stay in float32; or take --fp32",
    "bf16": "bfloat16 keeps three digits at most, and this model needs more of them: take --fp32, or --int8, which may "
    "lose less where the layers that matter stay out of it (--auto)",
    "int8": "Quantise less: --auto finds the most INT8 that passes, --decoder-only keeps the transformer in half "
    "precision; or calibrate on more images of your own kind (--calibration FOLDER --calibration-images 512)",
    "int8 decoder-only": "Calibrate on more images of your own kind (--calibration FOLDER --calibration-images 512), "
    "try --ranges minmax or entropy, or take --fp16",
    "int8 auto": "The search passed on the images it saw, the gate saw others: give more images of your own kind "
    "(--calibration FOLDER --calibration-images 512), or take --decoder-only or --fp16",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class GateFigures:
    """What the gate measured; see the module. `images` and `prompts` count, `background` says if labels had one."""

    label_agreement: float
    mask_iou: float
    features_cosine: float
    images: int
    prompts: int
    background: bool

    def failures(self, thresholds: GateThresholds) -> list[str]:
        """Names of the figures below their thresholds (or not finite)."""
        return [name for name, least in asdict(thresholds).items() if not getattr(self, name) >= least]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for bundle.json."""
        return asdict(self)


class Judged(Protocol):
    """What the gate can run: any backend, or a graph that is not in a bundle yet."""

    def image_features(self, images_BHWC: NDArray[np.uint8]) -> Features:
        """See `Backend.image_features`."""

    def masks(self, features: Features, text_ND: NDArray[np.float32], kp_w: float) -> NDArray[np.float32]:
        """See `Backend.masks`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Reference:
    """What the float32 graph made of one batch: features in half precision, for memory, and labels."""

    images: NDArray[np.uint8]
    grounded: NDArray[np.float16]
    kp: NDArray[np.float16] | None
    labels: NDArray[np.int16]


class Gate:
    """The float32 reference on some images and prompts, run once; then judges any number of artefacts."""

    def __init__(
        self,
        reference: Judged,
        batches: Iterable[NDArray[np.uint8]],
        text_ND: NDArray[np.float32],
        *,
        kp_w: float,
        threshold: float | None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Run the reference.

        Args:
            reference: the float32 graphs.
            batches: (B, H, W, 3) uint8 each, of the graph's size.
            text_ND: (N, D) embedded prompts.
            kp_w: share of the KP branch in the masks.
            threshold: masks must exceed it, else a cell is background; None: every cell gets some prompt. It is left
                out too, and `GateFigures.background` says so, when the reference finds next to nothing with it.
            progress: called with the number of images done.

        Raises:
            InputError: there are no images, or no prompts.
        """
        if not len(text_ND):
            raise InputError("the gate needs at least one prompt; give some: --prompts FILE")
        self._text, self._kp_w, self._threshold = text_ND, kp_w, threshold
        kept, scores = [], []
        done = 0
        for images in batches:
            features = reference.image_features(images)
            masks = reference.masks(features, text_ND, kp_w)
            kp = None if features.kp is None else features.kp.astype(np.float16)
            kept.append((images, features.grounded.astype(np.float16), kp))
            scores.append((masks.argmax(1).astype(np.int16), masks.max(1)))
            done += len(images)
            if progress:
                progress(done)
        if not kept:
            raise InputError("the gate has no images to judge on; give some: --calibration FOLDER")
        if threshold is not None and np.mean([np.mean(best > threshold) for _, best in scores]) < _SMALLEST_LABELLED:
            self._threshold = None
        self._references = [
            _Reference(images=images, grounded=grounded, kp=kp, labels=self._labels(*one))
            for (images, grounded, kp), one in zip(kept, scores, strict=True)
        ]
        self.images = done

    def judge(self, candidate: Judged, *, progress: Callable[[int], None] | None = None) -> GateFigures:
        """Compare an artefact with the reference.

        Raises:
            ParityError: one of them has a KP branch and the other has none.
        """
        count = len(self._text)
        shared, ours, theirs = (np.zeros(count + 1, np.int64) for _ in range(3))  # the last is background
        cosines: list[list[float]] = []
        done = 0
        for reference in self._references:
            features = candidate.image_features(reference.images)
            if (features.kp is None) != (reference.kp is None):
                has, lacks = ("what is judged", "the reference") if reference.kp is None else ("the reference", "it")
                raise ParityError(
                    f"{has} has a KP branch and {lacks} has none, so they cannot be compared. Make the graph again "
                    "from the bundle's float32 graph: tclkit build-engine"
                )
            masks = candidate.masks(features, self._text, self._kp_w)
            labels = self._labels(masks.argmax(1).astype(np.int16), masks.max(1))
            equal = reference.labels[labels == reference.labels]
            for counts, found in ((shared, equal), (ours, labels), (theirs, reference.labels)):
                counts += np.bincount(found.ravel().astype(np.int64) % (count + 1), minlength=count + 1)
            pairs = [(features.grounded, reference.grounded), (features.kp, reference.kp)]
            cosines.append([_mean_cosine(a, b) for a, b in pairs if a is not None and b is not None])
            done += len(reference.images)
            if progress:
                progress(done)
        occurs = theirs >= max(1, _RAREST_LABEL * theirs.sum())
        return GateFigures(
            label_agreement=float(shared.sum() / theirs.sum()),
            mask_iou=float((shared[occurs] / (ours + theirs - shared)[occurs]).mean()),
            features_cosine=float(np.mean(cosines, axis=0).min()),
            images=done,
            prompts=count,
            background=self._threshold is not None,
        )

    def _labels(self, best: NDArray[np.int16], score: NDArray[np.float32]) -> NDArray[np.int16]:
        if self._threshold is None:
            return best
        return np.where(score > self._threshold, best, np.int16(BACKGROUND)).astype(np.int16)


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What the gate said of one artefact.

    artefact: file name of the graph, or of the engine. figures, thresholds: see the gate.
    ran_on: what ran it when it was judged. against: what it was compared with.
    """

    artefact: str
    precision: str
    figures: GateFigures
    thresholds: GateThresholds
    ran_on: str
    against: str = "the float32 graph"

    @property
    def passed(self) -> bool:
        """Whether no figure is below its threshold."""
        return not self.figures.failures(self.thresholds)


def require_parity(
    figures: GateFigures,
    thresholds: GateThresholds,
    *,
    what: str,
    precision: str,
    tier: str = "all",
    against: str = "the float32 graph",
) -> None:
    """Refuse an artefact below the gate.

    Args:
        figures: of the artefact.
        thresholds: of its precision.
        what: its name, for the message.
        precision, tier: decide which remedies are named.
        against: what it was compared with.

    Raises:
        ParityError: a figure is below its threshold.
    """
    failures = figures.failures(thresholds)
    if failures:
        shown = [f"{name} {getattr(figures, name):.4f} (needs {getattr(thresholds, name)})" for name in failures]
        remedy = _REMEDIES.get(f"{precision} {tier}", _REMEDIES[precision])
        raise ParityError(
            f"{what} differs too much from {against} on {figures.images} images: {', '.join(shown)}. "
            f"The bundle is as it was. {remedy}",
            figures=figures,
            thresholds=thresholds,
            precision=precision,
        )


def _mean_cosine(found_BDhw: NDArray[np.float32], expected_BDhw: NDArray[np.float16]) -> float:
    """Mean cosine of vectors along axis 1; NaN where anything is not finite."""
    a, b = found_BDhw.astype(np.float32, copy=False), expected_BDhw.astype(np.float32)
    lengths = np.sqrt(np.einsum("bdhw,bdhw->bhw", a, a) * np.einsum("bdhw,bdhw->bhw", b, b))
    with np.errstate(invalid="ignore", divide="ignore"):
        return float((np.einsum("bdhw,bdhw->bhw", a, b) / lengths).mean())
