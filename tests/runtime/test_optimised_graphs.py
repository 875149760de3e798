"""Optimised graphs are kept per graph, runtime and processor, whole, checked and bounded."""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tclkit.runtime import onnxruntime_backend, optimised_graphs
from tclkit.runtime.bundle import open_bundle
from tclkit.runtime.errors import BackendError
from tclkit.runtime.onnxruntime_backend import OnnxRuntimeBackend
from tclkit.runtime.optimised_graphs import OptimisedGraphs


@pytest.fixture
def graphs(tmp_path: Path) -> OptimisedGraphs:
    return OptimisedGraphs(tmp_path / "kept")


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    path = tmp_path / "image.onnx"
    path.write_bytes(b"graph")
    return path


def test_an_entry_comes_back_whole(graphs: OptimisedGraphs, graph: Path) -> None:
    entry = graphs.entry(graph, "ort 1")
    assert graphs.read(entry) is None
    graphs.write(entry, b"optimised")
    assert graphs.read(entry) == b"optimised"
    assert [path.name for path in graphs.folder.iterdir()] == [entry.name]


def test_the_key_is_graph_runtime_and_processor(
    graphs: OptimisedGraphs, graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [graphs.entry(graph, "ort 1"), graphs.entry(graph, "ort 1"), graphs.entry(graph, "ort 2")]
    monkeypatch.setattr(optimised_graphs, "_processor", lambda: "another")
    entries.append(graphs.entry(graph, "ort 1"))
    graph.write_bytes(b"grapH")
    entries.append(graphs.entry(graph, "ort 1"))
    assert entries[0] == entries[1]
    assert len(set(entries)) == 4


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 200])
def test_what_is_damaged_is_announced_and_dropped(
    graphs: OptimisedGraphs, graph: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    entry = graphs.entry(graph, "ort 1")
    graphs.write(entry, b"optimised")
    entry.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert graphs.read(entry) is None
    assert "is damaged; it is dropped and made anew" in caplog.text
    assert not entry.exists()


def test_the_least_lately_used_are_dropped(tmp_path: Path, graph: Path) -> None:
    graphs = OptimisedGraphs(tmp_path / "kept", max_total_bytes=3 * 132)
    entries = [graphs.entry(graph, f"ort {number}") for number in range(5)]
    for number, entry in enumerate(entries[:3]):
        graphs.write(entry, b"x" * 100)
        os.utime(entry, (number, number))
    graphs.read(entries[0])
    graphs.write(entries[3], b"x" * 100)
    assert {entry.name for entry in graphs.folder.iterdir()} == {entries[i].name for i in (0, 2, 3)}
    graphs.write(entries[4], b"x" * 1000)  # larger than all that may be kept: alone
    assert [entry.name for entry in graphs.folder.iterdir()] == [entries[4].name]


def test_a_folder_that_cannot_be_written_is_announced(
    tmp_path: Path, graph: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    graphs = OptimisedGraphs(tmp_path / "file" / "kept")
    with caplog.at_level(logging.WARNING):
        graphs.write(graphs.entry(graph, "ort 1"), b"optimised")
    assert "cannot be kept" in caplog.text


@pytest.mark.parametrize("room", ["none left", "no folder"])
def test_without_room_for_temporary_files_the_graph_runs_all_the_same(
    room: str,
    tiny_bundle_folder: Path,
    graphs: OptimisedGraphs,
    monkeypatch: pytest.MonkeyPatch,
    keep_small: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    make = OnnxRuntimeBackend._session

    def session(self: OnnxRuntimeBackend, graph: Path | bytes, **options: Any) -> Any:
        if options.get("write_to") is not None:
            raise RuntimeError("Protobuf serialization failed\nat line 3")
        return make(self, graph, **options)

    def no_folder(**options: Any) -> Any:
        raise FileNotFoundError("no usable temporary directory found")

    if room == "none left":
        monkeypatch.setattr(OnnxRuntimeBackend, "_session", session)
    else:
        monkeypatch.setattr("tempfile.TemporaryDirectory", no_folder)
    backend = OnnxRuntimeBackend(open_bundle(tiny_bundle_folder), threads=1, optimised=graphs)
    with caplog.at_level(logging.WARNING):
        features = backend.image_features(np.zeros((1, 64, 64, 3), np.uint8))
    assert np.isfinite(features.grounded).all()
    assert "image.onnx cannot be kept optimised" in caplog.text
    assert "at line 3" not in caplog.text


def test_a_graph_that_cannot_be_loaded_is_not_said_to_lack_room(
    tiny_bundle_folder: Path,
    tmp_path: Path,
    graphs: OptimisedGraphs,
    caplog: pytest.LogCaptureFixture,
    keep_small: None,
) -> None:
    folder = shutil.copytree(tiny_bundle_folder, tmp_path / "b")
    (folder / "image.onnx").write_bytes(b"not onnx")
    backend = OnnxRuntimeBackend(open_bundle(folder, verify=False), threads=1, optimised=graphs)
    with pytest.raises(BackendError, match=r"cannot load .*image\.onnx"):
        backend.image_features(np.zeros((1, 64, 64, 3), np.uint8))
    assert "kept" not in caplog.text


@pytest.fixture
def keep_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime_backend, "WORTHWHILE_BYTES", range(1 << 30))


@pytest.mark.usefixtures("keep_small")
@pytest.mark.parametrize("spoilt", [None, "damaged", "foreign"])
def test_a_second_backend_runs_the_kept_graph_and_gives_the_same(
    tiny_bundle_folder: Path,
    tiny: ModuleType,
    graphs: OptimisedGraphs,
    spoilt: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    bundle = open_bundle(tiny_bundle_folder)
    images = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8)

    def grounded(**options: object) -> np.ndarray:
        return OnnxRuntimeBackend(bundle, threads=1, **options).image_features(images).grounded  # type: ignore[arg-type]

    expected = grounded(optimised=False)
    assert not graphs.folder.exists()
    np.testing.assert_array_equal(grounded(optimised=graphs), expected)
    (entry,) = graphs.folder.iterdir()
    if spoilt == "damaged":
        entry.write_bytes(entry.read_bytes()[:-1])
    elif spoilt == "foreign":
        graphs.write(entry, b"not a graph")
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(grounded(optimised=graphs), expected)
    assert ("made anew" in caplog.text) == (spoilt is not None)
    np.testing.assert_array_equal(grounded(optimised=graphs), expected)
    assert graphs.read(entry) is not None


@pytest.mark.usefixtures("keep_small")
def test_a_changed_graph_is_not_taken_for_the_kept_one(
    write_tiny_bundle: Callable[..., Path], tmp_path: Path, graphs: OptimisedGraphs
) -> None:
    one = write_tiny_bundle(tmp_path / "one")
    other = write_tiny_bundle(tmp_path / "other", kp_w=0)
    images = np.zeros((1, 64, 64, 3), np.uint8)
    OnnxRuntimeBackend(open_bundle(one), threads=1, optimised=graphs).image_features(images)
    shutil.copy(other / "image.onnx", one / "image.onnx")  # behind the back of bundle.json
    shutil.copy(other / "bundle.json", one / "bundle.json")
    found = OnnxRuntimeBackend(open_bundle(one, verify=False), threads=1, optimised=graphs).image_features(images)
    assert found.kp is None


def test_small_and_very_large_graphs_are_not_kept(tiny_bundle_folder: Path, graphs: OptimisedGraphs) -> None:
    images = np.zeros((1, 64, 64, 3), np.uint8)
    OnnxRuntimeBackend(open_bundle(tiny_bundle_folder), threads=1, optimised=graphs).image_features(images)
    assert not graphs.folder.exists()
    assert 6 << 20 in optimised_graphs.WORTHWHILE_BYTES
    assert 400 << 20 not in optimised_graphs.WORTHWHILE_BYTES
