"""`tclkit embed`: prompts to vectors, kept in a file, so that a device needs no text encoder."""

from pathlib import Path
from typing import Annotated

import typer

from tclkit.runtime.errors import InputError

from ._console import DebugOption, say, size_text
from ._settings import DEFAULT_MODEL, ModelOption
from ._sources import read_standard_input

_STANDARD_INPUT = Path("-")


def embed(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT", help="What to look for, each in quotes.", show_default=False),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Where the prompt bank goes (.npz).")
    ] = Path("prompts.npz"),
    from_file: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="Read prompts from a text file, one a line; - is standard input."),
    ] = None,
    model: ModelOption = DEFAULT_MODEL,
    debug: DebugOption = False,
) -> None:
    """Embed prompts once and keep the vectors: a prompt bank for `tclkit segment --bank`."""
    names = [*(prompts or []), *(read_prompts(from_file) if from_file is not None else [])]
    if not names:
        why = "give at least one PROMPT, or --from FILE" if from_file is None else f"{from_file} holds no prompt"
        raise typer.BadParameter(f"there is nothing to embed: {why}")
    if output.suffix.lower() != ".npz":
        raise InputError(f"{output}: a prompt bank is an .npz file; give -o NAME.npz")
    from tclkit.runtime import Segmenter, save_prompt_bank

    segmenter = Segmenter.open(model)
    prompt_set = segmenter.prompts(names)
    save_prompt_bank(output, prompt_set)
    count = "1 prompt" if len(prompt_set.names) == 1 else f"{len(prompt_set.names)} prompts"
    say(f"{count} of {segmenter.bundle.name}: {output} ({size_text(output.stat().st_size)})")
    say(f"use it with: tclkit segment IMAGE --bank {output} --model {model}")


def read_prompts(path: Path) -> list[str]:
    """Lines of a UTF-8 text file that are not blank, in order.

    Raises:
        InputError: the file cannot be read, or is not text.
    """
    try:
        raw = read_standard_input() if path == _STANDARD_INPUT else path.read_bytes()
        lines = raw.decode("utf-8-sig").splitlines()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not a UTF-8 text file: byte {error.start} is {error.object[error.start]:#x}"
        ) from error
    return [line.strip() for line in lines if line.strip()]
