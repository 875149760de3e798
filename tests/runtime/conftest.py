"""Fixtures of the TensorRT backend's tests: a bundle that may be changed, and engines built for a simulated machine."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tclkit.runtime.bundle import Bundle, find_bundle, open_bundle
from tclkit.runtime.engines import EngineRecord, current_device, write_engine

Profile = dict[str, list[Sequence[int]]]


@pytest.fixture
def shapes_folder(tmp_path: Path) -> Path:
    """A copy of the shipped bundle tcl-shapes (128x128 images, patches of 8, D = 128)."""
    return Path(shutil.copytree(find_bundle("tcl-shapes"), tmp_path / "tcl-shapes"))


@pytest.fixture
def build_engines() -> Callable[..., Bundle]:
    """build_engines(simulator, folder, max_batch=4, max_prompts=32, precision="fp32"): build with TensorRT's own API.

    The image and the masks engine of every size, as `tclkit build-engine` makes them; returns the bundle.
    """
    return _build_engines


def _build_engines(
    simulator: Any,
    folder: Path,
    *,
    max_batch: int = 4,
    max_prompts: int = 32,
    precision: str = "fp32",
    flags: tuple[str, ...] = (),
) -> Bundle:
    bundle = open_bundle(folder)
    manifest, device = bundle.manifest, current_device()
    for image in manifest.images:
        image_profile, masks_profile = _profiles(bundle, (image.height, image.width), max_batch, max_prompts)
        graphs = {"image": (image.files[precision], image_profile), "masks": (manifest.masks, masks_profile)}
        for graph, (file, profile) in graphs.items():
            record = EngineRecord(
                graph=graph,
                precision=precision if graph == "image" else "fp32",
                height=image.height,
                width=image.width,
                graph_sha256=manifest.files[file].sha256,
                tensorrt_version=device.tensorrt_version,
                compute_capability=device.compute_capability,
                device_name=device.device_name,
                system=device.system,
                max_batch=max_batch,
                max_prompts=max_prompts,
                flags=flags,
            )
            write_engine(folder, record, _built(simulator, bundle.path(file).read_bytes(), profile, flags))
    return bundle


def _profiles(bundle: Bundle, size: tuple[int, int], max_batch: int, max_prompts: int) -> tuple[Profile, Profile]:
    model = bundle.manifest.model
    width, scale = model.embed_dim, model.mask_scale
    grid = [side // model.patch_size for side in size]

    def batched(*shape: int) -> list[Sequence[int]]:
        return [(1, *shape), (1, *shape), (max_batch, *shape)]

    masks: Profile = {
        "grounded": batched(width, *(side * scale for side in grid)),
        "text": [(1, width), (1, width), (max_prompts, width)],
    }
    if bundle.manifest.has_kp:
        masks |= {"kp": batched(width, *grid), "kp_w": [(), (), ()]}
    return {"image": batched(*size, 3)}, masks


def _built(simulator: Any, onnx_bytes: bytes, profile: Profile, flags: tuple[str, ...]) -> bytes:
    tensorrt = simulator.tensorrt
    logger = tensorrt.Logger(tensorrt.Logger.ERROR)
    builder = tensorrt.Builder(logger)
    strongly_typed = 1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if simulator.major < 11 else 0
    network = builder.create_network(strongly_typed)
    parser = tensorrt.OnnxParser(network, logger)
    assert parser.parse(onnx_bytes), simulator.errors()
    config = builder.create_builder_config()
    if "version-compatible" in flags:
        config.set_flag(tensorrt.BuilderFlag.VERSION_COMPATIBLE)
    if "hardware-compatible" in flags:
        config.hardware_compatibility_level = tensorrt.HardwareCompatibilityLevel.AMPERE_PLUS
    shapes = builder.create_optimization_profile()
    for name, (smallest, usual, largest) in profile.items():
        shapes.set_shape(name, smallest, usual, largest)
    config.add_optimization_profile(shapes)
    built = builder.build_serialized_network(network, config)
    assert built is not None, simulator.errors()
    return bytes(memoryview(built))


@pytest.fixture
def random_images() -> Callable[..., NDArray[np.uint8]]:
    """random_images(batch, seed=0): (batch, 128, 128, 3) noise."""

    def make(batch: int, seed: int = 0) -> NDArray[np.uint8]:
        return np.random.default_rng(seed).integers(0, 256, (batch, 128, 128, 3), dtype=np.uint8)

    return make


@pytest.fixture
def random_texts() -> Callable[..., NDArray[np.float32]]:
    """random_texts(count, seed=0): (count, 128) of unit length."""

    def make(count: int, seed: int = 0) -> NDArray[np.float32]:
        texts = np.random.default_rng(seed).normal(size=(count, 128)).astype(np.float32)
        return np.asarray(texts / np.linalg.norm(texts, axis=1, keepdims=True))

    return make
