"""Weights in other files, found wherever ONNX lets a tensor stand, in files of any kind."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tclkit import runtime
from tclkit.runtime.external_weights import has_external_weights


def tensor(*, external: bool, name: str = "w") -> TensorProto:
    made = numpy_helper.from_array(np.arange(300, dtype=np.float32), name)
    if external:
        made.ClearField("raw_data")
        made.data_location = TensorProto.EXTERNAL
        made.external_data.add(key="location", value="../outside.bin")
    return made


def as_initializer(value: TensorProto) -> onnx.GraphProto:
    return helper.make_graph([helper.make_node("Identity", ["w"], ["y"])], "g", [], [], [value])


def as_constant(value: TensorProto) -> onnx.GraphProto:
    return helper.make_graph([helper.make_node("Constant", [], ["y"], value=value)], "g", [], [])


def in_a_branch(value: TensorProto) -> onnx.GraphProto:
    branches = {"then_branch": as_constant(value), "else_branch": as_initializer(value)}
    return helper.make_graph([helper.make_node("If", ["c"], ["y"], **branches)], "g", [], [])


def sparse(value: TensorProto) -> onnx.GraphProto:
    graph = helper.make_graph([], "g", [], [])
    indices = numpy_helper.from_array(np.arange(300), "i")
    graph.sparse_initializer.append(helper.make_sparse_tensor(value, indices, [600]))
    return graph


@pytest.mark.parametrize("place", [as_initializer, as_constant, in_a_branch, sparse])
@pytest.mark.parametrize("external", [True, False])
def test_wherever_a_tensor_stands(
    place: Callable[[TensorProto], onnx.GraphProto], external: bool, tmp_path: Path
) -> None:
    model = helper.make_model(place(tensor(external=external)))
    (tmp_path / "a.onnx").write_bytes(model.SerializeToString())
    assert has_external_weights(tmp_path / "a.onnx") == external


def test_in_a_function(tmp_path: Path) -> None:
    node = helper.make_node("Constant", [], ["y"], value=tensor(external=True))
    function = helper.make_function("own", "f", [], ["y"], [node], [helper.make_opsetid("", 20)])
    model = helper.make_model(helper.make_graph([], "g", [], []), functions=[function])
    (tmp_path / "a.onnx").write_bytes(model.SerializeToString())
    assert has_external_weights(tmp_path / "a.onnx")


def test_behind_what_parsers_pass_over(tmp_path: Path) -> None:
    model = helper.make_model(as_initializer(tensor(external=True)))
    group = b"\xfb\x06\xfc\x06"  # field 111 begins and ends
    (tmp_path / "a.onnx").write_bytes(group + model.SerializeToString())
    assert onnx.load(tmp_path / "a.onnx", load_external_data=False).graph.initializer
    assert has_external_weights(tmp_path / "a.onnx")


def test_the_shipped_graphs_have_none() -> None:
    paths = sorted((Path(runtime.__file__).parent / "models").rglob("*.onnx"))
    assert paths
    assert not any(has_external_weights(path) for path in paths)


@pytest.mark.parametrize(
    "content", [b"", b"no graph at all", b"\x3a", b"\x3a\xff\xff\xff\xff", b"\xff" * 40, bytes(20)]
)
def test_what_is_no_onnx_file_is_left_to_others(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(content)
    assert not has_external_weights(tmp_path / "a.onnx")
