from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tclkit.calib.bench_inputs import open_picture, prompt_texts, with_random_rest
from tclkit.runtime.errors import InputError
from tclkit.runtime.manifest import Vocabulary
from tclkit.runtime.prompts import PromptSet, check_prompts

THREE = Vocabulary(note="three words", words=("red", "green", "ring", "red"))


def test_the_sample_frame() -> None:
    picture = open_picture(None)
    assert picture.encoded[:2] == b"\xff\xd8"
    assert picture.image_hwc.shape == (720, 1280, 3)
    assert picture.source == "sample scenes, 1280 x 720 JPEG"


def test_a_picture_of_the_users(tmp_path: Path) -> None:
    path = tmp_path / "mine.png"
    Image.fromarray(np.zeros((6, 9, 3), np.uint8)).save(path)
    picture = open_picture(path)
    assert (picture.encoded, picture.source) == (path.read_bytes(), "mine.png, 9 x 6")


def test_an_unreadable_picture_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.jpg"
    path.write_bytes(b"not a picture")
    with pytest.raises(InputError, match=r"mine\.jpg is not an image"):
        open_picture(path)


@pytest.mark.parametrize("vocabulary", [None, THREE], ids=["open", "three words"])
@pytest.mark.parametrize("count", [1, 5, 15])
def test_prompts_are_different(vocabulary: Vocabulary | None, count: int) -> None:
    texts = prompt_texts(count, vocabulary)
    assert len(check_prompts(texts)) == count  # refuses two that are alike
    if vocabulary is not None:
        assert {word for text in texts for word in text.split()} <= set(vocabulary.words)


def test_there_are_ten_thousand_prompts() -> None:
    assert len(set(prompt_texts(10_000, None))) == 10_000


def test_more_prompts_than_words_make() -> None:
    with pytest.raises(InputError, match=r"16 different prompts were asked for, .* Ask for 15 at most"):
        prompt_texts(16, THREE)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_rest_is_random_and_of_unit_length(count: int) -> None:
    embedded = PromptSet(names=("a", "b"), embeddings=np.eye(2, 4, dtype=np.float32), key="k")
    names = [f"p{number}" for number in range(count)]
    filled = with_random_rest(embedded, names, seed=3)
    assert (filled.names, filled.key) == (tuple(names), "k")
    np.testing.assert_array_equal(filled.embeddings[:2], embedded.embeddings[:count])
    np.testing.assert_allclose(np.linalg.norm(filled.embeddings, axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(filled.embeddings, with_random_rest(embedded, names, seed=3).embeddings)
