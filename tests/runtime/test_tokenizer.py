"""Token ids equal the authors', on their strings and on every prompt of the published protocol."""

import html
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import ftfy
import numpy as np
import pytest

from tclkit.runtime.bundle import open_bundle
from tclkit.runtime.errors import BundleError, InputError
from tclkit.runtime.prompts import PROTOCOL_TEMPLATES
from tclkit.runtime.tokenizer import Tokenizer, clean_text
from tclkit.tcl.tokenizer_file import clip_tokenizer_json


@pytest.fixture(scope="module")
def strings(golden: Path) -> list[str]:
    return json.loads((golden / "tokenizer_strings.json").read_text(encoding="utf-8"))["strings"]


@pytest.fixture(scope="module")
def golden_ids(golden: Path) -> dict[str, np.ndarray]:
    with np.load(golden / "tokenizer_ids.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def clip_json() -> str:
    return clip_tokenizer_json()


@pytest.fixture(scope="module")
def tokenizer(clip_json: str) -> Tokenizer:
    return Tokenizer(clip_json, 77)


@pytest.fixture(scope="module")
def tiny_tokenizer(tiny: ModuleType) -> Tokenizer:
    return Tokenizer(tiny.tiny_tokenizer().to_str(), 77)


def test_all_golden_strings(tokenizer: Tokenizer, strings: list[str], golden_ids: dict[str, np.ndarray]) -> None:
    ids = tokenizer.encode(strings, pad_to=77)
    assert ids.dtype == np.int64
    np.testing.assert_array_equal(ids, golden_ids["ids"])


def test_a_shorter_context(clip_json: str, strings: list[str], golden_ids: dict[str, np.ndarray]) -> None:
    ids = Tokenizer(clip_json, 16).encode(strings[:20], pad_to=16)
    np.testing.assert_array_equal(ids, golden_ids["ids_context16_first20"])


def test_too_long_texts_are_refused_where_asked(tokenizer: Tokenizer, strings: list[str], golden: Path) -> None:
    document = json.loads((golden / "tokenizer_strings.json").read_text(encoding="utf-8"))
    for index, text in enumerate(strings):
        if index in document["too_long_without_truncate"]:
            with pytest.raises(InputError, match=r"too long: \d+ tokens .*reads at most 77") as caught:
                tokenizer.encode([text], truncate=False)
            assert caught.value.values["found"] > 77
        else:
            np.testing.assert_array_equal(tokenizer.encode([text], truncate=False), tokenizer.encode([text]))


def test_every_prompt_of_the_published_protocol(tokenizer: Tokenizer, golden: Path) -> None:
    protocol = json.loads((golden / "protocol.json").read_text(encoding="utf-8"))
    assert tuple(protocol["common"]["templates"]) == PROTOCOL_TEMPLATES
    with np.load(golden / "protocol_tokens.npz") as tokens:
        assert set(tokens.files) == set(protocol["benchmarks"])
        for name, benchmark in protocol["benchmarks"].items():
            names = benchmark["prompt_class_names"]
            texts = [template.replace("{}", word) for word in names for template in PROTOCOL_TEMPLATES]
            ids = tokenizer.encode(texts, pad_to=77).reshape(len(names), len(PROTOCOL_TEMPLATES), 77)
            np.testing.assert_array_equal(ids, tokens[name], err_msg=name)


def test_padding_is_as_short_as_the_longest_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(["dog", "", "a small dog"])
    assert ids.tolist() == [[49406, 1929, 49407, 0, 0], [49406, 49407, 0, 0, 0], [49406, 320, 2442, 1929, 49407]]
    with pytest.raises(InputError, match="5 tokens long, but pad_to is 4"):
        tokenizer.encode(["a small dog"], pad_to=4)


def test_a_truncated_text_ends_in_the_end_token(clip_json: str) -> None:
    ids = Tokenizer(clip_json, 5).encode(["one two three four five six"])
    assert ids.shape == (1, 5)
    assert ids[0, -1] == 49407


@pytest.mark.parametrize("texts", [[], "a dog", ()])
def test_what_is_no_list_of_texts(tokenizer: Tokenizer, texts: Any) -> None:
    with pytest.raises(InputError, match="list of one or more texts"):
        tokenizer.encode(texts)


@pytest.mark.parametrize("text", [None, 3, b"dog", ["dog"]])
def test_what_is_no_text(text: Any) -> None:
    with pytest.raises(InputError, match="should be a text, found"):
        clean_text(text)


def test_broken_unicode_is_refused_and_emoji_are_fine() -> None:
    with pytest.raises(InputError, match="not valid Unicode"):
        clean_text("caf\udce9")  # how Python hands over a command line argument in another encoding
    assert clean_text("\ud83d\udc36 Dog") == "🐶 dog"  # a pair, as some JSON writers leave it
    assert clean_text("A 🐶\tDOG &amp;amp; cat ") == "a 🐶 dog & cat"


def test_every_text_has_an_encoding_in_a_small_vocabulary(tiny_tokenizer: Tokenizer, strings: list[str]) -> None:
    ids = tiny_tokenizer.encode([*strings, "zebra 🦓 \x07"])
    assert ids.max() == tiny_tokenizer.vocab_size - 1
    assert (ids.argmax(axis=1) > 0).all()


def test_settings_inside_the_file_do_not_count(tiny: ModuleType) -> None:
    raw = tiny.tiny_tokenizer()
    raw.enable_padding(length=9, pad_id=5)
    raw.enable_truncation(4)
    ids = Tokenizer(raw.to_str(), 77).encode(["red", "a red circle and a blue one"])
    assert ids[0, 3:].max() == 0
    assert ids.shape[1] > 9


def test_from_bundle(tiny_bundle_folder: Path, write_tiny_bundle: Callable[..., Path], tmp_path: Path) -> None:
    bundle = open_bundle(tiny_bundle_folder)
    assert Tokenizer.from_bundle(bundle).vocab_size == bundle.manifest.model.vocab_size
    assert Tokenizer.from_bundle(open_bundle(write_tiny_bundle(tmp_path / "b", context_length=5))).context_length == 5


def test_a_vocabulary_of_another_size_is_refused(tiny_bundle_folder: Path, tmp_path: Path) -> None:
    raw = json.loads((tiny_bundle_folder / "bundle.json").read_text(encoding="utf-8"))
    raw["model"]["vocab_size"] = 49408
    for path in tiny_bundle_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "bundle.json").write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(BundleError, match=r"has \d+ tokens, but bundle\.json says vocab_size 49408"):
        Tokenizer.from_bundle(open_bundle(tmp_path))


@pytest.mark.parametrize("text", ["", "{}", "[1, 2]", "not json"])
def test_what_is_no_tokenizer(text: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BundleError, match=r"tokenizer\.json is no tokenizer"):
        Tokenizer.from_file(path, 77)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"missing\.json cannot be read"):
        Tokenizer.from_file(tmp_path / "missing.json", 77)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    with pytest.raises(BundleError, match=r"binary\.json cannot be read"):
        Tokenizer.from_file(tmp_path / "binary.json", 77)


def test_a_tokenizer_without_the_special_tokens(tiny: ModuleType) -> None:
    text = tiny.tiny_tokenizer().to_str().replace("<|endoftext|>", "<|end|>")
    with pytest.raises(BundleError, match=r"lacks the token <\|endoftext\|>"):
        Tokenizer(text, 77)


def test_the_context_holds_at_least_one_token_of_text(clip_json: str) -> None:
    with pytest.raises(InputError, match="3 or more, found 2"):
        Tokenizer(clip_json, 2)


def test_cleaning_printable_ascii_is_what_ftfy_makes_of_it() -> None:
    characters = "".join(map(chr, range(32, 127))).replace("&", "") + "\t\n\r"
    draw = np.random.default_rng(0)
    for _ in range(300):
        text = "".join(draw.choice(list(characters), draw.integers(1, 40)))
        mended = html.unescape(html.unescape(ftfy.fix_text(text)))
        assert clean_text(text) == " ".join(mended.split()).lower()
    assert clean_text("cat &amp;lt; dog") == "cat < dog"


def test_plain_prompts_load_no_tables_of_unicode() -> None:
    code = (
        "from tclkit.runtime.tokenizer import clean_text; clean_text('A cat'); import sys; print('ftfy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"
