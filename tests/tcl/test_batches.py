"""Batches of the synthetic world."""

import numpy as np
import pytest

import tclkit.tcl.batches as batches_module
from tclkit.runtime.errors import ConfigError
from tclkit.runtime.tokenizer import Tokenizer
from tclkit.tcl.batches import WorldBatches
from tclkit.tcl.tokenizer_file import pruned_tokenizer_json
from tclkit.tcl.world import WorldConfig, every_wording, scene

WORLD = WorldConfig(size=16, max_objects=1)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(pruned_tokenizer_json(every_wording()), 32)


def test_no_caption_is_there_twice_and_the_position_is_gone_on_from(tokenizer: Tokenizer) -> None:
    batches = WorldBatches(WORLD, tokenizer, 40)
    first, position = batches.next(), batches.position
    assert len(np.unique(first.token_ids_BL.numpy(), axis=0)) == 40
    assert position >= 40
    second = batches.next()
    batches.position = position
    assert (batches.next().images_BCHW == second.images_BCHW).all()


def test_a_world_of_too_few_captions_ends_in_one_line(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_module, "_GIVE_UP_AFTER", 200)
    monkeypatch.setattr(batches_module, "scene", lambda world, index: scene(world, index % 5))
    with pytest.raises(
        ConfigError, match=r"needs 8 different captions, but scenes of 1 to 1 objects gave 5, and 200 more"
    ):
        WorldBatches(WORLD, tokenizer, 8).next()
