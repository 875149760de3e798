"""Prompts become embeddings once, and the same ones whether cached or not."""

import sqlite3
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tclkit.runtime import embedding
from tclkit.runtime.bundle import Bundle, open_bundle
from tclkit.runtime.embedding import EmbeddedPrompts, embed_prompts, ensemble
from tclkit.runtime.errors import BackendError, InputError
from tclkit.runtime.onnxruntime_backend import OnnxRuntimeBackend
from tclkit.runtime.prompts import expand_prompt
from tclkit.runtime.text_cache import TextCache
from tclkit.runtime.tokenizer import Tokenizer

Embed = Callable[..., EmbeddedPrompts]


@pytest.fixture(scope="module")
def bundle(tiny_bundle_folder: Path) -> Bundle:
    return open_bundle(tiny_bundle_folder)


@pytest.fixture
def embed(bundle: Bundle) -> Embed:
    backend, tokenizer = OnnxRuntimeBackend(bundle, threads=1), Tokenizer.from_bundle(bundle)

    def embed(prompts: list[str], cache: TextCache | None = None) -> EmbeddedPrompts:
        return embed_prompts(
            prompts,
            templates=bundle.manifest.templates,
            tokenizer=tokenizer,
            encode_text=backend.encode_text,
            text_encoder_hash=bundle.text_encoder_hash,
            cache=cache,
        )

    return embed


def test_the_mean_is_taken_before_the_length(golden: Path) -> None:
    with np.load(golden / "text_tiny.npz") as arrays:
        raw, expected = arrays["text_encoder_raw"], arrays["text_embedding"]
    raw_NTD = raw.reshape(len(expected), -1, raw.shape[-1])
    np.testing.assert_allclose(np.stack([ensemble(raw_TD) for raw_TD in raw_NTD]), expected, atol=1e-6)


def test_an_embedding_of_zeros_stays_finite() -> None:
    assert np.isfinite(ensemble(np.zeros((2, 4), np.float32))).all()


def test_colours_get_their_vectors(embed: Embed, bundle: Bundle, tiny: ModuleType) -> None:
    names = list(tiny.PALETTE)
    done = embed([*names, "zebra"])
    assert done.prompts.names == (*names, "zebra")
    assert done.prompts.key == bundle.text_encoder_hash
    assert done.prompts.embeddings.dtype == np.float32
    assert done.prompts.embeddings[:-1].argmax(axis=1).tolist() == list(range(len(names)))
    assert done.prompts.embeddings[-1].argmin() == tiny.WIDTH - 1


def test_the_second_time_runs_no_text_encoder(embed: Embed, tmp_path: Path) -> None:
    first = embed(["red", "a blue circle"], TextCache(tmp_path / "c.sqlite"))
    second = embed(["a blue circle", "red"], TextCache(tmp_path / "c.sqlite"))
    assert (first.cache_hits, first.text_encoder_runs) == (0, 1)
    assert (second.cache_hits, second.text_encoder_runs) == (2, 0)
    np.testing.assert_array_equal(first.prompts.embeddings, second.prompts.embeddings[::-1])


def test_only_what_is_missing_is_embedded(embed: Embed, tmp_path: Path) -> None:
    cache = TextCache(tmp_path / "c.sqlite")
    embed(["red", "green"], cache)
    done = embed(["blue", "red", "white"], cache)
    assert (done.cache_hits, done.text_encoder_runs) == (1, 1)
    np.testing.assert_array_equal(done.prompts.embeddings, embed(["blue", "red", "white"]).prompts.embeddings)


def test_spelling_does_not_matter_to_the_cache(embed: Embed, tmp_path: Path) -> None:
    cache = TextCache(tmp_path / "c.sqlite")
    embed(["a red circle"], cache)
    done = embed(["A  Red Circle."], cache)
    assert done.cache_hits == 1
    assert done.prompts.names == ("A Red Circle.",)


@pytest.fixture
def noted_runs(bundle: Bundle) -> tuple[Callable[[NDArray[np.int64]], NDArray[np.float32]], list[tuple[int, ...]]]:
    """The text graph, and the shapes it was run on."""
    encode, shapes = OnnxRuntimeBackend(bundle, threads=1).encode_text, []

    def noting(token_ids_ML: NDArray[np.int64]) -> NDArray[np.float32]:
        shapes.append(token_ids_ML.shape)
        return encode(token_ids_ML)

    return noting, shapes


@pytest.mark.parametrize(("tokens", "count", "runs"), [(10_000, 60, 1), (512, 60, 5), (77, 3, 2), (1, 2, 6)])
def test_texts_of_all_prompts_run_together_shortest_first(
    bundle: Bundle,
    noted_runs: tuple[Callable[[NDArray[np.int64]], NDArray[np.float32]], list[tuple[int, ...]]],
    monkeypatch: pytest.MonkeyPatch,
    tokens: int,
    count: int,
    runs: int,
) -> None:
    monkeypatch.setattr(embedding, "_TOKENS_PER_RUN", tokens)
    encode, shapes = noted_runs
    tokenizer = Tokenizer.from_bundle(bundle)
    names = [f"red {'circle ' * (number % 5)}{number}".strip() for number in range(count)]
    done = embed_prompts(
        names,
        templates=bundle.manifest.templates,
        tokenizer=tokenizer,
        encode_text=encode,
        text_encoder_hash=bundle.text_encoder_hash,
    )
    assert done.text_encoder_runs == len(shapes) == runs
    assert sum(shape[0] for shape in shapes) == 3 * count
    lengths = [shape[1] for shape in shapes]
    assert lengths == sorted(lengths)
    assert lengths[-1] < 77
    assert all(texts == 1 or texts * length <= tokens for texts, length in shapes)
    for name, vector in zip(names, done.prompts.embeddings, strict=True):
        texts = expand_prompt(name, bundle.manifest.templates)
        padded = ensemble(encode(tokenizer.encode(texts, pad_to=77)))
        np.testing.assert_allclose(vector, padded, atol=1e-6)


def test_cached_prompts_need_no_tokenizer_and_one_read(
    embed: Embed, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"red {number}" for number in range(700)]
    first = embed(names, TextCache(tmp_path / "c.sqlite"))
    statements: list[str] = []
    connect = sqlite3.connect

    def traced(*arguments: Any, **options: Any) -> sqlite3.Connection:
        connection = connect(*arguments, **options)
        connection.set_trace_callback(statements.append)
        return connection

    def refused(*_: object) -> Any:
        raise AssertionError("not needed for cached prompts")

    monkeypatch.setattr(sqlite3, "connect", traced)
    done = embed_prompts(
        names,
        templates=bundle.manifest.templates,
        tokenizer=refused,
        encode_text=refused,
        text_encoder_hash=bundle.text_encoder_hash,
        cache=TextCache(tmp_path / "c.sqlite"),
    )
    assert (done.cache_hits, done.text_encoder_runs) == (700, 0)
    assert len([statement for statement in statements if statement.startswith("SELECT")]) == 1
    np.testing.assert_array_equal(done.prompts.embeddings, first.prompts.embeddings)


def test_without_a_cache_nothing_is_kept(embed: Embed) -> None:
    assert [embed(["red"]).cache_hits for _ in range(2)] == [0, 0]


def test_a_long_prompt_is_refused_and_named(embed: Embed, tmp_path: Path) -> None:
    cache = TextCache(tmp_path / "c.sqlite")
    with pytest.raises(
        InputError, match=r"'red red .*\.\.\.' \(400 words\) is too long: 40\d tokens.*at most 77"
    ) as caught:
        embed(["blue", "red " * 400], cache)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    assert caught.value.values["expected"] == 77
    assert cache.count() == 0


@pytest.mark.parametrize(
    ("prompts", "message"), [([], "no prompts"), (["red", " "], "2 is empty"), (["a", "A"], "same")]
)
def test_unusable_prompts(embed: Embed, prompts: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        embed(prompts)


def test_a_cache_that_cannot_be_used_changes_nothing(embed: Embed, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = TextCache(tmp_path / "file" / "c.sqlite")
    np.testing.assert_array_equal(embed(["red"], cache).prompts.embeddings, embed(["red"]).prompts.embeddings)
    assert cache.problem


def test_what_is_no_embedding_is_neither_used_nor_cached(embed: Embed, bundle: Bundle, tmp_path: Path) -> None:
    cache = TextCache(tmp_path / "texts.sqlite")
    for wrong in (np.nan, 0.0):
        with pytest.raises(BackendError, match=r"no usable embedding for 'red'.*Nothing was cached"):
            embed_prompts(
                ["red"],
                templates=bundle.manifest.templates,
                tokenizer=Tokenizer.from_bundle(bundle),
                encode_text=lambda ids, value=wrong: np.full((len(ids), 9), value, np.float32),
                text_encoder_hash=bundle.text_encoder_hash,
                cache=cache,
            )
    assert embed(["red"], cache).cache_hits == 0
    assert embed(["red"], cache).cache_hits == 1
