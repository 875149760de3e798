"""`tclkit train`: a CLIP on the synthetic world, TCL on that CLIP, and the final evaluation, in one run folder.

    runs/NAME/
      config.json       the resolved configuration
      log.jsonl         losses, every ten steps
      last-clip.pt      where an interrupted CLIP stage goes on
      clip.pt           the finished CLIP
      last-grounder.pt  where an interrupted grounder stage goes on
      tcl.pt            the finished model: `tclkit export runs/NAME/tcl.pt` takes it from here
      evaluation.json   the final scores

A run that was interrupted, even killed, goes on with the same command and ends with the same bits.
"""

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from open_clip.model import CLIP

from tclkit.runtime.errors import CheckpointError, ConfigError
from tclkit.runtime.files import atomic_file
from tclkit.runtime.tokenizer import Tokenizer

from .batches import WorldBatches
from .checkpoint import save_checkpoint
from .clip import ClipConfig, build_clip
from .clip_training import ClipStage
from .config import TrainConfig
from .distributed import current_place, wait_for_all
from .evaluate import WorldScore, choose_thresholds, evaluate_on_world
from .grounder_training import GrounderStage
from .loop import ProgressCallback, run_stage
from .model import TCL, TCLConfig
from .tokenizer_file import pruned_tokenizer_json, vocabulary_size
from .world import COLOURS, SHAPES, TEMPLATES, every_wording

_GROUNDER_FIRST_SCENE = 1 << 40  # far from every scene that CLIP saw

_LOSSES_BEFORE = {"tile": 0, "reference_bugs": False, "image_level": True, "feature_level": True}  # what version 0.1 did


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingResult:
    """What a run leaves behind.

    checkpoint: the finished model. scores: the final evaluation. seconds: this call took.
    """

    checkpoint: Path
    scores: Sequence[WorldScore]
    seconds: float


def train(
    config: TrainConfig,
    *,
    run_folder: str | Path,
    resume: Literal["auto", "never"] = "auto",
    progress: ProgressCallback | None = None,
) -> TrainingResult:
    """Train what `config` describes, going on where an earlier call with the same folder stopped.

    Over several processes (torchrun) every process calls it with the same folder on a disk that all see. The first one
    writes, evaluates and reports; on the others the result has no scores and its checkpoint may not be written yet.

    Args:
        config: the whole recipe.
        run_folder: made when missing.
        resume: "never" begins anew and removes what an earlier run left there.
        progress: called after every step of every stage.

    Raises:
        ConfigError: the configuration does not fit itself.
        CheckpointError: the folder holds the run of another configuration.
        TrainingError: a loss is not finite.
    """
    began = time.monotonic()
    folder, place = Path(run_folder), current_place()
    tokenizer_json = _tokenizer_json(config.clip)
    tokenizer = Tokenizer(tokenizer_json, config.clip.context_length)
    if place.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        if resume == "never":
            _clear(folder)
        _write_json(folder / "config.json", config.to_dict())
    wait_for_all()
    clip = _finished_clip(config, folder, tokenizer, progress)
    model = _finished_grounder(config, folder, tokenizer, clip, progress)
    checkpoint = folder / "tcl.pt"
    if not place.is_first:
        return TrainingResult(checkpoint=checkpoint, scores=(), seconds=time.monotonic() - began)
    if not checkpoint.exists():
        thresholds = choose_thresholds(model, tokenizer, config, progress=progress)
        save_checkpoint(checkpoint, model, extra=_extra(config, tokenizer_json, thresholds))
    scores = _scores(config, folder, model, tokenizer, progress)
    return TrainingResult(checkpoint=checkpoint, scores=scores, seconds=time.monotonic() - began)


def _finished_clip(config: TrainConfig, folder: Path, tokenizer: Tokenizer, progress: ProgressCallback | None) -> CLIP:
    fingerprint = _fingerprint(config, "world", "clip", "clip_training", "curriculum")
    if config.clip_checkpoint:
        return _load_clip(Path(config.clip_checkpoint), config.clip)
    finished = folder / "clip.pt"
    if finished.exists():
        return _load_clip(finished, config.clip, fingerprint)
    if current_place().count > 1:
        raise ConfigError(
            "a CLIP is trained by one process; train it so first, then give its clip.pt as clip_checkpoint",
            key="clip_checkpoint",
        )
    torch.manual_seed(config.seed)
    clip = build_clip(config.clip)
    batches = WorldBatches(config.world, tokenizer, config.clip_training.batch_size)
    stage = ClipStage(config, clip, batches)
    run_stage(
        stage,
        folder,
        fingerprint=fingerprint,
        save_every=config.save_every,
        progress=progress,
    )
    state = {"clip_config": config.clip.to_dict(), "clip": clip.state_dict(), "fingerprint": json.dumps(fingerprint)}
    with atomic_file(finished) as temporary:
        torch.save(state, temporary)
    return clip.eval()


def _load_clip(path: Path, config: ClipConfig, fingerprint: dict[str, Any] | None = None) -> CLIP:
    """Load a finished clip.pt; of this very recipe, when a fingerprint is given."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found, made_with = ClipConfig.from_dict(state["clip_config"]), json.loads(state["fingerprint"])
    except FileNotFoundError as error:
        raise ConfigError(f"clip_checkpoint {path} does not exist", key="clip_checkpoint") from error
    except Exception as error:  # torch raises many kinds for a damaged file
        raise CheckpointError(f"{path} is not a clip.pt of tclkit train: {error}") from error
    if found != config:
        raise CheckpointError(f"{path} holds a CLIP of other sizes than [clip] says: {found} against {config}")
    if fingerprint is not None and made_with != fingerprint:
        raise CheckpointError(
            f"{path} was made with another configuration; choose another run folder, or --resume never to begin anew"
        )
    clip = build_clip(config)
    clip.load_state_dict(state["clip"])
    return clip


def _finished_grounder(
    config: TrainConfig, folder: Path, tokenizer: Tokenizer, clip: CLIP, progress: ProgressCallback | None
) -> TCL:
    torch.manual_seed(config.seed + 1)
    sizes = TCLConfig(clip=config.clip, decoder_blocks=config.grounder.decoder_blocks, kp_w=config.grounder.kp_w)
    model = TCL(sizes, clip)
    model.grounder.open_gates(config.grounder.initial_gate)
    batches = WorldBatches(config.world, tokenizer, config.grounder_training.batch_size)
    batches.position = _GROUNDER_FIRST_SCENE
    run_stage(
        GrounderStage(config, model, batches),
        folder,
        fingerprint=_fingerprint(config, "world", "clip", "grounder", "grounder_training", "losses"),
        save_every=config.save_every,
        progress=progress,
    )
    return model.eval()


def _scores(
    config: TrainConfig, folder: Path, model: TCL, tokenizer: Tokenizer, progress: ProgressCallback | None
) -> list[WorldScore]:
    path = folder / "evaluation.json"
    settings = dataclasses.asdict(config.evaluation)
    if path.exists():
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["evaluation"] == settings:
            return [WorldScore(**row) for row in stored["scores"]]
    scores = evaluate_on_world(model, tokenizer, config, progress=progress)
    _write_json(path, {"evaluation": settings, "scores": [dataclasses.asdict(score) for score in scores]})
    return scores


def _tokenizer_json(clip: ClipConfig) -> str:
    tokenizer_json = pruned_tokenizer_json(every_wording())
    size = vocabulary_size(tokenizer_json)
    if clip.vocab_size != size:
        raise ConfigError(
            f"clip.vocab_size is {clip.vocab_size}, but the world's vocabulary has {size} tokens; set it so"
        )
    return tokenizer_json


def _extra(config: TrainConfig, tokenizer_json: str, thresholds: dict[str, float]) -> dict[str, Any]:
    """What the exporter needs besides weights."""
    return {
        "name": config.name,
        "description": config.description,
        "tokenizer_json": tokenizer_json,
        "templates": list(TEMPLATES),
        "image_size": config.world.size,
        "thresholds": thresholds,
        "vocabulary": {
            "note": "This model knows a small world of coloured shapes only.",
            "words": [*COLOURS, *SHAPES],
        },
        "train_config": config.to_dict(),
    }


def _fingerprint(config: TrainConfig, *sections: str) -> dict[str, Any]:
    values = config.to_dict()
    values["grounder"].pop("kp_w")  # changes what is made of the model, not the model
    for key, before in _LOSSES_BEFORE.items():  # runs from before there was a choice can go on
        if values["losses"][key] == before:
            values["losses"].pop(key)
    place = current_place()
    processes = {"processes": place.count} if place.count > 1 else {}
    return {**{name: values[name] for name in ("seed", "precision", *sections)}, **processes}


def _write_json(path: Path, values: Any) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _clear(folder: Path) -> None:
    for name in (
        "config.json",
        "log.jsonl",
        "last-clip.pt",
        "clip.pt",
        "last-grounder.pt",
        "tcl.pt",
        "evaluation.json",
    ):
        (folder / name).unlink(missing_ok=True)
