"""Prompts are checked in one clear line, and templates make good English of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tclkit.runtime.errors import InputError
from tclkit.runtime.prompts import PROTOCOL_TEMPLATES, PromptSet, check_prompts, expand_prompt, unknown_words

WORLD_TEMPLATES = ("a {}.", "a picture of a {}.", "there is a {}.")


def test_every_published_class_name_gets_every_template_as_published(golden: Path) -> None:
    protocol = json.loads((golden / "protocol.json").read_text(encoding="utf-8"))
    for benchmark in protocol["benchmarks"].values():
        for name in map(str.strip, benchmark["prompt_class_names"]):
            assert expand_prompt(name, PROTOCOL_TEMPLATES) == [t.replace("{}", name) for t in PROTOCOL_TEMPLATES]


BARE = "dog; traffic light; hot dog; two wheeler; half moon; picture; beer can"
PHRASES = """a dog; an apple; the red mug; my cup; this chair; some dogs; two cats; 3 sheep; ten people; all the water;
both of the dogs; lots of cars; someone; everything on the table; two cats on a sofa;
a dog that is sitting on the grass"""
CAPTIONS = """a photo of a dog; photo of a dog; a blurry black-and-white photo of my dog.; a drawing of two cats;
an image with a red circle; art of the dog; itap of a dog; a dog in a video game.; a photo of many dogs;
there is a dog on the sofa; it's a dog; we see a dog; i see a dog; the dog is asleep; dogs are running;
some dog sleeps here.; is that a dog over there?"""


def listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(";")]


@pytest.mark.parametrize("prompt", listed(BARE))
def test_bare_class_names(prompt: str) -> None:
    assert expand_prompt(prompt, PROTOCOL_TEMPLATES) == [t.replace("{}", prompt) for t in PROTOCOL_TEMPLATES]


@pytest.mark.parametrize("prompt", listed(PHRASES))
def test_phrases_are_not_doubled(prompt: str) -> None:
    expected = ["itap of {}.", "a bad photo of {}.", "{}.", "a photo of {}.", "{} in a video game.", "art of {}."]
    assert expand_prompt(prompt, PROTOCOL_TEMPLATES) == [text.replace("{}", prompt) for text in expected]


@pytest.mark.parametrize("prompt", listed(CAPTIONS))
def test_captions_are_used_alone(prompt: str) -> None:
    assert expand_prompt(prompt, PROTOCOL_TEMPLATES) == [prompt]


@pytest.mark.parametrize("prompt", ["red circle", "a red circle", "A Red Circle.", "  a   red circle "])
def test_templates_in_the_wording_of_the_world(prompt: str) -> None:
    expected = ["a red circle.", "a picture of a red circle.", "there is a red circle."]
    assert expand_prompt(prompt, WORLD_TEMPLATES) == expected


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{}", "a dog"),
        ("a photo of a hard to see {}.", "a photo of a dog."),
        ("the {} in a video game.", "a dog in a video game."),
        ("a photo of one {}.", "a photo of a dog."),
        ("a black and white photo of the {}.", "a black and white photo of a dog."),
        ("a photo of my old {}.", "a photo of a dog."),
        ("A {}!", "a dog!"),
        ("several {}s", "a dog"),
        ("view from a car: {}", "view from a car: a dog"),
    ],
)
def test_a_phrase_takes_the_place_of_the_noun_phrase(template: str, expected: str) -> None:
    assert expand_prompt("a dog", [template]) == [expected]


def test_without_templates_the_prompt_stands_alone() -> None:
    assert expand_prompt("Dog", []) == ["dog"]


def test_braces_in_a_prompt_are_text() -> None:
    assert expand_prompt("{} dog {0}", ["a photo of {}."]) == ["a photo of {} dog {0}."]


def test_emoji_and_punctuation() -> None:
    assert expand_prompt("🐶", ["a {}."]) == ["a 🐶."]
    assert expand_prompt("a 🐶", ["a {}."]) == ["a 🐶."]
    assert expand_prompt("?!", ["a {}."]) == ["a ?!."]


@pytest.mark.parametrize("template", ["a photo", "{} {}", ""])
def test_templates_need_one_slot(template: str) -> None:
    with pytest.raises(InputError, match="should hold one"):
        expand_prompt("dog", [template])


def test_checked_prompts_keep_their_spelling_and_order() -> None:
    assert check_prompts([" A  Dog\n", "grass", "🐶"]) == ("A Dog", "grass", "🐶")


@pytest.mark.parametrize("empty", ["", " ", "\t\n", "\u200b", "\x00", "&nbsp;", "\ufeff \u2060"])
def test_an_empty_prompt(empty: str) -> None:
    with pytest.raises(InputError, match="prompt 2 is empty"):
        check_prompts(["dog", empty])
    with pytest.raises(InputError, match="is empty"):
        expand_prompt(empty, PROTOCOL_TEMPLATES)


@pytest.mark.parametrize("twin", ["a dog", "A Dog", " a  dog ", "a&nbsp;dog"])
def test_duplicates_after_cleaning(twin: str) -> None:
    with pytest.raises(InputError, match="prompts 1 and 3 are the same: 'a dog'") as caught:
        check_prompts(["a dog", "grass", twin])
    assert caught.value.values["prompt"] == twin


def test_no_prompts_and_a_text_in_their_place() -> None:
    with pytest.raises(InputError, match="there are no prompts"):
        check_prompts([])
    with pytest.raises(InputError, match=r"\['a dog'\] is a list"):
        check_prompts("a dog")


@pytest.mark.parametrize("prompt", [None, 5, b"dog"])
def test_a_prompt_that_is_no_text(prompt: Any) -> None:
    with pytest.raises(InputError, match="should be a text"):
        check_prompts([prompt])


def test_unknown_words() -> None:
    vocabulary = ["circle", "red", "Blue"]
    assert unknown_words(["a red circle", "the blue circle and red one"], vocabulary) == []
    assert unknown_words(["A Zebra.", "red-white circle", "🐶", "zebra, red"], vocabulary) == ["zebra", "white", "🐶"]
    assert unknown_words([], vocabulary) == []


def unit(count: int = 2, width: int = 4) -> np.ndarray:
    return np.eye(count, width, dtype=np.float32)


def test_prompt_set() -> None:
    prompts = PromptSet(names=("a", "b"), embeddings=unit(), key="k")
    assert len(prompts) == 2


@pytest.mark.parametrize(
    ("names", "embeddings", "message"),
    [
        (("a",), unit(), "1 names for 2 embeddings"),
        ((), unit(0), "at least one"),
        (("a", "b"), unit().astype(np.float64), "float32"),
        (("a", "b"), unit()[0], r"\(N, D\)"),
        (("a", "b"), [[1.0], [1.0]], "float32 array"),
        (("a", "b"), 2 * unit(), "unit length"),
        (("a", "b"), unit() * np.float32("nan"), "finite"),
        (("a", "b", "a"), unit(3), "the name 'a' stands for two prompts or more. Name each thing once"),
    ],
)
def test_a_prompt_set_that_does_not_fit(names: tuple[str, ...], embeddings: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        PromptSet(names=names, embeddings=embeddings, key="k")


def test_embeddings_cannot_be_written_through_their_set() -> None:
    """A Segmenter remembers sets, and hands the same ones out again."""
    given = np.eye(2, dtype=np.float32)
    prompts = PromptSet(names=("a", "b"), embeddings=given, key="k")
    with pytest.raises(ValueError, match="read-only"):
        prompts.embeddings[:] = 0
    given[:] = 0  # the caller's own array stays his
    np.testing.assert_array_equal(prompts.embeddings, np.eye(2))
    assert PromptSet(names=("a", "b"), embeddings=prompts.embeddings, key="k").embeddings is prompts.embeddings
