"""Where training starts: the CLIP, the TCL model on it, and what belongs to a model besides its weights."""

import json
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CLIP

from tclkit.runtime.errors import CheckpointError, ConfigError
from tclkit.runtime.files import sha256_from_file
from tclkit.runtime.tokenizer import Tokenizer

from ._torch_archive import archive_root, is_torchscript, require_whole
from .checkpoint import load_checkpoint, load_model
from .clip import ClipConfig, build_clip, load_clip
from .config import TrainConfig
from .model import TCL, TCLConfig
from .tokenizer_file import clip_tokenizer_json, pruned_tokenizer_json, vocabulary_size
from .world import COLOURS, SHAPES, TEMPLATES, every_wording


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What belongs to a model besides its weights.

    tokenizer_json: text of a tokenizer.json.
    templates: prompt templates for the finished model; empty for those of the published protocol.
    vocabulary: what the model knows, for one that knows little; see the bundle's `vocabulary`.
    image_size: pixels a side that it is meant for; None for the exporter's own choice.
    """

    tokenizer_json: str
    templates: tuple[str, ...] = ()
    vocabulary: Mapping[str, Any] | None = None
    image_size: int | None = None

    def tokenizer(self, context_length: int) -> Tokenizer:
        """The tokenizer itself."""
        return Tokenizer(self.tokenizer_json, context_length)

    def to_extra(self) -> dict[str, Any]:
        """What a checkpoint keeps of them, for the exporter."""
        extra: dict[str, Any] = {"tokenizer_json": self.tokenizer_json}
        if self.templates:
            extra["templates"] = list(self.templates)
        if self.vocabulary:
            extra["vocabulary"] = dict(self.vocabulary)
        if self.image_size:
            extra["image_size"] = self.image_size
        return extra


def world_facts(image_size: int | None = None) -> Facts:
    """Those of the synthetic world: a vocabulary cut to its captions."""
    return Facts(
        tokenizer_json=pruned_tokenizer_json(every_wording()),
        templates=TEMPLATES,
        vocabulary={
            "note": "This model knows a small world of coloured shapes only.",
            "words": [*COLOURS, *SHAPES],
        },
        image_size=image_size,
    )


def start_from_checkpoint(config: TrainConfig) -> tuple[TCL, Facts]:
    """Load the TCL model that `config.checkpoint` names, and what belongs to it.

    Raises:
        ConfigError: the decoder has another number of blocks than [grounder] says.
        CheckpointError: see `load_model`.
    """
    content = load_checkpoint(config.checkpoint)
    model = load_model(content, clip=config.clip_checkpoint or None)
    found = model.config.decoder_blocks
    if found != config.grounder.decoder_blocks:
        raise ConfigError(
            f"grounder.decoder_blocks is {config.grounder.decoder_blocks}, but {config.checkpoint} has {found}; "
            "set it so",
            key="decoder_blocks",
        )
    model.config = replace(model.config, kp_w=config.grounder.kp_w)
    extra = content["extra"] if content["format"] == "tclkit" else {}
    facts = Facts(
        tokenizer_json=extra.get("tokenizer_json") or clip_tokenizer_json(),
        templates=tuple(extra.get("templates") or ()),
        vocabulary=None if config.world is None else extra.get("vocabulary"),
        image_size=extra.get("image_size") if config.world is None else config.world.size,
    )
    _require_vocabulary(facts, model.config.clip)
    return model, facts


def start_from_clip(config: TrainConfig) -> tuple[TCL, Facts]:
    """A new grounder on the CLIP that `config.clip_checkpoint` names: a file, or open_clip's name of one.

    A finished clip.pt of `tclkit train` brings the synthetic world's words, any other CLIP those of CLIP.

    Raises:
        CheckpointError, DownloadError: see `load_clip`.
        ConfigError: the file does not exist.
    """
    source = config.clip_checkpoint
    if Path(source).suffix and not Path(source).is_file():
        raise ConfigError(f"clip_checkpoint {source} does not exist", key="clip_checkpoint")
    own = read_own_clip(Path(source)) if Path(source).is_file() else None
    sizes, clip = load_clip(source) if own is None else own
    facts = Facts(tokenizer_json=clip_tokenizer_json()) if own is None else world_facts()
    _require_vocabulary(facts, sizes)
    return new_model(config, sizes, clip), facts


def new_model(config: TrainConfig, sizes: ClipConfig, clip: CLIP) -> TCL:
    """A new grounder on a CLIP, by the configuration's seed."""
    torch.manual_seed(config.seed + 1)
    model = TCL(TCLConfig(clip=sizes, decoder_blocks=config.grounder.decoder_blocks, kp_w=config.grounder.kp_w), clip)
    model.grounder.open_gates(config.grounder.initial_gate)
    return model


def read_own_clip(path: Path, fingerprint: Mapping[str, Any] | None = None) -> tuple[ClipConfig, CLIP] | None:
    """Load a finished clip.pt of `tclkit train`; None when the file is another CLIP's.

    Raises:
        ConfigError: the file does not exist.
        CheckpointError: it is damaged, or, where a fingerprint is given, of another recipe.
    """
    if not path.is_file():
        raise ConfigError(f"clip_checkpoint {path} does not exist", key="clip_checkpoint")
    is_archive = archive_root(path) is not None
    if is_archive and is_torchscript(path):  # as OpenAI ships CLIP
        return None
    try:
        require_whole(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles of others
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is not its own
        is_others = not is_archive or isinstance(error, pickle.UnpicklingError)
        if is_others and fingerprint is None:
            return None
        raise CheckpointError(f"{path} is damaged, or no clip.pt of tclkit train: {error}") from error
    if not isinstance(state, Mapping) or not {"clip_config", "clip", "fingerprint"} <= state.keys():
        return None
    if fingerprint is not None and json.loads(state["fingerprint"]) != fingerprint:
        raise CheckpointError(
            f"{path} was made with another configuration; choose another run folder, or --resume never to begin anew"
        )
    sizes = ClipConfig.from_dict(state["clip_config"])
    clip = build_clip(sizes)
    clip.load_state_dict(state["clip"])
    return sizes, clip


def start_identity(config: TrainConfig) -> dict[str, str]:
    """What the start is, for a fingerprint: hashes of files, and names as they are."""
    named = {"checkpoint": config.checkpoint, "clip_checkpoint": config.clip_checkpoint}
    return {
        key: sha256_from_file(source) if Path(source).is_file() else source for key, source in named.items() if source
    }


def _require_vocabulary(facts: Facts, sizes: ClipConfig) -> None:
    size = vocabulary_size(facts.tokenizer_json)
    if sizes.vocab_size != size:
        raise CheckpointError(
            f"this CLIP has {sizes.vocab_size} tokens, but its tokenizer {size}: a CLIP with CLIP's own vocabulary is "
            "needed, or a checkpoint of tclkit train, which brings its tokenizer"
        )
