"""CLIP's byte-pair tokenizer as a Hugging Face `tokenizers` file, whole or cut down to a small vocabulary.

Both files are made from the merge list that open_clip carries; nothing is trained or downloaded. The texts they encode
are cleaned ones (mojibake and HTML entities undone, white space collapsed, lower case): that is the caller's part.
"""

import gzip
import importlib.util
import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from tclkit.runtime.errors import ExportError
from tclkit.runtime.extras import install_command

START_OF_TEXT = "<|startoftext|>"
END_OF_TEXT = "<|endoftext|>"

_END_OF_WORD = "</w>"
_MERGE_COUNT = 49152 - 256 - 2  # the file lists more merges than CLIP was trained with
# Contractions ignore case as in CLIP: a cleaned text can still hold a long s (U+017F), which folds to "s".
_WORD_PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|(?i:'s|'t|'re|'ve|'m|'ll|'d)|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def clip_tokenizer_json() -> str:
    """Return CLIP's tokenizer (49,408 ids) as the text of a tokenizer.json file.

    Encoding adds the start and end tokens (49406 and 49407); padding and truncation are left to the caller. A literal
    "<|endoftext|>" inside a text becomes that token, as in CLIP. Differs from CLIP only where such a literal follows
    punctuation without a space between.

    Raises:
        ExportError: open_clip, whose vocabulary file is read, is not installed.

    Source: CLIP (Radford et al., 2021), simple_tokenizer.py, as used by TCL.
    """
    return _tokenizer_json(_clip_merges())


def pruned_tokenizer_json(texts: Iterable[str]) -> str:
    """Return CLIP's tokenizer cut down to what the given texts need, as the text of a tokenizer.json file.

    The given texts, and every word in them wherever it stands, are split exactly as CLIP splits them. Any other word
    falls back to the merges that are left and in the end to its UTF-8 bytes, so that every text has an encoding. Ids
    run: 256 bytes, 256 bytes that end a word, the merges in CLIP's order of rank, start of text, end of text (the
    largest).

    Args:
        texts: cleaned texts, for example captions and prompts; repeats cost little.

    Raises:
        ExportError: open_clip, whose vocabulary file is read, is not installed.
    """
    merges = _clip_merges()
    parents = {first + second: (first, second) for first, second in merges}
    needed: set[str] = set()
    pending = _tokens_of(texts)
    while pending:
        token = pending.pop()
        if token in needed or token not in parents:
            continue
        needed.add(token)
        pending.update(parents[token])
    return _tokenizer_json(tuple(pair for pair in merges if pair[0] + pair[1] in needed))


def vocabulary_size(tokenizer_json: str) -> int:
    """Return the number of ids that a tokenizer.json text defines, special tokens included: a model's vocab_size."""
    return len(json.loads(tokenizer_json)["model"]["vocab"])


def _tokens_of(texts: Iterable[str]) -> set[str]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(clip_tokenizer_json())
    words = {word for text in texts for word in text.split()}
    encodings = tokenizer.encode_batch(sorted(words), add_special_tokens=False)
    return {token for encoding in encodings for token in encoding.tokens}


@lru_cache(maxsize=1)
def _clip_merges() -> tuple[tuple[str, str], ...]:
    lines = gzip.decompress(_vocabulary_file().read_bytes()).decode("utf-8").split("\n")[1 : _MERGE_COUNT + 1]
    pairs = [line.split() for line in lines]
    return tuple((first, second) for first, second in pairs)


def _vocabulary_file() -> Path:
    spec = importlib.util.find_spec("open_clip")  # finds the folder without importing torch
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / "bpe_simple_vocab_16e6.txt.gz"
        if path.is_file():
            return path
    raise ExportError(
        "CLIP's vocabulary file bpe_simple_vocab_16e6.txt.gz was not found: it comes with open_clip. "
        f"Install it: {install_command('export')}"
    )


def _byte_characters() -> list[str]:
    """Return the printable stand-ins of the 256 bytes in CLIP's order of ids (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(code) for code in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def _vocabulary(merges: tuple[tuple[str, str], ...]) -> dict[str, int]:
    characters = _byte_characters()
    tokens = [
        *characters,
        *(character + _END_OF_WORD for character in characters),
        *(first + second for first, second in merges),
        START_OF_TEXT,
        END_OF_TEXT,
    ]
    return {token: index for index, token in enumerate(tokens)}


def _tokenizer_json(merges: tuple[tuple[str, str], ...]) -> str:
    # Written by hand, with merges as "a b" strings: the form that every tokenizers release reads (those before 0.20
    # know no other), and the same bytes whichever release is installed here.
    vocabulary = _vocabulary(merges)
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(token, vocabulary[token]) for token in (START_OF_TEXT, END_OF_TEXT)],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": _WORD_PATTERN}, "behavior": "Removed", "invert": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": _start_and_end_processor(vocabulary),
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": _END_OF_WORD,
            "fuse_unk": False,
            "vocab": vocabulary,
            "merges": [f"{first} {second}" for first, second in merges],
        },
    }
    return json.dumps(document, ensure_ascii=False)


def _added_token(content: str, index: int) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": index, "content": content, **flags}


def _start_and_end_processor(vocabulary: dict[str, int]) -> dict[str, Any]:
    def special(token: str) -> dict[str, Any]:
        return {"SpecialToken": {"id": token, "type_id": 0}}

    def sequence(name: str) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": 0}}

    def entry(token: str) -> dict[str, Any]:
        return {"id": token, "ids": [vocabulary[token]], "tokens": [token]}

    return {
        "type": "TemplateProcessing",
        "single": [special(START_OF_TEXT), sequence("A"), special(END_OF_TEXT)],
        "pair": [special(START_OF_TEXT), sequence("A"), sequence("B"), special(END_OF_TEXT)],
        "special_tokens": {token: entry(token) for token in (START_OF_TEXT, END_OF_TEXT)},
    }
