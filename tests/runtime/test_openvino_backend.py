"""The OpenVINO backend gives what ONNX Runtime gives, in the precision asked for and no other, and says why."""

import gc
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest

from tclkit.runtime import openvino_backend
from tclkit.runtime.backends import HostFeatures
from tclkit.runtime.bundle import Bundle, find_bundle, open_bundle
from tclkit.runtime.cpu_records import GATE_FIGURES, CpuRecord, write_cpu_record
from tclkit.runtime.errors import BackendError, BundleError, InputError
from tclkit.runtime.files import cache_folder
from tclkit.runtime.memory import MappedFile
from tclkit.runtime.onnxruntime_backend import OnnxRuntimeBackend
from tclkit.runtime.openvino_backend import OpenVinoBackend, check_cpu_precision, open_openvino, openvino_core

HAS_BF16 = "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@pytest.fixture(scope="module")
def shapes() -> Bundle:
    return open_bundle("tcl-shapes")


@pytest.fixture(scope="module")
def backend(shapes: Bundle) -> OpenVinoBackend:
    return OpenVinoBackend(shapes, threads=1, keep_compiled=False)


@pytest.fixture(scope="module")
def reference(shapes: Bundle) -> OnnxRuntimeBackend:
    return OnnxRuntimeBackend(shapes, threads=1)


def images(batch: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (batch, 128, 128, 3), dtype=np.uint8)


def texts(count: int) -> np.ndarray:
    made = np.random.default_rng(1).normal(size=(count, 128)).astype(np.float32)
    return np.asarray(made / np.linalg.norm(made, axis=1, keepdims=True))


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("prompts", [1, 5])
def test_float32_is_onnx_runtimes(
    backend: OpenVinoBackend, reference: OnnxRuntimeBackend, batch: int, prompts: int
) -> None:
    found, expected = backend.image_features(images(batch)), reference.image_features(images(batch))
    np.testing.assert_allclose(found.grounded, expected.grounded, atol=1e-5)
    assert found.kp is not None
    assert expected.kp is not None
    np.testing.assert_allclose(found.kp, expected.kp, atol=1e-5)
    for kp_w in (0.0, 0.3):
        masks = backend.masks(found, texts(prompts), kp_w)
        assert masks.dtype == np.float32
        np.testing.assert_allclose(masks, reference.masks(expected, texts(prompts), kp_w), atol=1e-5)


def test_texts_of_any_length_are_onnx_runtimes(backend: OpenVinoBackend, reference: OnnxRuntimeBackend) -> None:
    rng = np.random.default_rng(2)
    for count, length in ((1, 3), (9, 32), (4, 12)):
        ids = rng.integers(0, 400, (count, length))
        np.testing.assert_allclose(backend.encode_text(ids), reference.encode_text(ids), atol=1e-5)


def test_arrays_that_may_not_be_written_are_read_as_they_are(backend: OpenVinoBackend) -> None:
    """Such an array is copied for OpenVINO; the copy has to live until the run is over."""
    writable, text_ND = images(1), texts(4)
    expected = backend.image_features(writable)
    expected_masks = backend.masks(expected, text_ND, 0.3)
    text_ND.flags.writeable = False
    for _ in range(5):
        read_only = writable.copy()
        read_only.flags.writeable = False
        np.testing.assert_array_equal(backend.image_features(read_only).grounded, expected.grounded)
        np.testing.assert_array_equal(backend.masks(expected, text_ND, 0.3), expected_masks)


def test_threads_that_open_at_once_share_one_core() -> None:
    code = """
import threading
from tclkit.runtime.openvino_backend import openvino_core
cores, start = [], threading.Barrier(4)
def ask():
    start.wait()
    cores.append(openvino_core())
threads = [threading.Thread(target=ask) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(len(set(map(id, cores))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


def test_an_openvino_that_cannot_start_is_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise RuntimeError("Cannot load library\nplugins.xml")

    monkeypatch.setattr("openvino.Core", fails)
    with pytest.raises(BackendError, match=r"openvino cannot start \(plugins\.xml\).*--backend onnxruntime"):
        openvino_backend._core.__wrapped__()  # the process's own core stays


def test_features_stay_as_they_were(backend: OpenVinoBackend) -> None:
    first = backend.image_features(images(1))
    kept = first.grounded.copy()
    masks = backend.masks(first, texts(3), 0.3)
    masks_kept = masks.copy()
    second = backend.image_features(images(1, seed=9))
    backend.masks(second, texts(3), 0.3)
    assert np.abs(second.grounded - kept).max() > 0.01
    np.testing.assert_array_equal(first.grounded, kept)
    np.testing.assert_array_equal(masks, masks_kept)


def test_images_are_taken_one_by_one(shapes: Bundle) -> None:
    backend = OpenVinoBackend(shapes, threads=1)
    together = backend.image_features(images(3))
    for index, one_HWC in enumerate(images(3)):
        alone = backend.image_features(one_HWC[None])
        np.testing.assert_array_equal(together.grounded[index], alone.grounded[0])
        assert together.kp is not None
        assert alone.kp is not None
        np.testing.assert_array_equal(together.kp[index], alone.kp[0])
    assert len(blobs()) == 1  # one model for one image and for many


def test_images_may_be_views_and_read_only(backend: OpenVinoBackend) -> None:
    image = images(2)
    view = image[:1, :, ::-1]
    frozen = np.ascontiguousarray(view)
    frozen.flags.writeable = False
    np.testing.assert_array_equal(backend.image_features(view).grounded, backend.image_features(frozen).grounded)


@pytest.mark.skipif(not HAS_BF16, reason="the processor has no bfloat16; the refusal is tested without it")
def test_bfloat16_is_near_float32_and_the_masks_graph_is_float32(
    shapes: Bundle, backend: OpenVinoBackend, reference: OnnxRuntimeBackend
) -> None:
    rounded = OpenVinoBackend(shapes, precision="bf16", threads=1, keep_compiled=False)
    assert (rounded.precision, rounded.float_type) == ("bf16", "bf16")
    exact, found = backend.image_features(images(1)), rounded.image_features(images(1))
    difference = np.abs(found.grounded - exact.grounded).max()
    assert 1e-4 < difference < 0.2  # it is bfloat16, and no more than that
    np.testing.assert_allclose(rounded.masks(exact, texts(4), 0.3), reference.masks(exact, texts(4), 0.3), atol=1e-5)
    ids = np.array([[1, 2, 3]])
    np.testing.assert_allclose(rounded.encode_text(ids), reference.encode_text(ids), atol=1e-5)


class Core:
    """A processor without bfloat16, as OpenVINO would describe it."""

    def get_property(self, device: str, name: str) -> Any:
        return {"OPTIMIZATION_CAPABILITIES": ["FP32", "INT8"], "FULL_DEVICE_NAME": "Old CPU "}[name]


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ("bf16", r"this processor \(Old CPU\) has no bfloat16 instructions .*Take --precision int8 or fp32"),
        ("fp16", "OpenVINO computes fp16 graphs on a CPU in fp32 or bf16, not in fp16.*Take --precision bf16"),
        ("int4", "OpenVINO runs in fp32, bf16, int8, not in 'int4'"),
    ],
)
def test_what_a_processor_cannot_do_is_refused(precision: str, message: str) -> None:
    with pytest.raises(BackendError, match=message):
        check_cpu_precision(Core(), precision)
    check_cpu_precision(Core(), "fp32")
    check_cpu_precision(Core(), "int8")


def test_a_precision_the_bundle_does_not_have(shapes: Bundle) -> None:
    with pytest.raises(BackendError, match=r"no image graph in int8, only in fp32\. Make it: .*--int8 .*--device cpu"):
        OpenVinoBackend(shapes, precision="int8")


def with_record(folder: Path, precision: str, **changes: Any) -> Bundle:
    bundle = open_bundle(folder)
    identity = OpenVinoBackend(bundle).identity
    figures = dict.fromkeys(GATE_FIGURES, 1.0)
    values: dict[str, Any] = {
        "precision": precision,
        "height": 128,
        "width": 128,
        "graph_sha256": bundle.manifest.files["image.onnx"].sha256,
        "openvino_version": identity.openvino_version,
        "processor": identity.processor,
        "flags_sha256": identity.flags_sha256,
        "system": identity.system,
        "figures": figures,
        "thresholds": figures,
    }
    write_cpu_record(folder, CpuRecord(**(values | changes)))
    return bundle


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(find_bundle("tcl-shapes"), tmp_path / "shapes"))


def test_auto_is_float32_until_something_passed_the_gate_here(folder: Path) -> None:
    opened = open_openvino(open_bundle(folder))
    assert opened.precision == "fp32"
    assert "faster, if it passes here: tclkit build-engine --" in opened.reason
    assert opened.reason.startswith(f"asked for ({opened.identity}, fp32; ")
    with pytest.raises(BackendError, match=r"(bf16 was not judged .*--bf16 .*--device cpu|no bfloat16)"):
        open_openvino(open_bundle(folder), precision="bf16")


@pytest.mark.skipif(not HAS_BF16, reason="the processor has no bfloat16; the refusal is tested without it")
def test_auto_takes_what_passed_the_gate_here(folder: Path) -> None:
    bundle = with_record(folder, "bf16")
    opened = open_openvino(bundle)
    assert opened.precision == "bf16"
    assert opened.reason == f"asked for ({opened.identity}, bf16)"
    assert open_openvino(bundle, precision="fp32").precision == "fp32"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flags_sha256": "0" * 64}, "but this machine has another processor of this name"),
        ({"openvino_version": "2024.0.0-1"}, "was judged with OpenVINO 2024.0.0"),
        ({"graph_sha256": "0" * 64}, "was judged with another image graph"),
    ],
)
def test_what_passed_elsewhere_is_not_taken_and_said(folder: Path, change: dict[str, Any], message: str) -> None:
    bundle = with_record(folder, "bf16", **change)
    opened = open_openvino(bundle)
    assert opened.precision == "fp32"
    assert message in opened.reason
    assert "To have it again: tclkit build-engine" in opened.reason


def blobs() -> list[Path]:
    return sorted((cache_folder() / "openvino").glob("*.blob"))


def test_what_is_compiled_is_kept_and_taken_again(shapes: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    first = OpenVinoBackend(shapes, threads=1)
    expected = first.image_features(images(1)).grounded
    first.prepare((128, 128))
    assert len(blobs()) == 2  # the image graph for one image, and the masks graph
    monkeypatch.setattr(OpenVinoBackend, "_compiled", lambda *arguments: pytest.fail("it was compiled again"))
    second = OpenVinoBackend(shapes, threads=2)
    second.prepare((128, 128))
    found = second.image_features(images(1))
    np.testing.assert_allclose(found.grounded, expected, atol=1e-6)
    second.close()
    del second, first
    gc.collect()
    assert np.isfinite(found.grounded).all()


@pytest.mark.parametrize("harm", ["flipped", "truncated", "of another OpenVINO"])
def test_a_damaged_entry_is_compiled_anew(
    harm: str,
    shapes: Bundle,
    backend: OpenVinoBackend,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    OpenVinoBackend(shapes, threads=1).image_features(images(1))
    (path,) = blobs()
    content = bytearray(path.read_bytes())
    if harm == "flipped":
        content[len(content) // 2] ^= 255
    elif harm == "truncated":
        del content[len(content) // 2 :]
    path.write_bytes(content)
    if harm == "of another OpenVINO":  # whole, and not what this one reads
        other = path.with_name("other")
        other.write_bytes(b" " * 4096 + b"something else")
        with other.open("rb") as stream:
            nonsense = MappedFile(stream, 4096)
        monkeypatch.setattr(openvino_backend, "load_compiled", lambda key: nonsense)
    with caplog.at_level(logging.WARNING):
        found = OpenVinoBackend(shapes, threads=1).image_features(images(1))
    np.testing.assert_allclose(found.grounded, backend.image_features(images(1)).grounded, atol=1e-6)
    assert "compiled anew" in caplog.text
    monkeypatch.undo()


def test_an_imported_model_holds_no_pages_of_its_file(shapes: Bundle) -> None:
    OpenVinoBackend(shapes, threads=1).prepare((128, 128))
    backend = OpenVinoBackend(shapes, threads=1)
    backend.prepare((128, 128))
    smaps = Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines()
    starts = [i for i, line in enumerate(smaps) if line.endswith(".blob")]
    resident_kb = [next(int(line.split()[1]) for line in smaps[i:] if line.startswith("Rss:")) for i in starts]
    assert len(resident_kb) >= 2
    assert max(resident_kb) < 512
    assert np.isfinite(backend.image_features(images(1)).grounded).all()


def test_nothing_is_kept_where_that_is_not_wanted(shapes: Bundle) -> None:
    OpenVinoBackend(shapes, threads=1, keep_compiled=False).image_features(images(1))
    assert blobs() == []


def test_a_bundle_without_kp(write_tiny_bundle: Callable[..., Path], tmp_path: Path, tiny: ModuleType) -> None:
    bundle = open_bundle(write_tiny_bundle(tmp_path / "b", kp_w=0.0, more_sizes=[(32, 96)]))
    backend = OpenVinoBackend(bundle, threads=1)
    red = np.zeros((1, 32, 96, 3), np.uint8)
    red[..., 0] = 255
    features = backend.image_features(red)
    assert features.kp is None
    assert features.grounded.shape == (1, tiny.WIDTH, 8, 24)
    text = np.eye(tiny.WIDTH, dtype=np.float32)[:1]
    assert (backend.masks(features, text, 0.0) > 0.9).all()
    with pytest.raises(InputError, match=r"tiny has no KP branch, but kp_w is 0\.3"):
        backend.masks(features, text, 0.3)
    with pytest.raises(InputError, match=r"images are 96x32, tiny has image graphs for 64x64, 32x96"):
        backend.image_features(np.zeros((1, 96, 32, 3), np.uint8))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: b.image_features(np.zeros((128, 128, 3), np.uint8)), r"images should be uint8 \(B, H, W, 3\)"),
        (lambda b: b.image_features(np.zeros((0, 128, 128, 3), np.uint8)), r"found uint8 \(0, 128, 128, 3\)"),
        (lambda b: b.image_features(np.zeros((1, 128, 128, 3), np.float32)), "found float32"),
        (lambda b: b.encode_text(np.zeros((1, 33), np.int64)), "33 long, tcl-shapes reads at most 32"),
        (lambda b: b.encode_text(np.zeros((1, 5), np.int32)), r"token ids should be int64"),
        (lambda b: b.encode_text(np.full((1, 5), -1)), r"token ids are -1 to -1, tcl-shapes knows 0 to"),
        (lambda b: b.encode_text(np.full((1, 5), 10**6)), r"token ids are 1000000 to 1000000"),
        (lambda b: b.masks(b.image_features(images(1)), texts(1)[:0], 0.3), r"text embeddings should be float32"),
        (lambda b: b.masks(b.image_features(images(1)), texts(1), 1.5), r"kp_w should be in \[0, 1\]"),
        (
            lambda b: b.masks(HostFeatures(grounded=b.image_features(images(1)).grounded, kp=None), texts(1), 0.3),
            "KP features should be a numpy array",
        ),
        (lambda b: b.prepare((64, 64)), "images are 64x64, tcl-shapes has image graphs for 128x128"),
    ],
)
def test_what_does_not_fit_is_refused(
    backend: OpenVinoBackend, call: Callable[[OpenVinoBackend], Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        call(backend)


def test_features_of_another_grid_than_the_kps_are_refused(backend: OpenVinoBackend) -> None:
    features = backend.image_features(images(1))
    assert features.kp is not None
    odd = HostFeatures(grounded=features.grounded, kp=features.kp[:, :, :3, :5].copy())
    with pytest.raises(
        InputError, match=r"KP features should be float32 \(1, 128, 16, 16\), found float32 \(1, 128, 3, 5\)"
    ):
        backend.masks(odd, texts(1), 0.3)


def test_a_graph_that_is_none_never_reaches_openvino(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "image.onnx").write_bytes(b"not onnx")
    backend = OpenVinoBackend(open_bundle(folder, verify=False), threads=1)
    with pytest.raises(BundleError, match=r"image\.onnx is no ONNX file\. Fetch or export the bundle again"):
        backend.image_features(images(1))
    assert capfd.readouterr() == ("", "")


def test_a_graph_that_cannot_be_compiled(folder: Path) -> None:
    (folder / "image.onnx").write_bytes((folder / "image.onnx").read_bytes()[:2000])
    backend = OpenVinoBackend(open_bundle(folder, verify=False), threads=1)
    with pytest.raises(BackendError, match=r"OpenVINO .* cannot compile .*image\.onnx: .*pip install -U") as caught:
        backend.image_features(images(1))
    assert "\n" not in str(caught.value)


def test_a_graph_with_another_interface(folder: Path) -> None:
    model = onnx.load(folder / "image.onnx")
    model.graph.output.pop()
    onnx.save(model, folder / "image.onnx")
    backend = OpenVinoBackend(open_bundle(folder, verify=False), threads=1)
    with pytest.raises(BundleError, match=r"should have the outputs grounded, kp, found \w+\. Export"):
        backend.image_features(images(1))


@pytest.mark.parametrize("threads", [0, -1])
def test_threads_are_positive(shapes: Bundle, threads: int) -> None:
    with pytest.raises(InputError, match="1 or more"):
        OpenVinoBackend(shapes, threads=threads)


def in_a_new_process(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_nothing_is_reported_to_anybody() -> None:
    """The module that would send is neither loaded nor left out of sight for others."""
    code = (
        "import sys; from tclkit.runtime.openvino_backend import import_openvino; import_openvino()\n"
        "print([name for name in sys.modules if name.startswith('openvino_telemetry')])\n"
        "print('openvino.tools.ovc.telemetry_stub' in sys.modules)"
    )
    assert in_a_new_process(code).splitlines() == ["[]", "True"]


def test_a_missing_openvino_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(BackendError, match=r'openvino cannot be imported .*pip install "\.\[openvino\]"'):
        openvino_backend.import_openvino()


def test_a_signal_finds_the_process_alive_when_backends_are_gone() -> None:
    """OpenVINO's cores leave a dead stack for signals behind when they go in the order in which they came."""
    program = """
import os, signal
from tclkit.runtime.bundle import open_bundle
from tclkit.runtime.openvino_backend import open_openvino
signal.signal(signal.SIGTERM, lambda *_: print("alive"))
backends = [open_openvino(open_bundle("tcl-shapes")) for _ in range(2)]
while backends:
    backends.pop(0).close()
os.kill(os.getpid(), signal.SIGTERM)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


def renamed(folder: Path) -> bytes:
    """The tiny bundle's image graph that takes each colour of the palette for the next one."""
    model = onnx.load(folder / "image.onnx")
    for tensor in model.graph.initializer:
        if tensor.name in ("weight", "bias"):
            values = np.roll(onnx.numpy_helper.to_array(tensor), 1, axis=0)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    return model.SerializeToString()


@pytest.mark.parametrize("outdated", [False, True])
def test_a_graph_for_processors_is_run_here_and_nowhere_else(
    outdated: bool,
    write_tiny_bundle: Callable[..., Path],
    add_processor_graph: Callable[..., str],
    tmp_path: Path,
    tiny: ModuleType,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = write_tiny_bundle(tmp_path / "tiny")
    source = "ab" * 32 if outdated else None
    add_processor_graph(folder, graph=renamed(folder), source_sha256=source)
    bundle = open_bundle(folder)
    red = np.full((1, 64, 64, 3), tiny.PALETTE["red"], np.uint8)
    names = list(tiny.PALETTE)
    found = OpenVinoBackend(bundle, keep_compiled=False).image_features(red).grounded[0, :, 0, 0].argmax()
    common = OnnxRuntimeBackend(bundle).image_features(red).grounded[0, :, 0, 0].argmax()
    assert names[common] == "red"
    assert names[found] == ("red" if outdated else "green")
    assert ("image.cpu.onnx was made from another float32 graph" in caplog.text) == outdated
