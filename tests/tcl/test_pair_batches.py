import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tclkit.tcl.pair_batches as pair_batches
from tclkit.runtime.errors import ConfigError, InputError
from tclkit.runtime.tokenizer import Tokenizer
from tclkit.tcl.augmentation import Augmentation, AugmentationConfig
from tclkit.tcl.distributed import Place
from tclkit.tcl.pair_batches import PairBatches
from tclkit.tcl.pairs import PairsConfig
from tclkit.tcl.tokenizer_file import pruned_tokenizer_json
from tclkit.tcl.world import every_wording

WORDS = ("red circle", "green star", "blue ring", "red star", "green ring", "blue circle", "red ring", "green circle")
SMALL = AugmentationConfig(size=16)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(pruned_tokenizer_json(every_wording()), 12)


@pytest.fixture
def sources(tmp_path: Path) -> PairsConfig:
    for i in range(4):
        with tarfile.open(tmp_path / f"{i}.tar", "w") as archive:
            for j in range(4):
                stream = io.BytesIO()
                noise = np.random.default_rng(4 * i + j).integers(0, 256, (24, 32, 3), dtype=np.uint8)
                Image.fromarray(noise).save(stream, "PNG")
                for suffix, content in (("png", stream.getvalue()), ("txt", WORDS[(4 * i + j) % 8].encode())):
                    member = tarfile.TarInfo(f"{j}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return PairsConfig(sources=[str(tmp_path / "{0..3}.tar")], seed=5)


def drawn(batches: PairBatches, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    found = [batches.next() for _ in range(count)]
    return [(batch.images_BCHW, batch.token_ids_BL) for batch in found]


def assert_equal(ours, theirs) -> None:
    assert len(ours) == len(theirs)
    for (image, ids), (other_image, other_ids) in zip(ours, theirs, strict=True):
        assert torch.equal(image, other_image)
        assert torch.equal(ids, other_ids)


def test_batches_are_what_the_model_takes(sources, tokenizer):
    batch = PairBatches(sources, SMALL, tokenizer, 3).next()
    assert batch.images_BCHW.shape == (3, 3, 16, 16)
    assert batch.images_BCHW.dtype == torch.float32
    assert batch.token_ids_BL.shape[0] == 3
    assert batch.token_ids_BL.dtype == torch.int64


@pytest.mark.parametrize("workers", [0, 2])
def test_a_position_is_gone_on_from_bit_for_bit(sources, tokenizer, workers):
    whole = PairBatches(sources, SMALL, tokenizer, 3, workers=workers)
    drawn(whole, 3)
    position = whole.position
    rest = drawn(whole, 4)
    other = PairBatches(sources, SMALL, tokenizer, 3, workers=workers)
    other.position = position
    assert_equal(drawn(other, 4), rest)
    assert other.position == whole.position


def test_torchs_generator_is_left_alone(sources, tokenizer):
    batches = PairBatches(sources, SMALL, tokenizer, 3)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    drawn(batches, 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_processes_read_different_pairs(sources, tokenizer, monkeypatch):
    images = []
    plain = AugmentationConfig(size=16, min_crop=1, flip=0, rand_augment=0, colour_jitter=0, erase=0)
    for rank in range(2):
        monkeypatch.setattr(pair_batches, "current_place", lambda rank=rank: Place(rank, 2))
        found = drawn(PairBatches(sources, plain, tokenizer, 4), 2)
        images.append({image.numpy().tobytes() for batch, _ in found for image in batch})
    assert len(images[0]) == len(images[1]) == 8
    assert not images[0] & images[1]


def test_more_readers_than_shards_are_refused_at_once(sources, tokenizer):
    with pytest.raises(InputError, match="fewer shards than the 5 readers"):
        PairBatches(sources, SMALL, tokenizer, 2, workers=5)


def test_sources_are_listed_once_however_many_workers_there_are(sources, tokenizer, monkeypatch):
    """Every worker lists its own part again; in this process one list says whether there is enough for all."""
    listed = []

    class Noting(pair_batches.PairReader):
        def __init__(self, *args, reader, readers):
            listed.append(reader)
            super().__init__(*args, reader=reader, readers=readers)

    monkeypatch.setattr(pair_batches, "PairReader", Noting)
    PairBatches(sources, SMALL, tokenizer, 2, workers=4)
    assert listed == [3]


def test_a_position_of_other_workers_is_refused(sources, tokenizer):
    batches = PairBatches(sources, SMALL, tokenizer, 2)
    with pytest.raises(InputError, match="2 workers, but there are 1"):
        batches.position = {"turn": 0, "readers": [None, None]}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_position_of_other_files_is_refused_in_one_line(sources, tokenizer, tmp_path, workers):
    batches = PairBatches(sources, SMALL, tokenizer, 2, workers=workers)
    batches.next()
    position = batches.position
    (tmp_path / "3.tar").write_bytes((tmp_path / "2.tar").read_bytes()[:-512])
    other = PairBatches(sources, SMALL, tokenizer, 2, workers=workers)
    other.position = position
    with pytest.raises(InputError, match=r"^the files of .* are not those that the run was reading"):
        other.next()


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_pairs_are_counted_and_stop_the_run(tmp_path, tokenizer, workers):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for i in range(9):
            member = tarfile.TarInfo(f"{i}.txt")
            member.size = 3
            archive.addfile(member, io.BytesIO(b"abc"))
    batches = PairBatches(PairsConfig(sources=[str(tmp_path / "a.tar")]), SMALL, tokenizer, 2, workers=workers)
    with pytest.raises(InputError, match=r"^21 of 21 pairs are broken"):
        batches.next()


def test_the_count_of_broken_pairs_is_kept(sources, tokenizer):
    batches = PairBatches(sources, SMALL, tokenizer, 2)
    assert batches.broken == {}
    batches.position = {"turn": 0, "readers": [{"number": 3, "sources": [[0, 0, 3]], "broken": {"image": 1}}]}
    assert batches.broken == {"image": 1}


def test_augmentation_is_decided_by_its_seed():
    image = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    augment = Augmentation(SMALL)
    assert torch.equal(augment(image, 3), augment(image, 3))
    assert not torch.equal(augment(image, 3), augment(image, 4))


def test_without_any_augmentation_the_image_is_only_resized():
    image = np.full((16, 16, 3), 200, np.uint8)
    plain = Augmentation(AugmentationConfig(size=16, min_crop=1, flip=0, colour_jitter=0, rand_augment=0, erase=0))
    assert torch.allclose(plain(image, 0)[0], torch.tensor((200 - 123.675) / 58.395))


def test_the_whole_image_is_kept():
    """Red at the left and green at the right end of an oblong image, all of which is asked for."""
    image = np.zeros((100, 300, 3), np.uint8)
    image[:, :40], image[:, -40:] = (255, 0, 0), (0, 255, 0)
    plain = Augmentation(AugmentationConfig(size=64, min_crop=1, flip=0, colour_jitter=0, rand_augment=0, erase=0))
    red, green = (int((plain(image, 1)[i] > 1).sum()) for i in range(2))
    assert red == green == pytest.approx(64 * 64 * 40 / 300, rel=0.1)


def test_no_generator_of_a_gpu_is_seeded(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    Augmentation(SMALL)(np.zeros((40, 40, 3), np.uint8), 5)
    assert seeded == []


def test_one_pixel_and_grey_images_survive():
    augment = Augmentation(AugmentationConfig(size=16, rand_augment=0))
    assert augment(np.zeros((1, 1, 3), np.uint8), 0).shape == (3, 16, 16)


@pytest.mark.parametrize(
    ("key", "value"), [("size", 0), ("min_crop", 0.0), ("flip", 1.5), ("erase", -0.1), ("rand_augment", 31)]
)
def test_impossible_augmentation_is_refused(key, value):
    with pytest.raises(ConfigError, match=key):
        AugmentationConfig(**{key: value})
