import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tclkit.export.wrapper import ImageGraph, MasksGraph, TextGraph
from tclkit.runtime import Bundle, open_bundle
from tclkit.runtime.backends import HostFeatures
from tclkit.runtime.errors import CheckpointError, InputError
from tclkit.runtime.files import sha256_from_file
from tclkit.runtime.manifest import ImageEntry
from tclkit.tcl import TCL, TorchBackend, open_torch_backend, save_checkpoint, torch_contender
from tclkit.tcl.torch_backend import open_random_torch_backend, random_torch_contender

TOKEN_IDS = np.array([[1, 2, 3, 4], [4, 3, 2, 1], [9, 8, 7, 6]], np.int64)
Exported = tuple[Path, Bundle]


@pytest.fixture
def small_model(make_tiny_tcl: Callable[..., TCL]) -> TCL:
    return make_tiny_tcl()


@pytest.fixture
def plain(tmp_path: Path, tiny_bundle_folder: Path, small_model: TCL) -> Exported:
    """A checkpoint, and a bundle whose bundle.json names it; its graphs are not run here."""
    checkpoint = tmp_path / "tcl.pt"
    save_checkpoint(checkpoint, small_model)
    return checkpoint, described(tiny_bundle_folder, checkpoint)


def described(folder: Path, checkpoint: Path, *, kp_w: float = 0.3, **provenance: str) -> Bundle:
    manifest = open_bundle(folder).manifest
    sizes = [ImageEntry(height=32, width=width, files={"fp32": "image.onnx"}) for width in (32, 64)]
    changed = replace(
        manifest,
        model=replace(manifest.model, embed_dim=16, context_length=12, mask_scale=2),
        images=tuple(sizes),
        kp_w=kp_w,
        provenance={"checkpoint_sha256": sha256_from_file(checkpoint), **provenance},
    )
    return Bundle(folder=folder, manifest=changed)


def images(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)


def texts(backend: TorchBackend) -> NDArray[np.float32]:
    raw = backend.encode_text(TOKEN_IDS)
    embeddings = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    embeddings.flags.writeable = False  # as those of a prompt bank may be
    return embeddings


@pytest.mark.parametrize(("kp_w", "attention"), [(0.3, "self"), (0.3, "neighbours"), (0.0, "self")])
def test_it_gives_what_the_graphs_give(
    tiny_bundle_folder: Path, tmp_path: Path, small_model: TCL, kp_w: float, attention: str
) -> None:
    """Held against the modules that are traced into the graphs, which the export holds against the graphs."""
    checkpoint = tmp_path / "tcl.pt"
    model = small_model
    save_checkpoint(checkpoint, model)
    model.use_kp_attention(attention)
    provenance = {} if attention == "self" else {"kp_attention": attention}
    bundle = described(tiny_bundle_folder, checkpoint, kp_w=kp_w, **provenance)
    backend = open_torch_backend(bundle, checkpoint=checkpoint)
    np.testing.assert_allclose(
        backend.encode_text(TOKEN_IDS), TextGraph(model.clip)(torch.tensor(TOKEN_IDS)), rtol=0, atol=1e-5
    )
    text = texts(backend)
    head = MasksGraph(model, with_kp=kp_w > 0)
    for shape in ((1, 32, 32), (3, 32, 64)):
        found = backend.image_features(images(*shape))
        expected = ImageGraph(model, shape[1:], with_kp=kp_w > 0)(torch.tensor(images(*shape)))
        features = [found.grounded] if found.kp is None else [found.grounded, found.kp]
        assert len(features) == len(expected)
        for one, other in zip(features, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
            assert one.dtype == np.float32
        rest = () if found.kp is None else (expected[1], torch.tensor(kp_w))
        masks = backend.masks(found, text, kp_w)
        np.testing.assert_allclose(masks, head(expected[0], torch.tensor(text), *rest), rtol=0, atol=1e-5)
        assert masks.shape == (shape[0], 3, shape[1] // 8, shape[2] // 8)
    backend.close()


def test_wrong_inputs(plain: Exported) -> None:
    checkpoint, bundle = plain
    backend = open_torch_backend(bundle, checkpoint=checkpoint)
    assert (backend.name, backend.precision) == ("torch", "fp32")
    assert "torch" in backend.reason
    with pytest.raises(InputError, match="images are 16x32, tiny has image graphs for 32x32, 32x64"):
        backend.image_features(images(1, 16, 32))
    with pytest.raises(InputError, match="images should be uint8"):
        backend.image_features(images(1, 32, 32).astype(np.float32))  # type: ignore[arg-type]
    features = backend.image_features(images(1, 32, 32))
    with pytest.raises(InputError, match=r"text embeddings should be float32 \(N, 16\)"):
        backend.masks(features, np.zeros((2, 8), np.float32), 0.0)
    with pytest.raises(InputError, match=r"kp_w should be in \[0, 1\], found 2"):
        backend.masks(features, texts(backend), 2.0)
    with pytest.raises(InputError, match="KP features should be a numpy array"):
        backend.masks(HostFeatures(grounded=features.grounded, kp=None), texts(backend), 0.5)
    with pytest.raises(InputError, match=r"token ids should be int64 \(M, L\)"):
        backend.encode_text(np.zeros(3, np.int64))
    with pytest.raises(InputError, match="threads should be 1 or more, found 0"):
        open_torch_backend(bundle, 0, checkpoint=checkpoint)


def test_threads(plain: Exported) -> None:
    checkpoint, bundle = plain
    before = torch.get_num_threads()
    try:
        open_torch_backend(bundle, 2, checkpoint=checkpoint)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_another_checkpoint_is_refused(plain: Exported, tmp_path: Path) -> None:
    checkpoint, bundle = plain
    other = tmp_path / "other.pt"
    content = bytearray(checkpoint.read_bytes())
    content[-1] ^= 1
    other.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tiny was not exported from .*other\.pt: expected SHA-256 \w+, found"):
        open_torch_backend(bundle, checkpoint=other)
    with pytest.raises(CheckpointError, match=r"there is no file .*none\.pt"):
        torch_contender(tmp_path / "none.pt")


def test_a_clip_file_is_held_against_the_bundles(plain: Exported, tmp_path: Path) -> None:
    checkpoint, bundle = plain
    clip = tmp_path / "clip.pt"
    clip.write_bytes(b"another")
    provenance = {**bundle.manifest.provenance, "clip_sha256": "0" * 64}
    named = Bundle(folder=bundle.folder, manifest=replace(bundle.manifest, provenance=provenance))
    with pytest.raises(CheckpointError, match=rf"was not exported from .*clip\.pt: expected SHA-256 {'0' * 64}"):
        open_torch_backend(named, checkpoint=checkpoint, clip=clip)
    assert torch_contender(checkpoint, clip=clip).identity != torch_contender(checkpoint).identity
    assert torch_contender(checkpoint, clip="ViT-B-16").identity.endswith(" ViT-B-16")


def test_a_contender_travels_to_worker_processes(plain: Exported) -> None:
    checkpoint, bundle = plain
    contender = pickle.loads(pickle.dumps(torch_contender(os.fspath(checkpoint))))
    assert contender.name == "torch"
    assert contender.open(bundle, None).name == "torch"


def test_random_weights_need_no_checkpoint(plain: Exported, small_model: TCL) -> None:
    """The model has the sizes of the one that was exported, and runs."""
    model, bundle = small_model, plain[1]
    configs = {"configs": {"model": model.config.to_dict()}}
    bundle = replace(bundle, manifest=replace(bundle.manifest, provenance=configs))
    opener = pickle.loads(pickle.dumps(random_torch_contender())).open  # benchmarks send it to processes
    backend = opener(bundle, threads=None)
    assert (backend.name, backend.precision) == ("torch", "fp32")
    features = backend.image_features(np.zeros((2, 32, 64, 3), np.uint8))
    assert features.grounded.shape == (2, 16, 4, 8)
    text = backend.encode_text(TOKEN_IDS)
    assert backend.masks(features, text, 0.3).shape == (2, 3, 4, 8)


@pytest.mark.parametrize(
    "provenance",
    [{}, {"configs": {}}, {"configs": {"model": {"clip": {"width": 1}}}}, {"configs": {"model": 3}}],
    ids=str,
)
def test_random_weights_need_the_sizes(plain: Exported, provenance: dict[str, object]) -> None:
    bundle = replace(plain[1], manifest=replace(plain[1].manifest, provenance=provenance))
    with pytest.raises(CheckpointError, match=r"does not say what model it was exported from: .* tclkit export"):
        open_random_torch_backend(bundle)
