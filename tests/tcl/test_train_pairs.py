"""Training on image-text pairs from a TCL checkpoint or a CLIP: what it leaves, and that nothing can lose it."""

import io
import json
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tclkit.tcl.train as train_module
from tclkit.runtime.errors import CheckpointError, ConfigError, InputError, TrainingError
from tclkit.tcl import TCL, ClipConfig, TCLConfig, build_clip, load_checkpoint, load_model, save_checkpoint
from tclkit.tcl.config import TrainConfig, load_config
from tclkit.tcl.distributed import Place
from tclkit.tcl.dry_run import dry_run
from tclkit.tcl.loop import TrainProgress
from tclkit.tcl.tokenizer_file import clip_tokenizer_json, pruned_tokenizer_json
from tclkit.tcl.train import train
from tclkit.tcl.world import WorldConfig, every_wording, scene

SIZES = ClipConfig(
    embed_dim=16,
    image_size=32,
    patch_size=8,
    vision_width=32,
    vision_layers=2,
    vision_head_width=16,
    context_length=24,
    vocab_size=613,
    text_width=16,
    text_heads=1,
    text_layers=1,
    quick_gelu=False,
)
RECIPE = """
name = "tiny"
precision = "fp32"
workers = 0
save_every = 2
checkpoint = {checkpoint!r}

[pairs]
sources = [{sources!r}]

[augmentation]
size = 32

[grounder]
decoder_only_steps = 3
initial_gate = 0.5

[grounder_training]
steps = 6
batch_size = 3
lr = 1e-3
min_lr = 1e-5
warmup_steps = 2

[losses]
tile = 2
"""


class _StopError(Exception):
    """Stands in for a run that is cut off."""


def write_shards(folder: Path, shards: int = 2, pairs: int = 12) -> str:
    """Scenes of the world as img2dataset would write them; the last shard ends with a pair without a text."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as archive:
            for i in range(pairs):
                drawn = scene(WorldConfig(size=48), shard * pairs + i)
                stream = io.BytesIO()
                Image.fromarray(drawn.image).save(stream, "PNG")
                is_last = shard == shards - 1 and i == pairs - 1
                contents = {"png": stream.getvalue()} | ({} if is_last else {"txt": drawn.caption.encode()})
                for suffix, content in contents.items():
                    member = tarfile.TarInfo(f"{i:08d}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return f"{folder}/{{00000..{shards - 1:05d}}}.tar"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, a model to start from and a recipe."""
    folder = tmp_path_factory.mktemp("pairs")
    sources = write_shards(folder / "shards")
    torch.manual_seed(0)
    model = TCL(TCLConfig(clip=SIZES))
    model.grounder.open_gates(0.5)
    tokenizer = pruned_tokenizer_json(every_wording())
    save_checkpoint(folder / "start.pt", model, extra={"tokenizer_json": tokenizer, "image_size": 32})
    (folder / "tiny.toml").write_text(RECIPE.format(checkpoint=str(folder / "start.pt"), sources=sources))
    return folder


def recipe(home: Path, *overrides: str) -> TrainConfig:
    return load_config(home / "tiny.toml", overrides)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return dict(load_model(path).state_dict())


def stop_at(step: int):
    def callback(progress: TrainProgress) -> None:
        if progress.step == step:
            raise _StopError

    return callback


def test_pairs_move_the_grounder_and_leave_clip_alone(home: Path, tmp_path: Path) -> None:
    seen: list[TrainProgress] = []
    every_pair_once = recipe(home, "grounder_training.steps=9")
    result = train(every_pair_once, run_folder=tmp_path / "run", progress=seen.append)
    assert [p.step for p in seen] == list(range(1, 10))
    assert {p.pairs for p in seen} == {3}
    assert seen[-1].memory_bytes > 1 << 20
    assert result.broken == {"no text": 1}
    before, after = weights(home / "start.pt"), weights(result.checkpoint)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert not [name for name in moved if name.startswith("clip.")]
    assert {"grounder.decoder.0.conv1.conv.weight", "grounder.block.mlp.c_fc.weight"} <= moved
    extra = load_checkpoint(result.checkpoint)["extra"]
    assert extra["image_size"] == 32
    assert extra["train_config"]["pairs"]["sources"] == recipe(home).pairs.sources
    assert not [name for name in torch.load(tmp_path / "run" / "last-grounder.pt")["model"] if name.startswith("clip.")]


def test_pairs_that_any_process_passed_over_are_counted(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "gather_values", lambda own: [own, {"no text": 2, "no image": 1}])
    result = train(recipe(home, "grounder_training.steps=9"), run_folder=tmp_path)
    assert result.broken == {"no text": 3, "no image": 1}


@pytest.mark.parametrize(
    "overrides",
    [
        ["precision=bf16"],
        ["precision=fp16", "grounder_training.accumulate=2"],
        ["grounder_training.accumulate=2", "grounder_training.ema=0.9", "workers=1"],
    ],
    ids=["bf16", "fp16 in parts", "in parts, averaged, with a worker"],
)
def test_an_interrupted_run_ends_with_the_same_bits(home: Path, tmp_path: Path, overrides: list[str]) -> None:
    config = recipe(home, *overrides)
    whole = train(config, run_folder=tmp_path / "whole").checkpoint
    with pytest.raises(_StopError):
        train(config, run_folder=tmp_path / "cut", progress=stop_at(5))
    mended = train(config, run_folder=tmp_path / "cut").checkpoint
    one, other = weights(whole), weights(mended)
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_what_is_watched_does_not_change_the_model(home: Path, tmp_path: Path) -> None:
    """Curves, pictures, validations and kept models are there, and the weights are those of a run without."""
    folder = tmp_path / "labelled"
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    for i in range(4):
        drawn = scene(WorldConfig(size=32, max_objects=1), i)
        Image.fromarray(drawn.image).save(folder / "images" / f"{i}.png")
        Image.fromarray((drawn.label_map >= 0).astype(np.uint8)).save(folder / "labels" / f"{i}.png")
    (folder / "names.txt").write_text("background\nred circle\n")
    watched = recipe(
        home,
        "monitoring.tensorboard=true",
        "monitoring.pictures_every=3",
        "monitoring.keep_every=4",
        "monitoring.validate_every=3",
        "monitoring.validation=folder",
        f"monitoring.validation_data={str(folder)!r}",
    )
    plain = train(recipe(home), run_folder=tmp_path / "plain").checkpoint
    result = train(watched, run_folder=tmp_path / "watched")
    one, other = weights(plain), weights(result.checkpoint)
    for name in one:
        assert torch.equal(one[name], other[name]), name
    run = tmp_path / "watched"
    rows = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 6]
    assert all(row["images"]["counted"] == 4 for row in rows)
    best = load_checkpoint(run / "best.pt")["extra"]["validation"]
    assert best["miou_percent"] == max(row["miou_percent"] for row in rows)
    assert load_model(run / "step-4.pt").config == load_model(plain).config
    assert _board(run / "tensorboard") == ({"train/total", "train/tcli_loss", "validation/miou_percent"}, 6)


def _board(folder: Path) -> tuple[set[str], int]:
    """Some of the curves, and how many pictures there are."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    wanted = {"train/total", "train/tcli_loss", "validation/miou_percent"}
    pictures = sum(len(events.Images(tag)) for tag in events.Tags()["images"])
    return wanted & set(events.Tags()["scalars"]), pictures


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_a_step_and_it_goes_on(home: Path, tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-c", "from tclkit.cli import run; run()", "train", "-c", str(home / "tiny.toml")]
    command += ["-o", str(tmp_path / "run"), "--set", "grounder_training.steps=4000", "--set", "save_every=1000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "log.jsonl").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert f"stopped by {number.name} after grounder step" in said
    assert "the same command goes on" in said
    done = torch.load(tmp_path / "run" / "last-grounder.pt")["step"]
    assert 10 <= done < 4000
    with pytest.raises(_StopError):
        train(
            recipe(home, "grounder_training.steps=4000", "save_every=1000"),
            run_folder=tmp_path / "run",
            progress=stop_at(done + 1),
        )


def test_what_is_not_finite_is_diagnosed_and_kept(home: Path, tmp_path: Path) -> None:
    wild = recipe(home, "grounder_training.lr=1e30", "grounder_training.warmup_steps=0")
    said = r"not finite.*The largest weight is \S+e\+3\d, in grounder.*broken-batch-0\.pt"
    with pytest.raises(TrainingError, match=said) as caught:
        train(wild, run_folder=tmp_path)
    kept = torch.load(tmp_path / "broken-batch-0.pt")
    assert kept["step"] == caught.value.values["step"]
    assert kept["images_BCHW"].shape == (3, 3, 32, 32)
    assert kept["token_ids_BL"].shape[0] == 3


def test_a_run_does_not_go_on_upon_another_model(home: Path, tmp_path: Path) -> None:
    with pytest.raises(_StopError):
        train(recipe(home), run_folder=tmp_path / "run", progress=stop_at(3))
    other = TCL(TCLConfig(clip=SIZES))
    content = load_checkpoint(home / "start.pt")
    save_checkpoint(tmp_path / "other.pt", other, extra=content["extra"])
    with pytest.raises(CheckpointError, match=r"another configuration.*--resume never"):
        train(recipe(home, f"checkpoint={str(tmp_path / 'other.pt')!r}"), run_folder=tmp_path / "run")


def test_a_clip_of_ones_own_is_a_start(home: Path, tmp_path: Path) -> None:
    """A state dict under OpenAI's names, with CLIP's own vocabulary."""
    sizes = ClipConfig(**{**SIZES.to_dict(), "vocab_size": 49408, "context_length": 77})
    torch.save(build_clip(sizes).state_dict(), tmp_path / "clip.pt")
    config = recipe(home, "checkpoint=''", f"clip_checkpoint={str(tmp_path / 'clip.pt')!r}")
    result = train(config, run_folder=tmp_path / "run")
    content = load_checkpoint(result.checkpoint)
    assert content["extra"]["tokenizer_json"] == clip_tokenizer_json()
    assert "templates" not in content["extra"]
    assert content["config"]["clip"]["vocab_size"] == 49408


@pytest.mark.parametrize(
    ("overrides", "error", "text"),
    [
        (["checkpoint=''", "clip_checkpoint='none.pt'"], ConfigError, "does not exist"),
        (["checkpoint=''", "clip_checkpoint=ViT-Z"], CheckpointError, "neither a file nor an open_clip model"),
        (["checkpoint='none.pt'"], CheckpointError, "no file"),
        (["grounder.decoder_blocks=3"], ConfigError, "has 2; set it so"),
        (['pairs.sources=["nowhere/*.tar"]'], InputError, "no file fits"),
        (["workers=5"], InputError, "Use fewer workers"),
        (["monitoring.validate_every=2", "monitoring.validation=vox"], InputError, "vox"),
        (["device=cuda"], ConfigError, "no CUDA device"),
    ],
)
def test_what_cannot_start_says_why(
    home: Path, tmp_path: Path, overrides: list[str], error: type[Exception], text: str
) -> None:
    if "device=cuda" in overrides and torch.cuda.is_available():
        overrides = ["device=tpu"]
        error, text = ConfigError, "choose auto, cpu or cuda"
    with pytest.raises(error, match=text):
        train(recipe(home, *overrides), run_folder=tmp_path / "run")


def test_a_vocabulary_that_does_not_fit_is_refused(home: Path, golden: Path, tmp_path: Path) -> None:
    config = recipe(
        home,
        f"checkpoint={str(golden / 'official_learned.pth')!r}",
        f"clip_checkpoint={str(golden / 'clip_tiny.pt')!r}",
    )
    with pytest.raises(CheckpointError, match="this CLIP has 1024 tokens"):
        train(config, run_folder=tmp_path)


def test_a_dry_run_of_several_processes_trains_no_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_module, "current_place", lambda: Place(1, 2))
    with pytest.raises(ConfigError, match="trained by one process"):
        dry_run(load_config("tcl-shapes"))


def test_a_dry_run_counts_and_keeps_nothing(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = dry_run(recipe(home, "grounder_training.accumulate=2"))
    (stage,) = found.stages
    model = load_model(home / "start.pt")
    frozen = sum(p.numel() for p in model.clip.parameters())
    learned = sum(p.numel() for p in model.parameters()) - frozen
    assert (stage.stage, stage.learned, stage.frozen, stage.pairs) == ("grounder", learned, frozen, 6)
    assert stage.fixed_bytes == 4 * (frozen + 4 * learned)
    assert stage.step_s > 0
    assert stage.peak_bytes > stage.fixed_bytes
    assert found.config["grounder_training"]["accumulate"] == 2
    assert not list(tmp_path.iterdir())
