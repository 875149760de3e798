import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tclkit.calib import Contender
from tclkit.calib.bench_contenders import bundle_of_size, choose_entrants
from tclkit.runtime import open_bundle
from tclkit.runtime.backends import Backend
from tclkit.runtime.bundle import Bundle
from tclkit.runtime.errors import BackendError, InputError


def open_nothing(bundle: Bundle, threads: int | None = None) -> Backend:
    raise BackendError("there is nothing to open")


OTHER = Contender(name="other", identity="1", open=open_nothing)


@pytest.fixture
def bundle(tmp_path: Path, write_tiny_bundle: object) -> Bundle:
    return open_bundle(write_tiny_bundle(tmp_path / "tiny", more_sizes=[(32, 64)]))  # type: ignore[operator]


def test_every_backend_in_every_precision(bundle: Bundle) -> None:
    entrants = choose_entrants(bundle, ["openvino", "onnxruntime"], ["int8", "fp32"], [OTHER])
    assert [entrant.name for entrant in entrants] == [
        "openvino int8",
        "openvino fp32",
        "onnxruntime int8",
        "onnxruntime fp32",
        "other fp32",
    ]


def test_what_is_there_is_taken(bundle: Bundle) -> None:
    names = [entrant.name for entrant in choose_entrants(bundle, ["onnxruntime", "openvino"], [], [])]
    assert names == ["onnxruntime fp32", "openvino fp32", "openvino bf16"]
    assert "onnxruntime fp32" in [entrant.name for entrant in choose_entrants(bundle, [], [], [])]


def test_an_entrant_travels_to_another_process(bundle: Bundle) -> None:
    (entrant,) = pickle.loads(pickle.dumps(choose_entrants(bundle, ["onnxruntime"], ["fp32"], [])))
    backend = entrant.open(bundle, threads=1)
    assert (backend.name, backend.precision) == ("onnxruntime", "fp32")


@pytest.mark.parametrize("size", [(64, 64), (32, 64)])
def test_one_size_alone(bundle: Bundle, size: tuple[int, int]) -> None:
    (image,) = bundle_of_size(bundle, size).manifest.images
    assert (image.height, image.width) == size


def test_a_size_without_graph_is_refused(bundle: Bundle) -> None:
    with pytest.raises(InputError, match=r"no image graph for 64x32, only for 64x64, 32x64\. .* --size 64x32"):
        bundle_of_size(bundle, (64, 32))


def test_what_only_processors_run_is_measured_there(
    tiny_bundle_folder: Path, tmp_path: Path, add_processor_graph: Callable[..., str]
) -> None:
    folder = Path(shutil.copytree(tiny_bundle_folder, tmp_path / "tiny"))
    add_processor_graph(folder, "int8")
    names = [entrant.name for entrant in choose_entrants(open_bundle(folder), ["onnxruntime", "openvino"], [], [])]
    assert names == ["onnxruntime fp32", "openvino fp32", "openvino bf16", "openvino int8"]
