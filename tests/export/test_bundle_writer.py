"""Bundles as they are written: complete, true to the checkpoint, and whole or not there."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from tclkit.export import _parity, bundle_folder, bundle_writer, export_bundle
from tclkit.export.decoder import DecoderForm
from tclkit.export.layers import quantizable_layers
from tclkit.runtime import open_bundle
from tclkit.runtime.errors import CheckpointError, ConfigError, ExportError, InputError, ParityError
from tclkit.runtime.files import sha256_from_file
from tclkit.runtime.onnxruntime_backend import OnnxRuntimeBackend
from tclkit.runtime.prompts import PROTOCOL_TEMPLATES
from tclkit.runtime.tokenizer import Tokenizer
from tclkit.tcl import TCL, load_model, save_checkpoint
from tclkit.tcl.batches import images_to_tensor
from tclkit.tcl.model import normalize


@pytest.fixture(scope="module")
def own_bundle(
    make_model: Callable[..., TCL], tiny_tokenizer_json: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The bundle of a checkpoint of ours that says everything of itself, stored in half; for reading only."""
    folder = tmp_path_factory.mktemp("own")
    extra = {
        "name": "tiny-shapes",
        "description": "knows circles",
        "tokenizer_json": tiny_tokenizer_json,
        "templates": ["a {}.", "a photo of a {}."],
        "image_size": 48,
        "vocabulary": {"note": "knows circles only", "words": ["circle", "red"]},
        "thresholds": {"background": 0.45},
        "train_config": {"seed": 7},
    }
    save_checkpoint(folder / "tcl.pt", make_model(), extra=extra)
    return export_bundle(folder / "tcl.pt", folder / "bundle", half_weights=True)


@pytest.fixture
def quick_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for the graphs, for tests of what happens around them; nothing is compared."""

    def write(graph: Any, *arguments: Any, **options: Any) -> None:
        next(argument for argument in arguments if isinstance(argument, Path)).write_bytes(b"graph")

    for name in ("write_image_graph", "write_masks_graph", "write_text_graph"):
        monkeypatch.setattr(bundle_writer, name, write)
    monkeypatch.setattr(bundle_writer, "check_bundle", lambda *arguments, **options: {})


def siblings(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir())


def test_the_runtime_opens_it_and_gives_the_models_masks(golden_bundle: Path, golden_model: TCL) -> None:
    bundle = open_bundle(golden_bundle)
    backend = OnnxRuntimeBackend(bundle, threads=1)
    token_ids = Tokenizer.from_bundle(bundle).encode(["a photo of a dog.", "a photo of the very green grass."])
    text = backend.encode_text(token_ids)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    images = np.random.default_rng(1).integers(0, 256, (1, 96, 80, 3), dtype=np.uint8)
    masks = backend.masks(backend.image_features(images), text, 0.3)
    with torch.no_grad():
        expected = golden_model.generate_masks(
            images_to_tensor(images), normalize(golden_model.encode_text(torch.from_numpy(token_ids)), -1)
        )
    resized = torch.nn.functional.interpolate(torch.from_numpy(masks), size=(96, 80), mode="bilinear")
    assert float((resized - expected).abs().max()) < 2e-5


def test_what_the_authors_checkpoint_does_not_say_is_clips_and_the_papers(golden_bundle: Path, golden: Path) -> None:
    manifest = open_bundle(golden_bundle).manifest
    assert manifest.name == "golden"
    assert manifest.templates == PROTOCOL_TEMPLATES
    assert (manifest.thresholds.background, manifest.thresholds.background_pamr) == (0.5, 0.4)
    assert manifest.kp_w == 0.3
    assert manifest.vocabulary is None
    assert [(image.height, image.width) for image in manifest.images] == [(64, 64), (96, 80)]
    assert [image.files["fp32"] for image in manifest.images] == ["image.onnx", "image-96x80.onnx"]
    assert manifest.model.architecture == "custom"
    assert (manifest.model.patch_size, manifest.model.mask_scale, manifest.model.vocab_size) == (16, 4, 1024)
    provenance = manifest.provenance
    assert provenance["checkpoint_sha256"] == sha256_from_file(golden / "official_learned.pth")
    assert provenance["clip_sha256"] == sha256_from_file(golden / "clip_tiny.pt")
    assert provenance["versions"]["torch"] == torch.__version__.split("+")[0]


def test_every_graph_was_compared_with_torch(golden_bundle: Path) -> None:
    checks = open_bundle(golden_bundle).manifest.checks["fp32"]
    assert sorted(checks) == ["image-96x80.onnx", "image.onnx", "masks.onnx", "text.onnx"]
    for check in checks.values():
        assert 0 < check["max_abs_error"] <= check["tolerance"] <= 2e-5 * max(1, check["largest_value"])


def test_what_our_checkpoint_says_is_taken(own_bundle: Path) -> None:
    bundle = open_bundle(own_bundle)
    manifest = bundle.manifest
    assert (manifest.name, manifest.description) == ("tiny-shapes", "knows circles")
    assert manifest.templates == ("a {}.", "a photo of a {}.")
    assert (manifest.thresholds.background, manifest.thresholds.background_pamr) == (0.45, 0.4)
    assert [(image.height, image.width) for image in manifest.images] == [(48, 48)]
    assert manifest.vocabulary is not None
    assert manifest.vocabulary.words == ("circle", "red")
    assert manifest.provenance["configs"]["train"] == {"seed": 7}
    assert Tokenizer.from_bundle(bundle).vocab_size == manifest.model.vocab_size


def test_half_stored_weights_are_noted_and_checked_by_their_own_tolerance(own_bundle: Path) -> None:
    manifest = open_bundle(own_bundle).manifest
    assert manifest.provenance["half_weights"] is True
    assert manifest.checks["fp32"]["image.onnx"]["max_abs_error"] > 2e-5
    assert manifest.checks["fp32"]["image.onnx"]["tolerance"] == 5e-3


def test_a_full_checkpoint_of_the_authors_needs_no_clip(
    golden: Path, golden_tokenizer_json: str, quick_graphs: None, tmp_path: Path
) -> None:
    learned = torch.load(golden / "official_learned.pth", weights_only=True)["model"]
    full = dict(learned)
    for name, tensor in torch.load(golden / "clip_tiny.pt", weights_only=True).items():
        if name in ("visual.proj", "visual.ln_post.weight", "visual.ln_post.bias"):
            full[f"clip_image_encoder.clip_proj.{name.removeprefix('visual.').replace('ln_post', 'ln')}"] = tensor
        elif name.startswith("visual."):
            full[f"clip_image_encoder.clip_visual.{name.removeprefix('visual.')}"] = tensor
        elif tensor.ndim and name != "logit_scale":
            full[f"clip_text_encoder.{name}"] = tensor
    torch.save({"model": full, "config": {"evaluate": {"kp_w": 0.2}}, "step": 5}, tmp_path / "full.pth")
    out = export_bundle(tmp_path / "full.pth", tmp_path / "b", sizes=[(64, 64)], tokenizer_json=golden_tokenizer_json)
    manifest = open_bundle(out).manifest
    assert manifest.kp_w == 0.2
    assert manifest.provenance["checkpoint_format"] == "official"
    assert manifest.provenance["configs"]["official"] == {"evaluate": {"kp_w": 0.2}}


def test_without_kp_the_graphs_have_no_such_branch(tiny_checkpoint: Path, tmp_path: Path) -> None:
    bundle = open_bundle(export_bundle(tiny_checkpoint, tmp_path / "b", sizes=[(32, 64)], kp_w=0))
    assert not bundle.manifest.has_kp
    features = OnnxRuntimeBackend(bundle, threads=1).image_features(np.zeros((1, 32, 64, 3), np.uint8))
    assert features.kp is None
    assert features.grounded.shape == (1, 24, 8, 16)


def test_another_kp_attention_is_exported_checked_and_noted(tiny_checkpoint: Path, tmp_path: Path) -> None:
    plain, other = (
        open_bundle(export_bundle(tiny_checkpoint, tmp_path / way, sizes=[(32, 64)], kp_attention=way))
        for way in ("self", "neighbours")
    )
    assert "kp_attention" not in plain.manifest.provenance
    assert other.manifest.provenance["kp_attention"] == "neighbours"
    assert other.manifest.checks["fp32"]["image.onnx"]["max_abs_error"] < 2e-5
    image = np.random.default_rng(0).integers(0, 256, (1, 32, 64, 3), np.uint8)
    before, after = (OnnxRuntimeBackend(bundle, threads=1).image_features(image) for bundle in (plain, other))
    np.testing.assert_allclose(before.grounded, after.grounded, rtol=0, atol=1e-6)
    assert np.abs(np.asarray(before.kp) - np.asarray(after.kp)).max() > 0.05
    with pytest.raises(ConfigError, match="unknown KP attention 'far'"):
        export_bundle(tiny_checkpoint, tmp_path / "far", kp_attention="far")


@pytest.mark.parametrize("form", ["direct", "winograd4"])  # test_decoder_graph.py proves each form by itself
def test_a_form_of_the_decoder_is_exported_checked_and_noted(
    form: DecoderForm, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    bundle = open_bundle(export_bundle(tiny_checkpoint, tmp_path / "b", sizes=[(48, 80)], decoder=form))
    assert bundle.manifest.provenance["decoder"] == form
    assert bundle.manifest.checks["fp32"]["image.onnx"]["max_abs_error"] < 2e-5
    layers = quantizable_layers(onnx.load(bundle.path("image.onnx")))
    decoder = {layer.block for layer in layers if layer.is_decoder}
    assert decoder == {"grounder.decoder.0", "grounder.decoder.1"}  # by name, as the quantiser's tiers know them
    assert all(layer.block != layer.node and layer.multiplications > 0 for layer in layers if layer.is_decoder)


def test_an_unknown_form_of_the_decoder_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown form of the decoder 'quick'; choose direct"):
        export_bundle(tiny_checkpoint, tmp_path / "b", decoder="quick")  # type: ignore[arg-type]
    assert siblings(tmp_path / "b") == ["tcl.pt"]


def test_progress_counts_up_to_done(tiny_checkpoint: Path, quick_graphs: None, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    export_bundle(
        tiny_checkpoint, tmp_path / "b", sizes=[(32, 32), (64, 64), (32, 32)], progress=lambda *at: seen.append(at)
    )
    assert [what for what, _, _ in seen] == [
        "reading the checkpoint",
        "image graph 32x32",
        "image graph 64x64",
        "masks graph",
        "text graph",
        "comparing the graphs with torch",
        "writing bundle.json",
        "done",
    ]
    assert [done for _, done, _ in seen] == list(range(8))
    assert seen[-1][1:] == (7, 7)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([(60, 64)], r"60x64 is no multiple of the model's patch, 16; the nearest is 64x64"),
        ([(0, 64)], r"0x64 is no multiple.*16x64"),
        ([(-16, 64)], r"-16x64 is no multiple"),
        ([], r"no image size"),
    ],
)
def test_sizes_that_do_not_fit_the_patch_are_refused(
    tiny_checkpoint: Path, tmp_path: Path, sizes: list[tuple[int, int]], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        export_bundle(tiny_checkpoint, tmp_path / "b", sizes=sizes)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("kp_w", [-0.1, 1.5, float("nan")])
def test_kp_w_outside_0_to_1_is_refused(tiny_checkpoint: Path, tmp_path: Path, kp_w: float) -> None:
    with pytest.raises(InputError, match=r"kp_w should be in 0\.\.1"):
        export_bundle(tiny_checkpoint, tmp_path / "b", kp_w=kp_w)


@pytest.mark.parametrize("name", ["", " ", "a/b"])
def test_names_that_no_folder_could_have_are_refused(tiny_checkpoint: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="is no name for a bundle"):
        export_bundle(tiny_checkpoint, tmp_path / "b", name=name)


def test_a_tokenizer_of_another_size_is_refused(golden: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"knows 49408 tokens, but the model's text encoder has 1024.*tokenizer_json"):
        export_bundle(golden / "official_learned.pth", tmp_path / "b", clip=golden / "clip_tiny.pt")


def test_a_missing_checkpoint_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no file"):
        export_bundle(tmp_path / "none.pt", tmp_path / "b")
    assert siblings(tmp_path / "b") == []


def test_a_folder_of_other_things_is_not_replaced(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "documents"
    out.mkdir()
    (out / "novel.txt").write_text("chapter one")
    with pytest.raises(ExportError, match="holds other files"):
        export_bundle(tiny_checkpoint, out)
    assert (out / "novel.txt").read_text() == "chapter one"


def test_a_file_is_not_replaced(tiny_checkpoint: Path) -> None:
    with pytest.raises(ExportError, match="is a file; a bundle is a folder"):
        export_bundle(tiny_checkpoint, tiny_checkpoint)


def test_an_older_bundle_and_an_empty_folder_are_replaced(
    tiny_checkpoint: Path, quick_graphs: None, tmp_path: Path
) -> None:
    out = tmp_path / "b"
    out.mkdir()
    export_bundle(tiny_checkpoint, out, name="first")
    (out / "leftover.txt").write_text("of the first")
    export_bundle(tiny_checkpoint, out, name="second")
    assert open_bundle(out).manifest.name == "second"
    assert not (out / "leftover.txt").exists()
    assert siblings(out) == ["b", "tcl.pt"]


def test_a_link_keeps_pointing_to_the_bundle(tiny_checkpoint: Path, quick_graphs: None, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    export_bundle(tiny_checkpoint, tmp_path / "link")
    export_bundle(tiny_checkpoint, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert open_bundle(tmp_path / "real").manifest.name == "tiny-shapes"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ParityError("x"), RuntimeError("x")])
def test_a_failure_leaves_the_older_bundle_as_it_was(
    tiny_checkpoint: Path, quick_graphs: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    out = export_bundle(tiny_checkpoint, tmp_path / "b", name="first")

    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(bundle_writer, "check_bundle", fail)
    with pytest.raises(type(error)):
        export_bundle(tiny_checkpoint, out, name="second")
    assert open_bundle(out).manifest.name == "first"
    assert siblings(out) == ["b", "tcl.pt"]


def test_a_full_disk_is_one_clear_error(
    tiny_checkpoint: Path, quick_graphs: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(bundle_writer, "write_text_graph", fail)
    with pytest.raises(ExportError, match=r"cannot write .*b: No space left on device\. Free some space"):
        export_bundle(tiny_checkpoint, tmp_path / "b")
    assert siblings(tmp_path / "b") == ["tcl.pt"]


def test_a_graph_that_differs_is_refused(own_bundle: Path) -> None:
    model = load_model(own_bundle.parent / "tcl.pt")
    with torch.no_grad():
        model.grounder.projection.proj.mul_(torch.linspace(0.5, 2, 24))
    with pytest.raises(ParityError, match=r"image\.onnx differs from torch by .*, allowed is 5\.0e-03") as caught:
        _parity.check_bundle(open_bundle(own_bundle), model, stored="float16")
    assert caught.value.values["found"] > caught.value.values["expected"]


def test_leftovers_of_killed_runs_are_removed_and_running_ones_kept(
    tiny_checkpoint: Path, quick_graphs: None, tmp_path: Path
) -> None:
    out = tmp_path / "b"
    dead, alive, other = (tmp_path / f".{name}.tmp" for name in ("b.1-aaaa", "b.2-bbbb", "c.3-cccc"))
    for folder in (dead, alive, other):
        folder.mkdir()
        (folder / "image.onnx").write_bytes(b"half")
    with bundle_folder._locked(alive):
        export_bundle(tiny_checkpoint, out)
    assert siblings(out) == [".b.2-bbbb.tmp", ".c.3-cccc.tmp", "b", "tcl.pt"]


def test_one_writer_at_a_time_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    out = tmp_path / "b"
    with bundle_folder.new_folder(out) as first:
        (first / "bundle.json").write_text("first")
        with (
            pytest.raises(ExportError, match=r"b is being written by another tclkit just now"),
            bundle_folder.new_folder(out),
        ):
            pytest.fail("two at once")
        assert siblings(out) == sorted([".b.lock", first.name])
    assert (out / "bundle.json").read_text() == "first"
    assert siblings(out) == ["b"]  # the lock is gone
    with pytest.raises(ZeroDivisionError), bundle_folder.new_folder(out):
        raise ZeroDivisionError
    assert siblings(out) == ["b"]


def test_a_lock_file_of_a_killed_writer_locks_nothing(tmp_path: Path) -> None:
    (tmp_path / ".b.lock").touch()
    with bundle_folder.new_folder(tmp_path / "b") as folder:
        (folder / "bundle.json").write_text("new")
    assert siblings(tmp_path / "b") == ["b"]


def test_a_lock_whose_file_is_removed_while_it_is_waited_for_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, opened = tmp_path / ".b.lock", []
    real_open = os.open

    def open_and_lose(path: Any, *arguments: Any) -> int:
        handle = real_open(path, *arguments)
        opened.append(path)
        if len(opened) == 1:
            lock.unlink()  # as its holder does when it has finished
        return handle

    monkeypatch.setattr(bundle_folder.os, "open", open_and_lose)
    with bundle_folder._locked_file(lock):
        assert opened == [lock, lock]
        with pytest.raises(BlockingIOError), bundle_folder._locked_file(lock):
            pytest.fail("two at once")


@pytest.mark.parametrize("file", ["thesis.tex", "bundle.json"])
def test_what_appears_in_the_target_meanwhile_is_not_replaced(tmp_path: Path, file: str) -> None:
    out = tmp_path / "b"

    def write() -> None:
        with bundle_folder.new_folder(out) as folder:
            (folder / "bundle.json").write_text("new")
            out.mkdir()
            (out / file).write_text("years of work")

    with pytest.raises(ExportError, match=r"holds other files|was written by something else meanwhile"):
        write()
    assert (out / file).read_text() == "years of work"
    assert siblings(out) == ["b"]


def test_an_older_bundle_that_a_killed_run_moved_aside_is_not_lost(
    tiny_checkpoint: Path, quick_graphs: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = export_bundle(tiny_checkpoint, tmp_path / "b")
    out.rename(tmp_path / ".b.old")
    monkeypatch.setattr(bundle_writer, "check_bundle", lambda *a, **o: (_ for _ in ()).throw(ParityError("x")))
    with pytest.raises(ParityError):
        export_bundle(tiny_checkpoint, out)
    assert (out / "bundle.json").exists()


def test_a_killed_export_leaves_nothing_and_the_next_goes_on(
    tiny_checkpoint: Path, quick_graphs: None, tmp_path: Path
) -> None:
    out = tmp_path / "b"
    code = f"from tclkit.export import export_bundle; export_bundle({str(tiny_checkpoint)!r}, {str(out)!r})"
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 900
    while not list(tmp_path.glob(".b.*.tmp/image.onnx")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    assert len(list(tmp_path.glob(".b.*.tmp"))) == 1
    export_bundle(tiny_checkpoint, out)
    assert siblings(out) == ["b", "tcl.pt"]


def test_bundles_can_be_moved(golden_bundle: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(golden_bundle, tmp_path / "elsewhere"))
    assert open_bundle(moved).manifest.name == "golden"
    assert str(golden_bundle) not in json.dumps(json.loads((moved / "bundle.json").read_text()))
