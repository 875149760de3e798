"""Engines beside a bundle: written whole, read strictly, and found only where everything agrees."""

import dataclasses
import hashlib
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tclkit.runtime import engines
from tclkit.runtime.bundle import Bundle, open_bundle, write_manifest
from tclkit.runtime.engines import (
    DeviceIdentity,
    EngineFile,
    EngineMiss,
    EngineRecord,
    EngineSet,
    current_device,
    engine_misfit,
    find_engine,
    find_engines,
    read_engine_bytes,
    read_engines,
    write_engine,
)
from tclkit.runtime.errors import BackendError, BundleError, EngineMismatchError
from tclkit.runtime.files import models_folder

ORIN = DeviceIdentity(tensorrt_version="10.3.0", compute_capability="8.7", device_name="Orin", system="Linux aarch64")
THOR = DeviceIdentity(
    tensorrt_version="11.4.0.106", compute_capability="11.0", device_name="Thor", system="Linux aarch64"
)
SIZE = (64, 64)


@pytest.fixture
def bundle(write_tiny_bundle: Callable[..., Path], tmp_path: Path) -> Bundle:
    return open_bundle(write_tiny_bundle(tmp_path / "tiny"))


@pytest.fixture
def record(bundle: Bundle) -> EngineRecord:
    """Of the image graph, on Orin."""
    return EngineRecord(
        graph="image",
        precision="fp32",
        height=64,
        width=64,
        graph_sha256=bundle.manifest.files["image.onnx"].sha256,
        tensorrt_version=ORIN.tensorrt_version,
        compute_capability=ORIN.compute_capability,
        device_name=ORIN.device_name,
        system=ORIN.system,
        max_batch=8,
        max_prompts=16,
        flags=(),
        build_s=12.5,
    )


def found(bundle: Bundle, device: DeviceIdentity = ORIN, precision: str = "fp32") -> EngineFile | EngineMiss:
    return find_engine(bundle, graph="image", precision=precision, size=SIZE, device=device)


def missed(bundle: Bundle, device: DeviceIdentity = ORIN, precision: str = "fp32") -> EngineMiss:
    miss = found(bundle, device, precision)
    assert isinstance(miss, EngineMiss)
    return miss


def masks_record(bundle: Bundle, record: EngineRecord) -> EngineRecord:
    graph_sha256 = bundle.manifest.files["masks.onnx"].sha256
    return dataclasses.replace(record, graph="masks", precision="fp32", graph_sha256=graph_sha256)


def side_car(bundle: Bundle) -> Path:
    (path,) = (bundle.folder / "engines").glob("image-*.json")
    return path


def test_written_and_found(bundle: Bundle, record: EngineRecord) -> None:
    written = write_engine(bundle.folder, record, b"engine")
    assert written.engine_sha256 == hashlib.sha256(b"engine").hexdigest()
    assert written.size_bytes == 6
    assert written.created.endswith("+00:00")
    assert written.tclkit_version
    stem = "image-fp32-64x64-trt10.3.0-sm87"
    folder = bundle.folder / "engines"
    assert sorted(path.name for path in folder.iterdir()) == [f"{stem}.engine", f"{stem}.json"]
    engine = found(bundle)
    assert isinstance(engine, EngineFile)
    assert engine == EngineFile(path=folder / f"{stem}.engine", record=written)
    assert read_engine_bytes(engine) == b"engine"
    assert read_engines(bundle) == (engine,)
    assert engine_misfit(bundle, engine, ORIN) is None


def test_bundle_json_does_not_list_engines(bundle: Bundle, record: EngineRecord) -> None:
    write_engine(bundle.folder, record, b"engine")
    raw = json.loads((bundle.folder / "bundle.json").read_text(encoding="utf-8"))
    assert [file for file in write_manifest(bundle.folder, raw).files if "engine" in file] == []


def test_a_later_engine_takes_the_place_of_an_earlier(bundle: Bundle, record: EngineRecord) -> None:
    write_engine(bundle.folder, record, b"one")
    write_engine(bundle.folder, dataclasses.replace(record, max_batch=2), b"another")
    (engine,) = read_engines(bundle)
    assert (engine.record.max_batch, read_engine_bytes(engine)) == (2, b"another")


@pytest.mark.parametrize("failing", [".engine", ".json"])
def test_a_half_written_pair_is_never_found(
    bundle: Bundle, record: EngineRecord, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    write_engine(bundle.folder, record, b"one")
    real = engines.atomic_file

    def full_disk(path: Path) -> Any:
        if path.suffix == failing:
            raise OSError("no space left")
        return real(path)

    monkeypatch.setattr(engines, "atomic_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_engine(bundle.folder, record, b"another")
    assert read_engines(bundle) == ()
    assert missed(bundle).reason == "none built"


def test_none_built(bundle: Bundle) -> None:
    miss = missed(bundle)
    assert miss.reason == "none built"
    assert miss.message == (
        "no image engine in fp32 was built for tiny at 64x64. Build it here: tclkit build-engine --fp32 --model "
        f"{bundle.folder}, or use --backend onnxruntime"
    )
    assert isinstance(miss.error(), BackendError)


def test_no_graph(bundle: Bundle) -> None:
    miss = missed(bundle, precision="int8")
    assert miss.reason == "no graph"
    assert miss.message.startswith("tiny has no image graph in int8 for 64x64 (it has fp32). Build it here: ")
    other = find_engine(bundle, graph="masks", precision="fp32", size=(32, 32), device=ORIN)
    assert isinstance(other, EngineMiss)
    assert other.why == "tiny has no masks graph in fp32 for 32x32 (it has no precision)"


@pytest.mark.parametrize(
    ("change", "reason", "why"),
    [
        (
            {"tensorrt_version": "11.4.0"},
            "another TensorRT",
            "built with TensorRT 10.3.0 on sm_87 (Orin), but this machine has TensorRT 11.4.0 on sm_87 (Orin); an "
            "engine fits one TensorRT version",
        ),
        (
            {"compute_capability": "11.0", "device_name": "Thor"},
            "another device",
            "built with TensorRT 10.3.0 on sm_87 (Orin), but this machine has TensorRT 10.3.0 on sm_110 (Thor); an "
            "engine fits one compute capability",
        ),
        (
            {"system": "Linux x86_64"},
            "another system",
            "built on Linux aarch64, but this machine is Linux x86_64; an engine fits one system",
        ),
    ],
)
def test_an_engine_of_another_machine(
    bundle: Bundle, record: EngineRecord, change: dict[str, str], reason: str, why: str
) -> None:
    write_engine(bundle.folder, record, b"engine")
    miss = missed(bundle, dataclasses.replace(ORIN, **change))
    assert miss.reason == reason
    assert why in miss.why
    assert miss.record is not None
    assert f"Rebuild it here: tclkit build-engine --fp32 --model {bundle.folder}, or use --backend" in miss.message
    with pytest.raises(EngineMismatchError, match="image-fp32-64x64-trt10"):
        raise miss.error()


def test_a_graph_that_has_changed(bundle: Bundle, record: EngineRecord) -> None:
    write_engine(bundle.folder, dataclasses.replace(record, graph_sha256="0" * 64), b"engine")
    miss = missed(bundle)
    assert miss.reason == "graph changed"
    assert "was built from another image graph (000000000000) than tiny has now" in miss.why


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda path: path.write_bytes(b"engin"), "is damaged: expected 6 bytes, found 5"),
        (lambda path: path.unlink(), "is not there, though its side-car is"),
        (lambda path: (path.unlink(), path.mkdir()), "is not a regular file"),
        (lambda path: path.symlink_to(path.rename(path.parents[2] / "moved")), "leads outside the bundle"),
        (lambda path: (path.unlink(), path.symlink_to(path)), "is not there"),
        (lambda path: path.with_suffix(".json").write_text("{", encoding="utf-8"), "is not valid JSON"),
    ],
)
def test_damaged_files(bundle: Bundle, record: EngineRecord, damage: Callable[[Path], Any], why: str) -> None:
    write_engine(bundle.folder, record, b"engine")
    damage(side_car(bundle).with_suffix(".engine"))
    miss = missed(bundle)
    assert miss.reason == "damaged"
    assert why in miss.why
    assert isinstance(miss.error(), BundleError)


def test_a_flipped_bit_shows_when_it_is_read(bundle: Bundle, record: EngineRecord) -> None:
    write_engine(bundle.folder, record, b"engine")
    side_car(bundle).with_suffix(".engine").write_bytes(b"engiNe")
    engine = found(bundle)  # the size is right, and the bytes are not read to find it
    assert isinstance(engine, EngineFile)
    with pytest.raises(BundleError, match=r"engine is damaged: expected SHA-256 \w{64}, found \w{64}\. Build it again"):
        read_engine_bytes(engine)
    engine.path.unlink()
    with pytest.raises(BundleError, match=r"cannot be read: No such file.* say what"):
        read_engine_bytes(engine, remedy="say what")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"flags": ["fast"]}, "'flags' should be some of hardware-compatible"),
        ({"graph": "text"}, "'graph' should be one of image, masks"),
        ({"precision": "fp8"}, "'precision' should be one of fp32, fp16, int8"),
        ({"graph": "masks", "precision": "fp16"}, "'precision' should be fp32 for the masks graph"),
        ({"max_batch": 0}, "'max_batch' should be an integer above 0, found 0"),
        ({"max_prompts": "16"}, "'max_prompts' should be an integer above 0"),
        ({"build_s": -1}, "'build_s' should be a number of seconds"),
        ({"build_s": True}, "'build_s' should be a number of seconds"),
        ({"engine_sha256": "AB"}, "'engine_sha256' should be 64 lower-case"),
        ({"graph_sha256": "AB"}, "'graph_sha256' should be 64 lower-case"),
        ({"tensorrt_version": "../../x"}, "'tensorrt_version' should be a version"),
        ({"compute_capability": "87"}, "'compute_capability' should be such as 8.7"),
        ({"schema_version": 2}, "'schema_version' should be 1, found 2"),
        ({"max_promts": 16}, "unknown key 'max_promts', the nearest known one is 'max_prompts'"),
        ({"width": 128}, "describes image-fp32-64x128-trt10.3.0-sm87"),
        (None, "lacks the key 'schema_version'"),
        ([], "an object was expected, found list"),
    ],
    ids=str,
)
def test_side_cars_are_read_strictly(
    bundle: Bundle, record: EngineRecord, change: Any, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_engine(bundle.folder, record, b"engine")
    path = side_car(bundle)
    raw = json.loads(path.read_text(encoding="utf-8"))
    raw = raw | change if isinstance(change, dict) else {} if change is None else change
    path.write_text(json.dumps(raw), encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert read_engines(bundle) == ()
    (announced,) = caplog.messages
    assert announced.startswith(f"left out: {path}")
    assert why in announced
    assert announced.endswith("Build the engine again: tclkit build-engine")
    assert missed(bundle).reason == "damaged"


def test_a_broken_side_car_of_another_machine_is_no_damage_here(bundle: Bundle, record: EngineRecord) -> None:
    write_engine(bundle.folder, record, b"engine")
    side_car(bundle).write_text("[", encoding="utf-8")
    assert missed(bundle, THOR).reason == "none built"


def test_records_are_checked_when_they_are_made(record: EngineRecord) -> None:
    with pytest.raises(BundleError, match="'height' should be above 0, found 0"):
        dataclasses.replace(record, height=0)


def test_the_nearest_reason_is_told(bundle: Bundle, record: EngineRecord) -> None:
    write_engine(bundle.folder, dataclasses.replace(record, compute_capability="8.9"), b"engine")
    write_engine(bundle.folder, dataclasses.replace(record, tensorrt_version="10.4.0"), b"engine")
    assert missed(bundle).reason == "another TensorRT"


def test_hardware_compatible_engines(bundle: Bundle, record: EngineRecord) -> None:
    write_engine(bundle.folder, dataclasses.replace(record, flags=("hardware-compatible",)), b"engine")
    for capability in ("8.0", "11.0"):
        assert isinstance(found(bundle, dataclasses.replace(ORIN, compute_capability=capability)), EngineFile)
    assert missed(bundle, dataclasses.replace(ORIN, compute_capability="7.5")).reason == "another device"


def test_version_compatible_engines(bundle: Bundle, record: EngineRecord) -> None:
    write_engine(bundle.folder, dataclasses.replace(record, flags=("version-compatible",)), b"engine")
    assert isinstance(found(bundle, dataclasses.replace(ORIN, tensorrt_version="11.4.0.106")), EngineFile)
    assert missed(bundle, dataclasses.replace(ORIN, tensorrt_version="10.2.9")).reason == "another TensorRT"
    write_engine(bundle.folder, dataclasses.replace(record, tensorrt_version="11.4.0.106"), b"made for it")
    exact = found(bundle, dataclasses.replace(ORIN, tensorrt_version="11.4.0.106"))
    assert isinstance(exact, EngineFile)
    assert read_engine_bytes(exact) == b"made for it"


def test_a_version_compatible_engine_of_somebody_else_is_not_loaded(bundle: Bundle, record: EngineRecord) -> None:
    """It carries code that TensorRT would run; whatever its side-car claims."""
    write_engine(bundle.folder, dataclasses.replace(record, flags=("version-compatible",)), b"engine")
    assert isinstance(found(bundle), EngineFile)
    (models_folder().parent / "engines-built-here.txt").unlink()
    miss = missed(bundle)
    assert miss.reason == "not trusted"
    assert "carries code that would run here, and it was not built by you here" in miss.message
    assert isinstance(miss.error(), EngineMismatchError)


def test_only_version_compatible_engines_are_remembered(bundle: Bundle, record: EngineRecord) -> None:
    """The list lies in a folder that need not be writable."""
    models_folder().parent.mkdir(parents=True, exist_ok=True)
    remembered = models_folder().parent / "engines-built-here.txt"
    write_engine(bundle.folder, record, b"engine")
    assert not remembered.exists()
    write_engine(bundle.folder, dataclasses.replace(record, flags=("version-compatible",)), b"engine")
    assert len(remembered.read_text(encoding="ascii").split()) == 1


def test_a_set_needs_both_graphs(bundle: Bundle, record: EngineRecord) -> None:
    write_engine(bundle.folder, record, b"engine")
    miss = find_engines(bundle, precision="fp32", device=ORIN)
    assert isinstance(miss, EngineMiss)
    assert "no masks engine" in miss.why
    write_engine(bundle.folder, masks_record(bundle, record), b"masks")
    complete = find_engines(bundle, precision="fp32", device=ORIN)
    assert isinstance(complete, EngineSet)
    ((image, masks),) = complete.engines.values()
    assert (image.record.graph, masks.record.graph) == ("image", "masks")


def with_half_graph(bundle: Bundle) -> Bundle:
    """The bundle with a further image graph that is called fp16."""
    raw = json.loads((bundle.folder / "bundle.json").read_text(encoding="utf-8"))
    (bundle.folder / "image.fp16.onnx").write_bytes((bundle.folder / "image.onnx").read_bytes() + b"\x00")
    raw["images"][0]["files"]["fp16"] = "image.fp16.onnx"
    write_manifest(bundle.folder, raw)
    return open_bundle(bundle.folder)


def test_auto_takes_the_lowest_precision_that_is_complete(bundle: Bundle, record: EngineRecord) -> None:
    bundle = with_half_graph(bundle)
    miss = find_engines(bundle, precision="auto", device=ORIN)
    assert isinstance(miss, EngineMiss)
    assert miss.message.startswith(
        "no engines were built for tiny. Build them here: tclkit build-engine --fp16 --model"
    )
    write_engine(bundle.folder, record, b"engine")
    write_engine(bundle.folder, masks_record(bundle, record), b"masks")
    single = find_engines(bundle, precision="auto", device=ORIN)
    assert isinstance(single, EngineSet)
    assert single.precision == "fp32"
    half_sha256 = bundle.manifest.files["image.fp16.onnx"].sha256
    write_engine(bundle.folder, dataclasses.replace(record, precision="fp16", graph_sha256=half_sha256), b"half")
    half = find_engines(bundle, precision="auto", device=ORIN)
    assert isinstance(half, EngineSet)
    assert half.precision == "fp16"
    only = find_engines(bundle, precision="fp32", device=ORIN)
    assert isinstance(only, EngineSet)
    assert only.precision == "fp32"


def test_the_remedy_for_a_stale_masks_engine_builds_the_precision_asked_for(
    bundle: Bundle, record: EngineRecord
) -> None:
    bundle = with_half_graph(bundle)
    half_sha256 = bundle.manifest.files["image.fp16.onnx"].sha256
    write_engine(bundle.folder, dataclasses.replace(record, precision="fp16", graph_sha256=half_sha256), b"half")
    write_engine(bundle.folder, dataclasses.replace(masks_record(bundle, record), graph_sha256="0" * 64), b"masks")
    miss = find_engines(bundle, precision="fp16", device=ORIN)
    assert isinstance(miss, EngineMiss)
    assert (miss.reason, "--fp16" in miss.remedy) == ("graph changed", True)


def test_the_command_names_an_installed_bundle(
    write_tiny_bundle: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TCLKIT_HOME", str(tmp_path))
    installed = open_bundle(write_tiny_bundle(tmp_path / "models" / "tiny"))
    assert engines.build_command(installed, "fp16") == "tclkit build-engine --fp16 --model tiny"
    elsewhere = open_bundle(write_tiny_bundle(tmp_path / "my models" / "tiny"))
    assert engines.build_command(elsewhere, "int8") == (
        f"tclkit build-engine --int8 --model '{elsewhere.folder}' --calibration IMAGES"
    )


@pytest.mark.parametrize("version", ["10.3.0", "11.4.0.106"])
def test_this_device(tensorrt_simulator: Callable[..., Any], version: str) -> None:
    tensorrt_simulator(version)
    device = current_device()
    assert (device.tensorrt_version, device.compute_capability, device.device_name) == (version, "8.7", "Orin")
    assert str(device) == f"TensorRT {version} on sm_87 (Orin)"


def test_no_tensorrt(tensorrt_simulator: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    tensorrt_simulator("10.3.0")
    with monkeypatch.context() as patched:  # undone before the simulator goes
        patched.setitem(sys.modules, "tensorrt", None)
        with pytest.raises(BackendError, match=r"tensorrt cannot be imported .*JetPack.*Servers: pip install tensorrt"):
            current_device()
