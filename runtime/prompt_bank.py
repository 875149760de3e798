"""Prompt banks: embedded prompts in one .npz file, for devices that carry no text encoder."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import InputError
from .files import atomic_file
from .prompts import PromptSet

_FORMAT = "tclkit prompt bank 1"
_KEYS = ("format", "names", "embeddings", "text_encoder_hash")


def save_prompt_bank(path: str | Path, prompts: PromptSet) -> None:
    """Write prompts and their embeddings to a .npz file (no pickle), whole or not at all.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        with atomic_file(path) as temporary, temporary.open("wb") as stream:
            np.savez(
                stream,
                format=np.array(_FORMAT),
                names=np.array(prompts.names),
                embeddings=prompts.embeddings,
                text_encoder_hash=np.array(prompts.key),
            )
    except OSError as error:
        raise InputError(f"the prompt bank {path} cannot be written: {error.strerror or error}") from error


def load_prompt_bank(path: str | Path, *, text_encoder_hash: str | None = None) -> PromptSet:
    """Read a prompt bank.

    Args:
        path: written by `save_prompt_bank` or `tclkit embed`.
        text_encoder_hash: `Bundle.text_encoder_hash` of the model the prompts are for; None does not compare.

    Raises:
        InputError: no such file, not a prompt bank, damaged, with a name twice, or made with another text encoder.
    """
    arrays = _read_arrays(Path(path))
    if str(arrays["format"]) != _FORMAT or arrays["names"].ndim != 1:
        raise InputError(f"{path} is no prompt bank of this version. Make one: tclkit embed PROMPT... -o {path}")
    key = str(arrays["text_encoder_hash"])
    if text_encoder_hash is not None and key != text_encoder_hash:
        raise InputError(
            f"{path} was made with another text encoder ({key[:12]}) than this model's ({text_encoder_hash[:12]}). "
            f"Make it again: tclkit embed PROMPT... --model NAME -o {path}",
            expected=text_encoder_hash,
            found=key,
        )
    try:
        return PromptSet(names=tuple(str(name) for name in arrays["names"]), embeddings=arrays["embeddings"], key=key)
    except InputError as error:
        raise InputError(f"the prompt bank {path} is damaged, or was made wrongly: {error}") from error


def _read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with path.open("rb") as stream, zipfile.ZipFile(stream) as archive:
            found = {entry.filename: entry for entry in archive.infolist()}
            if found.keys() != {f"{key}.npy" for key in _KEYS}:
                raise ValueError(f"it holds {', '.join(sorted(found)[:5]) or 'nothing'}")
            if any(entry.file_size > entry.compress_size for entry in found.values()):  # a few bytes may unpack to many
                raise ValueError("it is compressed")
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in _KEYS}
    except OSError as error:
        raise InputError(f"the prompt bank {path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # numpy and zipfile raise whatever the damage leads to
        raise InputError(f"{path} is no prompt bank, or damaged ({error})") from error
