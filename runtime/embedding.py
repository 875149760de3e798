"""Prompts to embeddings: templates applied, what is cached read, the rest encoded, averaged and kept."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import BackendError, InputError
from .prompts import PromptSet, check_prompts, expand_prompt
from .text_cache import TextCache, cache_key
from .tokenizer import Tokenizer, shortened

_TOKENS_PER_RUN = 512  # padding included; larger runs are no faster and pad more
_EPSILON = 1e-6
_LENGTH_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddedPrompts:
    """Embedded prompts and what they cost.

    prompts: the prompts with their embeddings.
    cache_hits: prompts that came from the cache.
    text_encoder_runs: how often the text graph ran; 0 when all came from the cache.
    """

    prompts: PromptSet
    cache_hits: int
    text_encoder_runs: int


def embed_prompts(
    prompts: Sequence[str],
    *,
    templates: Sequence[str],
    tokenizer: Tokenizer | Callable[[], Tokenizer],
    encode_text: Callable[[NDArray[np.int64]], NDArray[np.float32]],
    text_encoder_hash: str,
    cache: TextCache | None = None,
) -> EmbeddedPrompts:
    """Embed prompts, each as the normalised mean over its templates.

    Args:
        prompts: what the user named.
        templates: of the bundle.
        tokenizer: of the bundle, or what opens it; not needed where all prompts are cached.
        encode_text: token ids (M, L) int64 -> raw embeddings (M, D) float32, as `Backend.encode_text`.
        text_encoder_hash: `Bundle.text_encoder_hash`; part of the cache key.
        cache: None embeds everything anew.

    Raises:
        InputError: as `check_prompts`, or a prompt longer than the model reads.

    Source: TCL (Cha et al., CVPR 2023), prompt ensembling: raw embeddings are averaged, then normalised once.
    """
    names = check_prompts(prompts)
    texts = [expand_prompt(name, templates) for name in names]
    return embed_texts(
        names,
        texts,
        tokenizer=tokenizer,
        encode_text=encode_text,
        text_encoder_hash=text_encoder_hash,
        cache=cache,
    )


def embed_texts(
    names: Sequence[str],
    texts: Sequence[Sequence[str]],
    *,
    tokenizer: Tokenizer | Callable[[], Tokenizer],
    encode_text: Callable[[NDArray[np.int64]], NDArray[np.float32]],
    text_encoder_hash: str,
    cache: TextCache | None = None,
) -> EmbeddedPrompts:
    """Embed prompts whose texts are given: no rule of grammar is applied; see `embed_prompts`.

    Args:
        names: N names for people.
        texts: of each name, one or more.
        tokenizer, encode_text, text_encoder_hash, cache: as in `embed_prompts`.

    Raises:
        InputError: a text longer than the model reads.
        BackendError: the text graph gave something else than vectors that can be normalised.
    """
    keys = [cache_key(text_encoder_hash, list(expanded)) for expanded in texts]
    found = cache.read(keys) if cache is not None else {}
    missing = [index for index, key in enumerate(keys) if key not in found]
    fresh: dict[str, NDArray[np.float32]] = {}
    runs = 0
    if missing:  # a prompt that is too long was never cached, so that it is refused here every time
        opened = tokenizer if isinstance(tokenizer, Tokenizer) else tokenizer()
        embedded, runs = _embedded([_encoded(opened, names[index], texts[index]) for index in missing], encode_text)
        fresh = {keys[index]: vector for index, vector in zip(missing, embedded, strict=True)}
        _check_embedded([names[index] for index in missing], embedded)  # what is cached is read for good
        if cache is not None:
            cache.write(fresh)
    vectors = found | fresh
    prompt_set = PromptSet(
        names=tuple(names), embeddings=np.stack([vectors[key] for key in keys]), key=text_encoder_hash
    )
    return EmbeddedPrompts(prompts=prompt_set, cache_hits=len(keys) - len(missing), text_encoder_runs=runs)


def ensemble(raw_TD: NDArray[np.float32]) -> NDArray[np.float32]:
    """Average raw embeddings of one prompt over its T templates, then normalise: (T, D) -> (D,) float32."""
    mean_D = raw_TD.mean(axis=0, dtype=np.float32)
    return np.asarray(mean_D / max(float(np.linalg.norm(mean_D)), _EPSILON), np.float32)


def _check_embedded(names: Sequence[str], embedded: Sequence[NDArray[np.float32]]) -> None:
    for name, vector in zip(names, embedded, strict=True):
        if not abs(float(np.linalg.norm(vector)) - 1) < _LENGTH_TOLERANCE:  # NaN as well
            raise BackendError(
                f"the text graph gave no usable embedding for {shortened(name)!r} (not finite, or of length 0). "
                "Nothing was cached: try --backend onnxruntime, or fetch or export the bundle again"
            )


def _encoded(tokenizer: Tokenizer, name: str, texts: Sequence[str]) -> list[NDArray[np.int64]]:
    """Token ids of each of a prompt's texts, without padding."""
    try:
        return [tokenizer.encode([text], truncate=False)[0] for text in texts]
    except InputError as error:
        count, limit = len(name.split()), tokenizer.context_length
        words = "1 word" if count == 1 else f"{count} words"
        found = error.values.get("found", "too many")
        message = (
            f"the prompt {shortened(name)!r} ({words}) is too long: {found} tokens with its template, start and "
            f"end, the model reads at most {limit}. Shorten it"
        )
        raise InputError(message, prompt=name, expected=limit, found=found) from error


def _embedded(
    token_ids: Sequence[Sequence[NDArray[np.int64]]], encode_text: Callable[[NDArray[np.int64]], NDArray[np.float32]]
) -> tuple[list[NDArray[np.float32]], int]:
    """Vector of each prompt, and the number of runs of the text graph.

    The texts of all prompts run together, sorted by length: CLIP's text tower is causal, so padding behind the end of a
    text changes nothing but the time, and texts of one length need none.
    """
    rows = [row for texts in token_ids for row in texts]
    runs = _runs_by_length([len(row) for row in rows])
    raw: dict[int, NDArray[np.float32]] = {}
    for run in runs:
        raw.update(zip(run, encode_text(_padded([rows[index] for index in run])), strict=True))
    vectors, first = [], 0
    for texts in token_ids:
        vectors.append(ensemble(np.stack([raw[index] for index in range(first, first + len(texts))])))
        first += len(texts)
    return vectors, len(runs)


def _runs_by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of the texts, shortest first, cut into runs of a bounded number of tokens."""
    runs: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not runs or (len(runs[-1]) + 1) * lengths[index] > _TOKENS_PER_RUN:
            runs.append([])
        runs[-1].append(index)
    return runs


def _padded(rows: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Rows of token ids padded with 0 to the longest: (M, L) int64."""
    padded = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return padded
