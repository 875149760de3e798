"""Prompt banks: what was saved is read back, and nothing else is taken for one."""

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tclkit.runtime.errors import InputError
from tclkit.runtime.prompt_bank import load_prompt_bank, save_prompt_bank
from tclkit.runtime.prompts import PromptSet

NAMES = ("a dog", "🐶", "naïve café  ")


@pytest.fixture
def prompts() -> PromptSet:
    array = np.random.default_rng(0).standard_normal((3, 8))
    unit = (array / np.linalg.norm(array, axis=1, keepdims=True)).astype(np.float32)
    return PromptSet(names=NAMES, embeddings=unit, key="ab" * 32)


@pytest.fixture
def path(prompts: PromptSet, tmp_path: Path) -> Path:
    save_prompt_bank(tmp_path / "prompts.npz", prompts)
    return tmp_path / "prompts.npz"


def test_round_trip(prompts: PromptSet, path: Path) -> None:
    loaded = load_prompt_bank(path, text_encoder_hash="ab" * 32)
    assert loaded.names == prompts.names
    assert loaded.key == prompts.key
    np.testing.assert_array_equal(loaded.embeddings, prompts.embeddings)
    assert loaded.embeddings.dtype == np.float32


def test_a_single_prompt_and_any_file_name(prompts: PromptSet, tmp_path: Path) -> None:
    one = PromptSet(names=("x",), embeddings=prompts.embeddings[:1], key="k")
    save_prompt_bank(tmp_path / "sub" / "bank", one)
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["bank"]
    assert load_prompt_bank(tmp_path / "sub" / "bank").names == ("x",)


def test_a_place_that_cannot_be_written(prompts: PromptSet, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"bank\.npz cannot be written: "):
        save_prompt_bank(tmp_path / "file" / "bank.npz", prompts)


def test_another_text_encoder(path: Path) -> None:
    with pytest.raises(InputError, match=r"another text encoder \(abababababab\).*\(cdcdcdcdcdcd\).*tclkit embed"):
        load_prompt_bank(path, text_encoder_hash="cd" * 32)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.npz cannot be read: No such file"):
        load_prompt_bank(tmp_path / "none.npz")
    with pytest.raises(InputError, match="cannot be read"):
        load_prompt_bank(tmp_path)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 not a zip", b"\x93NUMPY broken"])
def test_what_is_no_archive(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bank.npz"
    path.write_bytes(content)
    with pytest.raises(InputError, match="no prompt bank"):
        load_prompt_bank(path)


def test_every_flipped_byte_is_refused_or_harmless(prompts: PromptSet, path: Path) -> None:
    data = path.read_bytes()
    for index in range(0, len(data), 5):
        path.write_bytes(data[:index] + bytes([data[index] ^ 0x10]) + data[index + 1 :])
        try:
            loaded = load_prompt_bank(path)
        except InputError:
            continue
        assert loaded.names == prompts.names
        np.testing.assert_array_equal(loaded.embeddings, prompts.embeddings)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_truncated_file(path: Path, share: float) -> None:
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(InputError, match="no prompt bank"):
        load_prompt_bank(path)


class _Bomb:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("pickle-code-ran"),)


def test_no_pickle_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("bank.npz", names=np.array([_Bomb()], dtype=object))
    with pytest.raises(InputError, match="no prompt bank"):
        load_prompt_bank("bank.npz")
    with zipfile.ZipFile("other.npz", "w") as archive:
        archive.writestr("names.npy", pickle.dumps(_Bomb()))
    with pytest.raises(InputError, match="no prompt bank"):
        load_prompt_bank("other.npz")
    assert not Path("pickle-code-ran").exists()


def test_a_name_that_stands_twice(path: Path) -> None:
    with np.load(path) as archive:
        arrays = dict(archive)
    np.savez(path, **(arrays | {"names": np.array(["a dog", "a cat", "a dog"])}))
    with pytest.raises(InputError, match=r"prompts\.npz is .*wrongly: the name 'a dog' stands for two prompts or more"):
        load_prompt_bank(path)


def test_archives_of_other_things(path: Path, tmp_path: Path) -> None:
    with np.load(path) as archive:
        arrays = dict(archive)
    wrong = {
        "format": np.array("tclkit prompt bank 9"),
        "names": np.array("one"),
        "embeddings": arrays["embeddings"].astype(np.float64),
    }
    for key, value in wrong.items():
        np.savez(tmp_path / "wrong.npz", **(arrays | {key: value}))
        with pytest.raises(InputError, match=r"wrong\.npz is (no prompt bank|damaged)"):
            load_prompt_bank(tmp_path / "wrong.npz")
    np.savez(tmp_path / "wrong.npz", x=np.zeros(3))
    with pytest.raises(InputError, match=r"no prompt bank, or damaged \(it holds x\.npy\)"):
        load_prompt_bank(tmp_path / "wrong.npz")


def test_what_unpacks_to_more_than_it_is_stays_packed(path: Path, tmp_path: Path) -> None:
    with np.load(path) as archive:
        arrays = dict(archive)
    np.savez_compressed(tmp_path / "bomb.npz", **(arrays | {"embeddings": np.zeros((1000, 512), np.float32)}))
    with pytest.raises(InputError, match=r"no prompt bank, or damaged \(it is compressed\)"):
        load_prompt_bank(tmp_path / "bomb.npz")
    np.savez_compressed(tmp_path / "bomb.npz", **arrays, more=np.zeros(10**6))
    with pytest.raises(InputError, match=r"it holds .*more\.npy"):
        load_prompt_bank(tmp_path / "bomb.npz")
