"""`tclkit embed`: prompts to a prompt bank."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import Result

from tclkit.runtime import load_prompt_bank, open_bundle

Invoke = Callable[..., Result]

pytestmark = pytest.mark.usefixtures("tiny_model")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_bank(invoke: Invoke) -> None:
    result = invoke("embed", "red", "a blue circle")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "2 prompts of tiny: prompts.npz" in result.stderr
    assert "tclkit segment IMAGE --bank prompts.npz --model tcl-shapes" in result.stderr
    bank = load_prompt_bank("prompts.npz", text_encoder_hash=open_bundle("tcl-shapes").text_encoder_hash)
    assert bank.names == ("red", "a blue circle")
    np.testing.assert_allclose(np.linalg.norm(bank.embeddings, axis=1), 1, atol=1e-6)


def test_one_prompt_is_not_several(invoke: Invoke) -> None:
    assert invoke("embed", "red").stderr.startswith("1 prompt of tiny: ")


def test_prompts_from_a_file(invoke: Invoke) -> None:
    Path("words.txt").write_bytes("\ufeffblue\r\n\n  a green square \n".encode())
    assert invoke("embed", "red", "--from", "words.txt", "-o", "out/bank.npz").exit_code == 0
    assert load_prompt_bank("out/bank.npz").names == ("red", "blue", "a green square")


def test_prompts_from_standard_input(invoke: Invoke) -> None:
    assert invoke("embed", "--from", "-", stdin="red\nблue\n".encode()).exit_code == 0
    assert load_prompt_bank("prompts.npz").names == ("red", "блue")


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        ([], 2, "there is nothing to embed"),
        (["--from", "empty.txt"], 2, "there is nothing to embed: empty.txt holds no prompt"),
        (["--from", "nowhere.txt"], 1, "nowhere.txt cannot be read: No such file"),
        (["--from", "binary.txt"], 1, "binary.txt is not a UTF-8 text file: byte 1 is 0xff"),
        (["red", "red"], 1, "prompts 1 and 2 are the same"),
        (["red", "-o", "bank.txt"], 1, "bank.txt: a prompt bank is an .npz file"),
        (["red", "--model", "unknown"], 1, "model 'unknown' is not installed"),
    ],
)
def test_what_cannot_be_embedded(invoke: Invoke, arguments: list[str], exit_code: int, message: str) -> None:
    Path("empty.txt").write_text("\n \n")
    Path("binary.txt").write_bytes(b"a\xff")
    result = invoke("embed", *arguments)
    assert (result.exit_code, result.stdout) == (exit_code, "")
    assert message in result.stderr
    assert list(Path().glob("*.npz")) == []


def test_a_bank_of_another_model_is_refused(
    invoke: Invoke, write_tiny_bundle: Callable[..., Path], models_folder: Path, tmp_path: Path
) -> None:
    write_tiny_bundle(models_folder / "other", context_length=20)
    (tmp_path / "image.png").write_bytes(b"")
    assert invoke("embed", "red", "--model", "other").exit_code == 0
    result = invoke("segment", "image.png", "--bank", "prompts.npz")
    assert result.exit_code == 1
    assert "made with another text encoder" in result.stderr
