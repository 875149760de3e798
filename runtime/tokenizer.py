"""CLIP's tokenizer: texts to token ids, equal to the authors' on every text they were compared on."""

import html
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .bundle import Bundle
from .errors import BundleError, InputError

START_OF_TEXT = "<|startoftext|>"
END_OF_TEXT = "<|endoftext|>"
_SHOWN_CHARACTERS = 60
_NEEDS_MENDING = re.compile(r"[^\t\n\r -~]|&")  # printable ASCII has neither mojibake nor, without &, entities


def clean_text(text: str) -> str:
    """Clean a text as CLIP does: mojibake mended, HTML entities undone, white space collapsed, lower case.

    Raises:
        InputError: not a text, or not valid Unicode.

    Source: CLIP (Radford et al., 2021), simple_tokenizer.py.
    """
    if not isinstance(text, str):
        raise InputError(f"a prompt should be a text, found {type(text).__name__}: {shortened(repr(text))}")
    try:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError as error:
        raise InputError(f"the text {shortened(repr(text))} is not valid Unicode. Pass it as UTF-8") from error
    if _NEEDS_MENDING.search(text) is not None:
        from ftfy import fix_text  # loads tables of Unicode, which few prompts need

        text = html.unescape(html.unescape(fix_text(text)))  # twice, as CLIP does
    return re.sub(r"\s+", " ", text).strip().lower()


class Tokenizer:
    """Encodes texts into the token ids that a bundle's text graph takes."""

    def __init__(self, tokenizer_json: str, context_length: int, *, source: str = "tokenizer.json") -> None:
        """Make a tokenizer from the text of a tokenizer.json.

        Args:
            tokenizer_json: a Hugging Face `tokenizers` file that encodes cleaned texts and adds start and end tokens.
            context_length: ids of one text at most, start and end included.
            source: where it comes from, for messages.

        Raises:
            BundleError: the text is no tokenizer, or lacks the start or end token.
            InputError: context_length is below 3.
        """
        import tokenizers

        if context_length < 3:
            raise InputError(f"context_length should be 3 or more, found {context_length}")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # tokenizers raises nothing more specific
            raise BundleError(f"{source} is no tokenizer that the tokenizers package can read: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._start, self._end = (self._special(token, source) for token in (START_OF_TEXT, END_OF_TEXT))
        self.context_length = context_length

    @classmethod
    def from_file(cls, path: str | Path, context_length: int) -> "Tokenizer":
        """Read a tokenizer.json.

        Raises:
            BundleError: the file cannot be read or is no tokenizer.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError(f"{path} cannot be read: {error}") from error
        return cls(text, context_length, source=str(path))

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> "Tokenizer":
        """Read a bundle's tokenizer.

        Raises:
            BundleError: as `from_file`, or its vocabulary is not of the size the bundle's text graph takes.
        """
        model, path = bundle.manifest.model, bundle.path(bundle.manifest.tokenizer)
        tokenizer = cls.from_file(path, model.context_length)
        if tokenizer.vocab_size != model.vocab_size:
            expected, found = model.vocab_size, tokenizer.vocab_size
            raise BundleError(
                f"{path} has {found} tokens, but bundle.json says vocab_size {expected}", expected=expected, found=found
            )
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of ids, start and end included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, texts: Sequence[str], *, truncate: bool = True, pad_to: int | None = None) -> NDArray[np.int64]:
        """Encode texts, start and end tokens included, padded with 0.

        Args:
            texts: M texts as the user wrote them; an empty one is start and end only.
            truncate: cut a text that is too long and force the end token into its last place; else refuse it.
            pad_to: L, at least the longest text's ids; None pads to the longest.

        Returns:
            (M, L) int64.

        Raises:
            InputError: no texts, a text that is too long while truncate is False, or one longer than pad_to.
        """
        if isinstance(texts, str) or not len(texts):
            raise InputError(f"texts should be a list of one or more texts, found {shortened(repr(texts))}")
        rows = [self._encode_one(text, truncate) for text in texts]
        longest = max(map(len, rows))
        length = longest if pad_to is None else pad_to
        if longest > length:
            raise InputError(f"a text is {longest} tokens long, but pad_to is {length}")
        token_ids_ML = np.zeros((len(rows), length), np.int64)
        for row, ids in zip(token_ids_ML, rows, strict=True):
            row[: len(ids)] = ids
        return token_ids_ML

    def _encode_one(self, text: str, truncate: bool) -> list[int]:
        # One by one: encode_batch starts a thread pool, which does not survive a fork and gains nothing on prompts.
        ids: list[int] = self._tokenizer.encode(clean_text(text)).ids
        if len(ids) <= self.context_length:
            return ids
        if truncate:
            return [*ids[: self.context_length - 1], self._end]
        message = (
            f"the text {shortened(text)!r} is too long: {len(ids)} tokens with start and end, "
            f"the model reads at most {self.context_length}. Shorten it"
        )
        raise InputError(message, expected=self.context_length, found=len(ids))

    def _special(self, token: str, source: str) -> int:
        index = self._tokenizer.token_to_id(token)
        if index is None:
            raise BundleError(f"{source} lacks the token {token}. Fetch or export the bundle again")
        return int(index)


def shortened(text: str) -> str:
    """The text's beginning, for messages."""
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."
