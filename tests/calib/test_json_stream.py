import json
from pathlib import Path

import pytest

import tclkit.calib.json_stream as json_stream
from tclkit.calib.json_stream import stream_arrays
from tclkit.runtime.errors import InputError

DOCUMENT = {
    "info": {"year": 2017, "deep": [1, [2, {"a": "]},"}]]},
    "images": [{"id": 1, "name": 'ä"\\ 犬'}, {"id": 22}],
    "numbers": [12345, -6.5e3, 0, True, None],
    "none": [],
    "last": 123456789,
}
ELEMENTS = [
    ("info", DOCUMENT["info"]),
    *(("images", element) for element in DOCUMENT["images"]),
    *(("numbers", element) for element in DOCUMENT["numbers"]),
    ("last", 123456789),
]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 50, 1 << 20])
def test_elements_whatever_the_size_of_the_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, indent: int | None
) -> None:
    monkeypatch.setattr(json_stream, "_CHUNK_CHARACTERS", chunk)
    path = tmp_path / "document.json"
    path.write_text(json.dumps(DOCUMENT, indent=indent, ensure_ascii=False), encoding="utf-8")
    assert list(stream_arrays(path)) == ELEMENTS


def test_an_empty_object(tmp_path: Path) -> None:
    (tmp_path / "empty.json").write_text(" {} ")
    assert list(stream_arrays(tmp_path / "empty.json")) == []


@pytest.mark.parametrize("text", ["", "[1]", '{"a": [1, 2', '{"a": [1 2]}', '{"a" 1}', "{1: 2}", '{"a": 1'])
def test_what_is_broken_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"broken.json is no complete JSON object: .*Fetch it again"):
        list(stream_arrays(path))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        list(stream_arrays(tmp_path / "none.json"))
