import numpy as np
import torch

from tclkit.tcl.batches import Batch, images_to_tensor
from tclkit.tcl.board import Board, caption_from_ids, caption_pictures, reader_of_captions
from tclkit.tcl.tokenizer_file import pruned_tokenizer_json
from tclkit.tcl.world import WorldConfig, every_wording, scene


def a_batch(tiny_model, captions) -> tuple[Batch, str]:
    tokenizer_json = pruned_tokenizer_json(every_wording())
    from tclkit.runtime.tokenizer import Tokenizer

    tokenizer = Tokenizer(tokenizer_json, tiny_model.config.clip.context_length)
    images = np.stack([scene(WorldConfig(size=64), i).image for i in range(len(captions))])
    return Batch(images_to_tensor(images), torch.from_numpy(tokenizer.encode(captions))), tokenizer_json


def test_every_picture_has_its_caption_and_is_the_image(clip_config):
    from tclkit.tcl import TCL, TCLConfig

    torch.manual_seed(0)
    model = TCL(TCLConfig(clip=clip_config(vocab_size=613, context_length=24))).train()
    batch, tokenizer_json = a_batch(model, ["a red circle", "a green star and a blue ring"])
    state = torch.get_rng_state()
    covered = caption_pictures(model, batch, tokenizer_json, threshold=0.0)
    bare = caption_pictures(model, batch, tokenizer_json, threshold=1.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert len(covered) == 2
    image = scene(WorldConfig(size=64), 0).image
    zoom = bare[0].shape[0] // 64
    top_left = bare[0][: 64 * zoom : zoom, : 64 * zoom : zoom]
    assert np.array_equal(top_left, image)
    assert not np.array_equal(covered[0], bare[0])


def test_captions_are_read_back_from_token_ids():
    words = reader_of_captions(pruned_tokenizer_json(every_wording()))
    ids = words.encode("a red circle and a green star.").ids
    padded = torch.tensor([*ids, 0, 0, 0])
    assert caption_from_ids(words, padded) == "a red circle and a green star ."
    assert caption_from_ids(words, torch.tensor([ids[0], ids[-1], 0])) == "(no text)"


def test_a_run_that_goes_on_hides_what_it_does_again(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first in (1, 3):
        board = Board(tmp_path, first_step=first)
        for step in range(first, 6):
            board.add_scalars(step, {"total": float(step + 10 * first)})
        board.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("total")] == [(1, 11), (2, 12), (3, 33), (4, 34), (5, 35)]
