"""Checkpoints: ours, and how the authors' are taken in."""

import os
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import tclkit.tcl.checkpoint as checkpoint_module
from tclkit.runtime.errors import CheckpointError, ConfigError
from tclkit.tcl import load_checkpoint, load_clip, load_model, save_checkpoint


def equal(a, b) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_round_trip(tiny_model, tmp_path):
    optimizer = torch.optim.AdamW(tiny_model.grounder.parameters())
    extra = {
        "step": 7,
        "optimizer": optimizer.state_dict(),
        "templates": ["a {}."],
        "world": True,
        "none": None,
        "t": (1, 2.5),
    }
    path = tmp_path / "deep" / "model.pt"
    save_checkpoint(path, tiny_model, extra=extra)
    content = load_checkpoint(path)
    assert content["format"] == "tclkit"
    assert content["extra"] == extra
    assert content["config"] == tiny_model.config.to_dict()
    assert torch.load(path, weights_only=True)["format"] == "tclkit"
    model = load_model(path)
    assert equal(model, tiny_model)
    assert equal(load_model(content), tiny_model)
    assert not model.training
    assert model.config == tiny_model.config


def test_own_checkpoint_with_its_own_clip(tiny_model, tmp_path, golden):
    save_checkpoint(tmp_path / "m.pt", tiny_model)
    assert equal(load_model(tmp_path / "m.pt", clip=tiny_model.clip), tiny_model)
    with pytest.raises(CheckpointError, match="holds its own CLIP, and clip= is a different one"):
        load_model(tmp_path / "m.pt", clip=golden / "clip_tiny.pt")


@pytest.mark.parametrize("value", [np.float64(1.0), {1, 2}, object(), torch.nn.Linear(1, 1)])
def test_extra_must_be_plain(value, tiny_model, tmp_path):
    with pytest.raises(
        CheckpointError, match=r"extra\['log'\]\[1\] is a \w+; a checkpoint keeps tensors and plain values"
    ):
        save_checkpoint(tmp_path / "m.pt", tiny_model, extra={"log": [1, value]})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_leaves_the_old_file(tiny_model, tmp_path, monkeypatch):
    path = tmp_path / "m.pt"
    save_checkpoint(path, tiny_model)
    before = path.read_bytes()

    def save_to_full_disk(content, stream):
        with Path("/dev/full").open("wb") as full:
            torch.serialization.save(content, full)
            full.flush()

    monkeypatch.setattr(checkpoint_module.torch, "save", save_to_full_disk)
    with pytest.raises(CheckpointError, match="could not write"):
        save_checkpoint(path, tiny_model)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_unwritable_folder(tiny_model, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="could not write"):
        save_checkpoint(tmp_path / "file" / "m.pt", tiny_model)


def test_later_formats_are_refused(tiny_model, tmp_path):
    save_checkpoint(tmp_path / "m.pt", tiny_model)
    content = torch.load(tmp_path / "m.pt", weights_only=True)
    torch.save({**content, "format_version": 2}, tmp_path / "later.pt")
    with pytest.raises(CheckpointError, match="checkpoint format 2, this tclkit reads 1; update tclkit"):
        load_checkpoint(tmp_path / "later.pt")
    del content["model"]
    torch.save(content, tmp_path / "cut.pt")
    with pytest.raises(CheckpointError, match="lacks model"):
        load_checkpoint(tmp_path / "cut.pt")


def test_tensors_must_fit_the_config(tiny_model, tmp_path):
    save_checkpoint(tmp_path / "m.pt", tiny_model)
    content = load_checkpoint(tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="do not fit its own config"):
        load_model({**content, "config": {**content["config"], "decoder_blocks": 3}})
    with pytest.raises(ConfigError, match="unknown key 'colour' in model"):
        load_model({**content, "config": {**content["config"], "colour": 3}})


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "there is no file"), (b"", r"\(0 bytes\) was not written by torch.save"), (b"hello " * 99, "594 bytes")],
)
def test_files_that_are_none(content, message, tmp_path):
    path = tmp_path / "m.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)


def test_a_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="is a folder; give the checkpoint file in it"):
        load_checkpoint(tmp_path)


def test_a_clip_is_no_checkpoint(golden):
    with pytest.raises(CheckpointError, match=r"it has no grounder\. A CLIP file goes to --clip,"):
        load_model(golden / "clip_tiny.pt")
    with pytest.raises(CheckpointError, match="TorchScript archive, as OpenAI ships CLIP; give it as --clip"):
        load_model(golden / "clip_micro_jit.pt")


def test_other_content_is_no_checkpoint(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="holds a list"):
        load_checkpoint(tmp_path / "list.pt")
    torch.save(torch.nn.Linear(1, 1), tmp_path / "module.pt")
    with pytest.raises(CheckpointError, match=r"holds a torch\.nn\.modules\.linear\.Linear, not the state dict"):
        load_checkpoint(tmp_path / "module.pt")


def test_damage_is_always_one_clear_error(tiny_model, tmp_path):
    """Truncate at many places, and flip bytes at many others: a CheckpointError, or a file that still loads whole."""
    path, broken = tmp_path / "m.pt", tmp_path / "broken.pt"
    save_checkpoint(path, tiny_model)
    data = path.read_bytes()
    generator = np.random.default_rng(0)
    for cut in generator.integers(0, len(data) - 1, 20):
        broken.write_bytes(data[:cut])
        with pytest.raises(CheckpointError):
            load_model(broken)
    refused = 0
    for place in generator.integers(0, len(data), 40):
        flipped = bytearray(data)
        flipped[place] ^= 0x41
        broken.write_bytes(flipped)
        try:
            load_model(broken)
        except CheckpointError:
            refused += 1
    assert refused >= 30  # the rest hit padding between records


@pytest.mark.parametrize("fault", ["is compressed", "its records overlap"])
def test_a_file_that_unpacks_to_more_than_it_holds_is_refused(fault, tmp_path, monkeypatch):
    """Before torch.load, which would unpack it."""
    torch.save({"model": {"masker.x": torch.zeros(1000)}}, tmp_path / "m.pth")
    with (
        zipfile.ZipFile(tmp_path / "m.pth") as plain,
        zipfile.ZipFile(
            tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED if fault == "is compressed" else zipfile.ZIP_STORED
        ) as bomb,
    ):
        for record in plain.infolist():
            bomb.writestr(record.filename, plain.read(record))
        if fault == "its records overlap":
            for count in range(9):
                copy = zipfile.ZipInfo(f"m/data/{count + 1}")
                largest = max(bomb.infolist(), key=lambda one: one.file_size)
                for field in ("header_offset", "file_size", "compress_size", "CRC"):
                    setattr(copy, field, getattr(largest, field))
                bomb.filelist.append(copy)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpacked"))
    with pytest.raises(CheckpointError, match=fault):
        load_checkpoint(tmp_path / "bomb.pth")


def test_the_authors_published_form(golden, official_model):
    content = load_checkpoint(golden / "official_learned.pth")
    assert content["format"] == "official"
    assert content["config"] == {}
    with pytest.raises(CheckpointError, match=r'learned parameters only; name the CLIP.*clip="ViT-B-16"'):
        load_model(golden / "official_learned.pth")
    with pytest.raises(CheckpointError, match="copies block 2, but this CLIP's last is 0"):
        load_model(golden / "official_learned.pth", clip=golden / "clip_micro.pt")
    _, clip = load_clip(golden / "clip_tiny.pt")
    assert equal(load_model(content, clip=clip), official_model)


def test_the_authors_training_form(full_checkpoint, golden, official_model):
    with pytest.raises(pickle.UnpicklingError):
        torch.load(full_checkpoint, weights_only=True)
    content = load_checkpoint(full_checkpoint)
    assert content["extra"]["step"] == 5000
    assert content["extra"]["metrics"] == {"val/t_voc20_miou": 1.25, "val/t_context59_miou": 2.5, "val/avg_miou": 1.875}
    assert content["config"]["train"]["optimizer"] == {"name": "adamw", "eps": 1e-6, "betas": [0.9, 0.999]}
    assert len(content["model"]) == 112
    model = load_model(full_checkpoint)
    with torch.no_grad():
        model.clip.logit_scale.copy_(official_model.clip.logit_scale)  # the authors do not keep it
    assert equal(model, official_model)
    load_model(full_checkpoint, clip=golden / "clip_tiny.pt")
    with pytest.raises(CheckpointError, match="holds its own CLIP"):
        load_model(full_checkpoint, clip=golden / "clip_micro.pt")


def test_the_training_form_needs_no_omegaconf(full_checkpoint, monkeypatch):
    """Whatever the pickle names is not imported, be it installed or not."""
    monkeypatch.setitem(sys.modules, "omegaconf", None)  # an import of it would now raise
    before = set(sys.modules)
    assert len(load_checkpoint(full_checkpoint)["model"]) == 112
    assert not any(name.startswith("omegaconf") for name in set(sys.modules) - before)


class Hostile:
    def __init__(self, marker) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("where", ["config", "metrics", "model", "beside"])
def test_no_code_of_a_pickle_runs(where, golden, tmp_path):
    """A pickle that would make a folder: by torch's own reader it is refused, by ours it is read and does nothing."""
    marker = tmp_path / "pwned"
    content = torch.load(golden / "official_learned.pth", weights_only=True)
    if where == "beside":
        content["model"]["masker.evil"] = Hostile(marker)
    else:
        content[where] = Hostile(marker)
    path = tmp_path / "evil.pth"
    torch.save(content, path)
    if where == "model":
        with pytest.raises(CheckpointError):
            load_model(path, clip=golden / "clip_tiny.pt")
    else:
        load_model(path, clip=golden / "clip_tiny.pt")
    assert not marker.exists()


def test_no_code_of_a_clip_file_runs(golden, tmp_path):
    marker = tmp_path / "pwned"
    state = torch.load(golden / "clip_micro.pt", weights_only=True)
    torch.save({**state, "evil": Hostile(marker)}, tmp_path / "evil.pt")
    load_clip(tmp_path / "evil.pt")
    assert not marker.exists()
    with zipfile.ZipFile(tmp_path / "bare.pt", "w") as archive:
        archive.writestr("bare/data.pkl", pickle.dumps(Hostile(marker), protocol=2))
    with pytest.raises(CheckpointError, match="holds no state dict"):
        load_clip(tmp_path / "bare.pt")
    assert not marker.exists()
