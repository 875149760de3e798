"""Reading torch's archives without running them."""

import collections
import pickle
import zipfile

import numpy as np
import pytest
import torch

from tclkit.runtime.errors import CheckpointError
from tclkit.tcl import _torch_archive, load_checkpoint, load_clip
from tclkit.tcl._torch_archive import Inert, is_torchscript, plain_from_inert, read_archive, state_dict_from_modules


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool]
)
def test_tensors_of_every_kind(dtype, tmp_path):
    whole = torch.arange(24).reshape(4, 6).to(dtype)
    content = {"whole": whole, "view": whole[1:3, ::2], "turned": whole.T, "scalar": whole[0, 1], "empty": whole[:0]}
    torch.save(content, tmp_path / "t.pt")
    read = read_archive(tmp_path / "t.pt")
    assert read.keys() == content.keys()
    for name, tensor in content.items():
        assert read[name].dtype == dtype
        assert torch.equal(read[name], tensor)


def test_plain_values_and_state_dicts(tmp_path):
    module = torch.nn.Linear(2, 3)
    content = {"a": [1, 2.5, "x", None, True, b"bytes"], "state": module.state_dict(), "parameter": module.weight}
    torch.save(content, tmp_path / "t.pt")
    read = read_archive(tmp_path / "t.pt")
    assert read["a"] == content["a"]
    assert torch.equal(read["state"]["weight"], module.weight)
    assert torch.equal(read["parameter"], module.weight)


def test_numpy_scalars_become_numbers(tmp_path):
    torch.save({"x": np.float64(1.25), "n": np.int64(-3), "odd": np.complex128(1j)}, tmp_path / "t.pt")
    read = read_archive(tmp_path / "t.pt")
    assert read["x"] == 1.25
    assert read["n"] == -3
    assert isinstance(read["odd"], Inert)


def test_strange_objects_become_stand_ins(tmp_path):
    content = {"counter": collections.Counter("aab"), "default": collections.defaultdict(list, a=[1])}
    torch.save(content, tmp_path / "t.pt")
    read = read_archive(tmp_path / "t.pt")
    assert read["default"] == {"a": [1]}
    assert repr(read["counter"]) == "<inert collections.Counter>"
    assert plain_from_inert(read) == {"counter": "<inert collections.Counter>", "default": {"a": [1]}}


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(3, 2)
        self.register_buffer("steps", torch.tensor([1, 2]))

    def forward(self, x):
        return self.inner(x)


def test_torchscript_tensors(golden, tmp_path):
    path = golden / "clip_micro_jit.pt"
    assert is_torchscript(path)
    assert not is_torchscript(golden / "clip_micro.pt")
    ours, plain = state_dict_from_modules(read_archive(path)), torch.load(golden / "clip_micro.pt", weights_only=True)
    assert ours.keys() == plain.keys()
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


def archive(path, pickled: bytes, records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("t/data.pkl", pickled)
        for name, data in records.items():
            file.writestr(f"t/data/{name}", data)


def tensor_pickle(offset: int, size: tuple[int, ...], stride: tuple[int, ...], count: int) -> bytes:
    """A pickle of one float tensor over storage "0"."""

    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (storage, offset, size, stride, False, collections.OrderedDict())

    storage = object()

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", count) if value is storage else None

    import io

    stream = io.BytesIO()
    Pickler(stream, protocol=2).dump(Tensor())
    return stream.getvalue()


def test_a_good_handmade_archive(tmp_path):
    archive(tmp_path / "t.pt", tensor_pickle(1, (2,), (2,), 4), {"0": np.arange(4, dtype="<f4").tobytes()})
    assert read_archive(tmp_path / "t.pt").tolist() == [1.0, 3.0]


@pytest.mark.parametrize(
    ("offset", "size", "stride", "count", "message"),
    [
        (0, (5,), (1,), 4, "reaches outside its storage"),
        (3, (2,), (1,), 4, "reaches outside"),
        (-1, (2,), (1,), 4, "reaches outside"),
        (0, (2,), (-1,), 4, "reaches outside"),
        (0, (2, 2), (1, 9), 4, "reaches outside"),
        (0, (10**12,), (0,), 4, "reaches outside"),
        (0, (4,), (1,), 5, "has 16 bytes, expected 20"),
        (0, (4,), (1,), 10**15, "expected 4000000000000000"),
    ],
)
def test_tensors_beyond_their_storage_are_refused(offset, size, stride, count, message, tmp_path):
    archive(tmp_path / "t.pt", tensor_pickle(offset, size, stride, count), {"0": bytes(16)})
    with pytest.raises(CheckpointError, match=message):
        read_archive(tmp_path / "t.pt")


def test_compressed_storages_are_refused(tmp_path):
    archive(tmp_path / "t.pt", tensor_pickle(0, (4,), (1,), 4), {"0": bytes(16)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="is damaged"):
        read_archive(tmp_path / "t.pt")


def test_a_compressed_pickle_is_refused(tmp_path):
    archive(tmp_path / "t.pt", b"\x80\x02]" + b"]0" * 1000 + b".", {}, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match=r"is damaged \(t/data\.pkl is compressed"):
        read_archive(tmp_path / "t.pt")


@pytest.mark.parametrize("pickled", [b"", b"garbage", b"\x80\x02}q\x00(X\x01", b"\x80\x02K\x01\x81."])
def test_broken_pickles_are_refused(pickled, tmp_path):
    archive(tmp_path / "t.pt", pickled, {})
    with pytest.raises(CheckpointError, match="is damaged"):
        read_archive(tmp_path / "t.pt")


@pytest.mark.parametrize("state", [b"}X\x0e\x00\x00\x00__kwdefaults__}s", b"N}X\x0e\x00\x00\x00__kwdefaults__}s\x86"])
def test_our_own_functions_take_no_state(state, tmp_path):
    """BUILD writes into the __dict__ of what it finds, or sets attributes: here of the function that makes tensors."""
    before = dict(vars(_torch_archive._tensor)), _torch_archive._tensor.__kwdefaults__
    archive(tmp_path / "t.pt", b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n" + state + b"b.", {})
    with pytest.raises(CheckpointError, match=r"is damaged \(a state for <function _tensor"):
        read_archive(tmp_path / "t.pt")
    assert (dict(vars(_torch_archive._tensor)), _torch_archive._tensor.__kwdefaults__) == before


def test_a_state_dict_may_have_a_state(tmp_path):
    """As torch gives it: _metadata of the modules."""
    state = torch.nn.Linear(2, 1).state_dict()
    assert state._metadata
    torch.save(state, tmp_path / "t.pt")
    assert read_archive(tmp_path / "t.pt").keys() == state.keys()


def tied(knot: str):
    """Values that hold themselves, or each other many times over, or are deep."""
    if knot == "itself":
        values: list = []
        values.append(values)
        return values
    values = ["ha"]
    for _ in range(60 if knot == "many times" else 5000):
        values = [values, values] if knot == "many times" else [values]
    return values


@pytest.mark.parametrize("knot", ["itself", "many times", "deep"])
def test_values_that_are_tied_up_are_refused(knot):
    modules = tied(knot)
    with pytest.raises(CheckpointError, match="more than 100 deep, or more than 100,000"):
        plain_from_inert(modules)
    with pytest.raises(CheckpointError, match="more than 100 deep, or more than 100,000"):
        state_dict_from_modules(modules_from(modules, {}))


def modules_from(values, known):
    """The same ties between stand-ins of modules."""
    root = Inert()
    pending = [(values, root)]
    known[id(values)] = root
    while pending:
        value, module = pending.pop()
        module.state = {}
        for number, item in enumerate(value):
            if isinstance(item, list) and id(item) not in known:
                known[id(item)] = Inert()
                pending.append((item, known[id(item)]))
            module.state[str(number)] = known.get(id(item), item)
    return root


def test_a_container_is_no_key():
    with pytest.raises(CheckpointError, match="a container for the name"):
        plain_from_inert({("a", 1): 2})


def test_a_huge_memo_index_costs_nothing(tmp_path):
    archive(tmp_path / "t.pt", b"\x80\x02]r\xff\xff\xff\xff.", {})
    assert read_archive(tmp_path / "t.pt") == []


def test_names_that_are_no_strings_are_passed_over(tmp_path):
    torch.save({("a", 1): torch.zeros(1), 2: torch.zeros(1)}, tmp_path / "t.pt")
    with pytest.raises(CheckpointError, match="no CLIP with a ViT"):
        load_clip(tmp_path / "t.pt")
    with pytest.raises(CheckpointError, match="no TCL checkpoint"):
        load_checkpoint(tmp_path / "t.pt")


def test_a_function_becomes_a_stand_in(tmp_path):
    archive(tmp_path / "t.pt", b"cos\nsystem\n(S'exit 1'\ntR.", {})
    assert repr(read_archive(tmp_path / "t.pt")) == "<inert os.system>"


def test_other_files_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "z.pt", "w") as file:
        file.writestr("hello.txt", "x")
    with pytest.raises(CheckpointError, match=r"not a file written by torch\.save"):
        read_archive(tmp_path / "z.pt")
    assert not is_torchscript(tmp_path / "z.pt")
