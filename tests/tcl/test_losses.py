"""The losses one by one; their parity is in test_training_parity.py."""

import math

import pytest
import torch

from tclkit.runtime.errors import ConfigError
from tclkit.tcl import LossWeights
from tclkit.tcl.losses import (
    contrastive_loss,
    image_similarity,
    mean_areas,
    pool_by_masks,
    sample_hard_masks,
    total_variation,
)


def test_hard_masks_are_zero_or_one_with_soft_gradients():
    logits = torch.randn(4, 5, requires_grad=True)
    noise = torch.rand(4, 5)
    hard = sample_hard_masks(logits, noise)
    assert set(hard.detach().unique().tolist()) <= {0.0, 1.0}
    hard.sum().backward()
    soft = torch.sigmoid(logits.detach() + noise.log() - torch.log1p(-noise))
    assert torch.allclose(logits.grad, soft * (1 - soft), atol=1e-6)


def test_even_noise_is_the_threshold():
    logits = torch.tensor([-1.0, 1.0])
    assert sample_hard_masks(logits, torch.full((2,), 0.5)).tolist() == [0.0, 1.0]


def test_noise_of_zero_gives_no_nan():
    logits = torch.zeros(1, requires_grad=True)
    sample_hard_masks(logits, torch.zeros(1)).backward()
    assert logits.grad.item() == 0


def test_contrast_of_equal_similarities_is_log_n():
    loss = contrastive_loss(torch.zeros(5, 5), torch.tensor(1.0))
    assert loss.item() == pytest.approx(math.log(5), rel=1e-6)


def test_temperature_is_held():
    similarity = torch.rand(3, 3)
    assert contrastive_loss(similarity, torch.tensor(9.0)) == contrastive_loss(similarity, torch.tensor(math.log(100)))


def test_image_similarity_ignores_lengths():
    images, texts = torch.randn(3, 8), torch.randn(5, 8)
    assert torch.allclose(image_similarity(images, texts), image_similarity(7 * images, texts / 3), atol=1e-6)
    assert torch.allclose(image_similarity(images, images).diagonal(), torch.ones(3))


def test_parts_of_a_batch_contrast_like_the_whole():
    """Two processes hold two images and two texts each; every process has its rows and its columns."""
    similarity, scale = torch.rand(4, 4), torch.tensor(1.5)
    parts = [
        contrastive_loss(similarity[own], scale, columns_BN=similarity[:, own].T, first_own=own.start)
        for own in (slice(0, 2), slice(2, 4))
    ]
    assert torch.allclose(sum(parts) / 2, contrastive_loss(similarity, scale))


def test_areas_of_parts_average_to_the_whole():
    area = torch.rand(4, 4)
    parts = [mean_areas(area[:2], 0), mean_areas(area[2:], 2)]
    for whole, one, other in zip(mean_areas(area), *parts, strict=True):
        assert torch.allclose(whole, (one + other) / 2)


def test_pooling_is_a_weighted_mean():
    embedding = torch.randn(2, 3, 4, 4)
    masks = torch.zeros(2, 1, 4, 4)
    masks[:, 0, 1, 2], masks[:, 0, 3, 3] = 0.25, 0.75
    expected = 0.25 * embedding[:, :, 1, 2] + 0.75 * embedding[:, :, 3, 3]
    assert torch.allclose(pool_by_masks(embedding, masks)[:, 0], expected, atol=1e-5)
    assert pool_by_masks(embedding, torch.zeros(2, 1, 4, 4)).abs().max() == 0


def test_areas_are_counted_over_the_batch():
    masks = torch.zeros(2, 2, 4, 4)
    masks[0, 0], masks[0, 1] = 0.8, 0.5
    own, others = mean_areas(masks.mean(dim=(2, 3)))
    assert own.item() == pytest.approx(0.4)
    assert others.item() == pytest.approx(0.25)


def test_total_variation_adds_both_directions():
    x = torch.tensor([[0.0, 1.0], [4.0, 9.0]])
    assert total_variation(x).item() == (1 + 5) / 2 + (4 + 8) / 2
    assert total_variation(torch.ones(2, 3, 5, 6)).item() == 0


@pytest.mark.parametrize(
    ("key", "value"), [("tcl", -1.0), ("area", -0.1), ("area_prior", 1.2), ("tv", -2.0), ("tile", -1)]
)
def test_impossible_weights_are_refused(key, value):
    with pytest.raises(ConfigError, match=key):
        LossWeights(**{key: value})
