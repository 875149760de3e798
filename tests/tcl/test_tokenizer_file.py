"""The tokenizer files against the authors' ids and against each other."""

import html
import json
from pathlib import Path

import ftfy
import numpy as np
import pytest
from tokenizers import Tokenizer

from tclkit.runtime.errors import ExportError
from tclkit.tcl import tokenizer_file
from tclkit.tcl.tokenizer_file import clip_tokenizer_json, pruned_tokenizer_json, vocabulary_size

GOLDEN = Path(__file__).parents[1] / "golden"
STRINGS = json.loads((GOLDEN / "tokenizer_strings.json").read_text())["strings"]


def cleaned(text: str) -> str:
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


@pytest.fixture(scope="module")
def whole() -> Tokenizer:
    return Tokenizer.from_str(clip_tokenizer_json())


@pytest.mark.parametrize("index", range(len(STRINGS)))
def test_ids_equal_the_authors(whole: Tokenizer, index: int) -> None:
    expected = np.load(GOLDEN / "tokenizer_ids.npz")["ids"][index]
    ids = whole.encode(cleaned(STRINGS[index])).ids
    if len(ids) > len(expected):
        ids = [*ids[: len(expected) - 1], ids[-1]]
    assert ids + [0] * (len(expected) - len(ids)) == expected.tolist()


def test_every_published_prompt_has_the_authors_ids(whole: Tokenizer) -> None:
    protocol = json.loads((GOLDEN / "protocol.json").read_text())
    tokens = np.load(GOLDEN / "protocol_tokens.npz")
    for name, benchmark in protocol["benchmarks"].items():
        for class_index, word in enumerate(benchmark["prompt_class_names"]):
            for template_index, template in enumerate(protocol["common"]["templates"]):
                ids = whole.encode(cleaned(template.format(word))).ids
                row = tokens[name][class_index, template_index]
                assert ids == row[: len(ids)].tolist(), (name, word, template)
                assert not row[len(ids) :].any()


def test_pruned_file_splits_the_given_texts_as_clip_does(whole: Tokenizer) -> None:
    texts = [cleaned(text) for text in STRINGS]
    pruned = Tokenizer.from_str(pruned_tokenizer_json(texts))
    assert pruned.get_vocab_size() < 1100
    for text in texts:
        assert pruned.encode(text).tokens == whole.encode(text).tokens


def test_pruned_file_splits_given_words_alike_in_any_company(whole: Tokenizer) -> None:
    pruned = Tokenizer.from_str(pruned_tokenizer_json(["a photo of a red circle", "two green stars."]))
    for text in ("green circle", "a photo of two red stars.", "circle circle circle"):
        assert pruned.encode(text).tokens == whole.encode(text).tokens


def test_pruned_ids_run_bytes_merges_start_end() -> None:
    text = pruned_tokenizer_json(["red"])
    pruned = Tokenizer.from_str(text)
    merges = json.loads(text)["model"]["merges"]
    assert merges == ["r e", "re d</w>"]
    assert vocabulary_size(text) == pruned.get_vocab_size() == 512 + len(merges) + 2
    assert pruned.encode("red").ids == [514, 513, 515]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("xy", ["x", "y</w>"]),
        ("é", ["Ã", "©</w>"]),
        ("7", ["7</w>"]),
        ("", []),
    ],
)
def test_unknown_words_fall_back_to_their_bytes(text: str, tokens: list[str]) -> None:
    pruned = Tokenizer.from_str(pruned_tokenizer_json(["red"]))
    assert pruned.encode(text, add_special_tokens=False).tokens == tokens


def test_no_text_at_all_leaves_bytes_only() -> None:
    text = pruned_tokenizer_json([])
    assert vocabulary_size(text) == 514
    assert Tokenizer.from_str(text).encode("a").tokens == ["<|startoftext|>", "a</w>", "<|endoftext|>"]


def test_the_order_of_the_texts_does_not_matter() -> None:
    assert pruned_tokenizer_json(["red star", "circle"]) == pruned_tokenizer_json(["circle", "star red", "star"])


def test_missing_open_clip_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_file.importlib.util, "find_spec", lambda name: None)
    tokenizer_file._clip_merges.cache_clear()
    with pytest.raises(ExportError, match=r'pip install "\.\[export\]"'):
        clip_tokenizer_json()
