"""What the tests of the torch side share: tolerances, tiny models, the authors' checkpoints from their goldens."""

import importlib.util
import json
import sys
import zipfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tclkit.tcl import TCL, ClipConfig, TCLConfig, build_clip, load_model

_MEASURED: dict[str, float] = defaultdict(float)


def _table() -> dict[str, Any]:
    name = "tclkit_tests_tolerances"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("tolerances.py"))
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    table: dict[str, Any] = sys.modules[name].TOLERANCES
    return table


@pytest.fixture(scope="session")
def check() -> Callable[..., None]:
    """check(what, ours, theirs, scale=None): the error must be within the table's limit for `what`."""

    def compare(what: str, ours: Any, theirs: Any, scale: float | None = None) -> None:
        tolerance = _table()[what]
        ours, theirs = (np.asarray(x.detach() if isinstance(x, torch.Tensor) else x) for x in (ours, theirs))
        assert ours.shape == theirs.shape
        error = float(np.abs(ours.astype(np.float64) - theirs).max())
        if tolerance.relative:
            error /= float(np.abs(theirs).max()) if scale is None else scale
        _MEASURED[what] = max(_MEASURED[what], error)
        assert error <= tolerance.limit, f"{what}: {error:.2g} from the golden, allowed {tolerance.limit:.2g}"

    return compare


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.get_verbosity() > 0 and _MEASURED:
        terminalreporter.section("measured against goldens: limit, last recorded, this run")
        for what, error in _MEASURED.items():
            tolerance = _table()[what]
            terminalreporter.line(f"{what:30} {tolerance.limit:9.1e} {tolerance.measured:9.1e} {error:9.1e}")


@pytest.fixture(scope="session")
def arrays(golden: Path) -> Callable[[str], dict[str, np.ndarray]]:
    """arrays("pamr.npz"): a golden file's arrays."""

    def read(name: str) -> dict[str, np.ndarray]:
        with np.load(golden / name) as file:
            return {key: file[key] for key in file.files}

    return read


@pytest.fixture
def official_model(golden: Path) -> TCL:
    """The authors' tiny model, fresh for every test."""
    return load_model(golden / "official_learned.pth", clip=golden / "clip_tiny.pt")


@pytest.fixture(scope="session")
def full_checkpoint(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The authors' full training checkpoint, put together from its pickle and the tensors of other goldens."""
    learned = torch.load(golden / "official_learned.pth", weights_only=True)["model"]
    clip = torch.load(golden / "clip_tiny.pt", weights_only=True)
    clip_names = {
        "clip_image_encoder.clip_proj.proj": "visual.proj",
        "clip_image_encoder.clip_proj.ln.weight": "visual.ln_post.weight",
        "clip_image_encoder.clip_proj.ln.bias": "visual.ln_post.bias",
    }
    path = tmp_path_factory.mktemp("official") / "full.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.write(golden / "official_tiny.data.pkl", "official_tiny/data.pkl")
        archive.writestr("official_tiny/byteorder", "little")
        archive.writestr("official_tiny/version", "3\n")
        for key, name, dtype, count in json.loads((golden / "official_tiny_storages.json").read_text()):
            if name is None:
                tensor = torch.zeros(count, dtype=getattr(torch, dtype))
            elif name in learned:
                tensor = learned[name]
            else:
                short = name.removeprefix("clip_text_encoder.").replace("clip_image_encoder.clip_visual.", "visual.")
                tensor = clip[clip_names.get(name, short)].float()
            assert tensor.numel() == count
            archive.writestr(f"official_tiny/data/{key}", tensor.numpy().tobytes())
    return path


@pytest.fixture(scope="session")
def clip_config() -> Callable[..., ClipConfig]:
    """clip_config(patch_size=8, ...): sizes of a CLIP of two layers for 64-pixel images."""

    def make(**changes: Any) -> ClipConfig:
        values: dict[str, Any] = {
            "embed_dim": 24,
            "image_size": 64,
            "patch_size": 16,
            "vision_width": 32,
            "vision_layers": 2,
            "vision_head_width": 16,
            "context_length": 12,
            "vocab_size": 40,
            "text_width": 16,
            "text_heads": 2,
            "text_layers": 2,
            "quick_gelu": False,
        }
        return ClipConfig(**{**values, **changes})

    return make


@pytest.fixture
def tiny_model(clip_config: Callable[..., ClipConfig]) -> TCL:
    """A TCL on random weights whose decoder's gates are open, so that every part counts."""
    torch.manual_seed(0)
    config = clip_config()
    model = TCL(TCLConfig(clip=config), build_clip(config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate"):
                parameter.fill_(0.5)
    return model
