"""The gate: its three figures, and what falls below."""

import numpy as np
import pytest

from tclkit.export.gate_inputs import default_prompts, prompts_from_file, sample_batches
from tclkit.export.gates import THRESHOLDS, Gate, GateThresholds, require_parity
from tclkit.runtime.backends import Features, HostFeatures
from tclkit.runtime.errors import ConfigError, InputError, ParityError

from .precision_models import shipped_bundle

SIZE, WIDTH = 4, 8


class Painter:
    """Features that are the image's own colours, and masks that are what they say."""

    def __init__(self, masks_Nhw: np.ndarray, features: np.ndarray | None = None, *, with_kp: bool = False) -> None:
        self._masks, self._features, self._with_kp = masks_Nhw.astype(np.float32), features, with_kp

    def image_features(self, images_BHWC: np.ndarray) -> Features:
        base = np.ones((1, WIDTH, SIZE, SIZE), np.float32) if self._features is None else self._features
        grounded = np.repeat(base, len(images_BHWC), 0)
        return HostFeatures(grounded=grounded, kp=grounded if self._with_kp else None)

    def masks(self, features: Features, text_ND: np.ndarray, kp_w: float) -> np.ndarray:
        return np.repeat(self._masks[None], len(features.grounded), 0)


def masks_of(labels: list[list[int]], prompts: int = 3) -> np.ndarray:
    """Masks of 0.9 where a label is, and 0.1 elsewhere; -1 is background."""
    grid = np.array(labels)
    return np.stack([np.where(grid == n, 0.9, 0.1) for n in range(prompts)])


REFERENCE = [[0, 0, 1, 1], [0, 0, 1, 1], [-1, -1, -1, -1], [-1, -1, -1, -1]]


def gate(threshold: float | None = 0.5, reference: list[list[int]] = REFERENCE, batches: int = 2) -> Gate:
    images = [np.zeros((2, SIZE, SIZE, 3), np.uint8)] * batches
    return Gate(Painter(masks_of(reference)), images, np.eye(3, WIDTH, dtype=np.float32), kp_w=0, threshold=threshold)


def test_the_reference_agrees_with_itself() -> None:
    figures = gate().judge(Painter(masks_of(REFERENCE)))
    assert (figures.label_agreement, figures.mask_iou, figures.images, figures.prompts) == (1, 1, 4, 3)
    assert figures.features_cosine == pytest.approx(1, abs=1e-6)
    assert figures.background
    assert figures.failures(GateThresholds(label_agreement=1, mask_iou=1, features_cosine=0.999999)) == []


def test_figures_by_hand() -> None:
    candidate = [[0, 0, 1, 1], [0, 0, 1, -1], [2, -1, -1, -1], [-1, -1, -1, -1]]
    figures = gate().judge(Painter(masks_of(candidate)))
    assert figures.label_agreement == pytest.approx(14 / 16)
    # prompt 0: 4/4; prompt 1: 3/4; background: 7 common of 8 + 8 - 7; prompt 2 does not occur in the reference
    assert figures.mask_iou == pytest.approx((1 + 3 / 4 + 7 / 9) / 3)


def test_cosine_by_hand_and_what_is_not_finite() -> None:
    turned = np.zeros((1, WIDTH, SIZE, SIZE), np.float32)
    turned[:, 0] = 1
    assert gate().judge(Painter(masks_of(REFERENCE), turned)).features_cosine == pytest.approx(WIDTH**-0.5, abs=1e-3)
    turned[0, 0, 0, 0] = np.nan
    figures = gate().judge(Painter(masks_of(REFERENCE), turned))
    assert np.isnan(figures.features_cosine)
    assert figures.failures(THRESHOLDS["int8"]) == ["features_cosine"]


@pytest.mark.parametrize("reference_has_it", [True, False])
def test_a_branch_that_only_one_of_them_has_is_refused(reference_has_it: bool) -> None:
    painters = {has_it: Painter(masks_of(REFERENCE), with_kp=has_it) for has_it in (True, False)}
    images = [np.zeros((2, SIZE, SIZE, 3), np.uint8)]
    text_ND = np.eye(3, WIDTH, dtype=np.float32)
    judge = Gate(painters[reference_has_it], images, text_ND, kp_w=0.3, threshold=0.5).judge
    assert judge(painters[reference_has_it]).label_agreement == 1
    names = ("the reference", "it") if reference_has_it else ("what is judged", "the reference")
    with pytest.raises(ParityError, match=f"{names[0]} has a KP branch and {names[1]} has none.* build-engine"):
        judge(painters[not reference_has_it])


def test_labels_go_without_background_where_the_reference_finds_nothing() -> None:
    nothing = np.full((3, SIZE, SIZE), 0.1)
    nothing[1] += 0.1
    images = [np.zeros((1, SIZE, SIZE, 3), np.uint8)]
    made = Gate(Painter(nothing), images, np.eye(3, WIDTH, dtype=np.float32), kp_w=0, threshold=0.5)
    other = nothing.copy()
    other[2, :2] += 0.3
    figures = made.judge(Painter(other))
    assert not figures.background
    assert figures.label_agreement == 0.5


def test_what_is_below_is_refused_with_figures_and_remedies() -> None:
    figures = gate().judge(Painter(masks_of([[0, 0, 1, 1], [0, 0, 1, -1], [2, -1, -1, -1], [-1, -1, -1, -1]])))
    message = (
        r"image\.int8\.onnx differs too much .* on 4 images: label_agreement 0\.8750 \(needs 0\.97\), mask_iou 0\.8426 "
        r"\(needs 0\.9\)\. The bundle is as it was\. .*--auto.*--decoder-only.*--calibration"
    )
    with pytest.raises(ParityError, match=message) as caught:
        require_parity(figures, THRESHOLDS["int8"], what="image.int8.onnx", precision="int8")
    assert caught.value.values["figures"] is figures


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_thresholds_are_fractions(value: float) -> None:
    with pytest.raises(ConfigError, match="mask_iou is"):
        GateThresholds(label_agreement=1, mask_iou=value, features_cosine=1)


def test_no_images_and_no_prompts_are_refused() -> None:
    with pytest.raises(InputError, match="no images"):
        gate(batches=0)
    with pytest.raises(InputError, match="at least one prompt"):
        Gate(Painter(masks_of(REFERENCE)), [], np.zeros((0, WIDTH), np.float32), kp_w=0, threshold=None)


def test_default_inputs_fit_the_shipped_model() -> None:
    bundle = shipped_bundle()
    prompts = default_prompts(bundle)
    assert len(prompts) == len(set(prompts)) >= 8
    assert "red circle" in prompts
    batches = sample_batches(bundle, (128, 128))
    assert len(batches) == 6 * 2
    assert {(batch.shape, batch.dtype.name) for batch in batches} == {((1, 128, 128, 3), "uint8")}


def test_prompts_from_a_file(tmp_path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("# what the robot handles\na mug\n\n  a plate \na mug\n", encoding="utf-8")
    assert prompts_from_file(path) == ("a mug", "a plate")
    path.write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(InputError, match="holds no prompt"):
        prompts_from_file(path)
    path.write_bytes(b"\xff\xfe\x00mug")
    with pytest.raises(InputError, match="cannot be read as a list of prompts"):
        prompts_from_file(path)
    with pytest.raises(InputError, match="No such file"):
        prompts_from_file(tmp_path / "none.txt")
