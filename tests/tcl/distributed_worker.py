"""One of the processes of test_distributed.py: python distributed_worker.py MODE FOLDER RANK COUNT KILL_AT MEETING.

Modes: "parity" computes the authors' batch in all ways, and trains on the world, at once and with an interruption;
"pairs" trains so on the shards in FOLDER; "train" and "train-pairs" train once. All write into FOLDER.
"""

import datetime as dt
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from tclkit.runtime.tokenizer import Tokenizer
from tclkit.tcl import TCL, LossWeights, TCLConfig, load_model
from tclkit.tcl.arithmetic import Arithmetic
from tclkit.tcl.augmentation import AugmentationConfig
from tclkit.tcl.batches import Batches, WorldBatches
from tclkit.tcl.config import TrainConfig, load_config
from tclkit.tcl.distributed import parallel
from tclkit.tcl.grounder_training import GrounderStage
from tclkit.tcl.loop import run_stage
from tclkit.tcl.pair_batches import PairBatches
from tclkit.tcl.pairs import PairsConfig
from tclkit.tcl.tokenizer_file import pruned_tokenizer_json
from tclkit.tcl.world import every_wording

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
STEPS = 20
TINY = [
    "precision=fp32",
    "world.size=32",
    "curriculum.small_size=16",
    "clip.image_size=32",
    "clip.embed_dim=16",
    "clip.vision_width=32",
    "clip.vision_layers=2",
    "clip.vision_head_width=16",
    "clip.text_width=16",
    "clip.text_heads=1",
    "clip.text_layers=1",
    f"grounder_training.steps={STEPS}",
    "grounder_training.warmup_steps=2",
    "grounder.decoder_only_steps=8",
    "losses.tile=4",
]


def tiny_config(pairs_a_process: int, parts: int) -> TrainConfig:
    batch = [f"grounder_training.batch_size={pairs_a_process}", f"grounder_training.accumulate={parts}"]
    return load_config("tcl-shapes", [*TINY, *batch])


class _StopError(Exception):
    """Stands in for a run that is cut off."""


class Interrupted(GrounderStage):
    """Stops before a step, or kills this process there without a word."""

    stop_at = kill_at = -1

    def losses(self, step: int) -> dict[str, torch.Tensor]:
        if step == self.stop_at:
            raise _StopError
        if step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().losses(step)


def train(
    folder: Path,
    pairs_a_process: int,
    *,
    shards: str = "",
    parts: int = 1,
    stop_at: int = -1,
    kill_at: int = -1,
) -> dict[str, torch.Tensor]:
    """Train a tiny grounder on a random CLIP; every step's losses are added to steps.jsonl, the weights returned.

    With shards it reads from those, one worker a part of the batch.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(pairs_a_process, parts)
    torch.manual_seed(3)
    model = TCL(TCLConfig(clip=config.clip))
    model.grounder.open_gates(0.5)
    tokenizer = Tokenizer(pruned_tokenizer_json(every_wording()), config.clip.context_length)
    batches: Batches = WorldBatches(config.world, tokenizer, pairs_a_process)
    if shards:
        pairs, changed = PairsConfig(sources=[shards], seed=2), AugmentationConfig(size=32)
        batches = PairBatches(pairs, changed, tokenizer, pairs_a_process, workers=parts)
    settings = config.grounder_training
    stage = Interrupted(settings, config.grounder, config.losses, model, batches, Arithmetic("cpu", config.precision))
    stage.stop_at, stage.kill_at = stop_at, kill_at
    with (folder / "steps.jsonl").open("a") as log:

        def note(progress) -> None:
            log.write(json.dumps({"step": progress.step, **progress.losses}) + "\n")
            log.flush()

        run_stage(stage, folder, fingerprint={}, save_every=5, progress=note)
    return dict(model.state_dict())


def parity(folder: Path, rank: int) -> None:
    with np.load(GOLDEN / "train_B4.npz") as data:
        image, tokens, noise = (torch.from_numpy(data[name]) for name in ("image", "tokens", "uniform_noise"))
    own = slice(2 * rank, 2 * rank + 2)
    found: dict[str, np.ndarray] = {}
    for bugs in (False, True):
        for tile in (0, 3):
            for case in ("ust", "full", *(["full_ddp_built_in_ust"] if bugs else [])):
                model = load_model(GOLDEN / "official_learned.pth", clip=GOLDEN / "clip_tiny.pt").train()
                model.train_stage("full" if case == "full" else "decoder")
                shared = parallel(model)
                model.train_stage("decoder" if case == "ust" else "full")
                weights = LossWeights(tile=tile, reference_bugs=bugs)
                losses = shared(image[own], tokens[own], noise_uniform=noise[own], weights=weights)
                sum(losses.values()).backward()
                place = f"{'bugs' if bugs else 'exact'}/{tile}/{case}"
                found |= {f"{place}/loss/{name}": loss.detach().numpy() for name, loss in losses.items()}
                grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
                found |= {f"{place}/grad/{name}": grad.numpy() for name, grad in grads.items()}
    np.savez(folder / f"rank{rank}.npz", **found)


def main() -> None:
    mode, folder, rank, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting-{sys.argv[6]}"
    timeout = dt.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count, timeout=timeout)
    shards = str(folder / "*.tar") if "pairs" in mode else ""
    if mode == "parity":
        parity(folder, rank)
    if mode in ("parity", "pairs"):
        whole = train(folder / "whole", 3, shards=shards)
        try:
            train(folder / "cut", 3, shards=shards, stop_at=12)
        except _StopError:
            mended = train(folder / "cut", 3, shards=shards)
            torch.save({"whole": whole, "mended": mended}, folder / f"weights{rank}.pt")
    else:
        train(folder / "run", 3, shards=shards, kill_at=int(sys.argv[5]) if rank == 1 else -1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
