"""A checkpoint becomes a bundle: graphs, tokenizer and bundle.json, checked, and in place only when whole."""

import importlib.metadata
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import open_clip

from tclkit.runtime.bundle import open_bundle, write_manifest
from tclkit.runtime.errors import ExportError, InputError
from tclkit.runtime.files import sha256_from_file
from tclkit.runtime.manifest import SCHEMA_VERSION
from tclkit.runtime.prompts import PROTOCOL_TEMPLATES
from tclkit.tcl.batches import IMAGE_MEAN, IMAGE_STD
from tclkit.tcl.checkpoint import load_checkpoint, load_model
from tclkit.tcl.clip import ClipConfig
from tclkit.tcl.model import TCL
from tclkit.tcl.tokenizer_file import clip_tokenizer_json, vocabulary_size

from ._parity import check_bundle
from .bundle_folder import new_folder, require_replaceable, write_errors
from .decoder import DEFAULT_DECODER, DecoderForm, require_known_form
from .onnx_graphs import write_image_graph, write_masks_graph, write_text_graph
from .wrapper import ImageGraph, MasksGraph, TextGraph

ExportProgress = Callable[[str, int, int], None]
"""Called as progress(what_begins_now, steps_done, steps_in_all); at the end what_begins_now is "done"."""

DEFAULT_SIZE = (448, 448)  # of the published evaluation
_THRESHOLDS = {"background": 0.5, "background_pamr": 0.4}  # of the published evaluation
_PUBLISHED_ARCHITECTURES = ("ViT-B-16", "ViT-B-32", "ViT-L-14", "ViT-L-14-336")


def export_bundle(
    checkpoint: str | Path,
    out: str | Path,
    *,
    clip: str | Path | None = None,
    sizes: Sequence[tuple[int, int]] | None = None,
    name: str | None = None,
    kp_w: float | None = None,
    kp_attention: str = "self",
    decoder: DecoderForm = DEFAULT_DECODER,
    half_weights: bool = False,
    tokenizer_json: str | None = None,
    sources: Mapping[str, Any] | None = None,
    progress: ExportProgress | None = None,
) -> Path:
    """Write the bundle of a checkpoint and return its folder.

    What the checkpoint says of itself (image size, tokenizer, templates, vocabulary, thresholds, name, description) is
    taken; CLIP's tokenizer and the published templates and thresholds stand in for what it does not say. Every graph is
    compared with torch before the folder appears; until then an older bundle at `out` stays as it is.

    Args:
        checkpoint: ours, or the authors' tcl.pth.
        out: the bundle's folder; an older bundle there is replaced, anything else is refused.
        clip: CLIP for a checkpoint that holds none; see `tclkit.tcl.load_model`.
        sizes: (H, W) of the image graphs, multiples of the patch; the first is the main one. None: the checkpoint's
            image size, else 448x448.
        name: in bundle.json; None: the checkpoint's own, else the folder's.
        kp_w: default share of the KP branch in 0..1; 0 leaves the branch out of the graphs. None: the checkpoint's.
        kp_attention: of CLIP's last block in the KP branch: "self" as the published model, or "neighbours".
        decoder: form in which the decoder is written, all of them the same function; see `DecoderForm`.
        half_weights: store large weights as float16, in half the space; the graphs still compute in float32.
        tokenizer_json: text of a tokenizer.json for the text encoder; None: the checkpoint's own, else CLIP's.
        sources: what to note in the provenance besides, for example addresses.
        progress: called before every step.

    Raises:
        CheckpointError: the checkpoint cannot be read or needs clip.
        ConfigError: unknown kp_attention or decoder.
        InputError: a size, kp_w or the name is wrong.
        ExportError: the tokenizer does not fit the model, a graph could not be exported, or `out` cannot be written.
        ParityError: a graph differs from torch by too much.
    """
    out = Path(out).expanduser().resolve()
    require_replaceable(out)
    report = _Steps(progress)
    report("reading the checkpoint", 1)
    content = load_checkpoint(checkpoint)
    model = load_model(content, clip=clip)
    model.use_kp_attention(kp_attention)
    require_known_form(decoder)
    plan = _plan(content["extra"], model, out, sizes, name, kp_w, decoder, half_weights, tokenizer_json)
    report.total = len(plan.sizes) + 5
    provenance = _provenance(content, checkpoint, clip, model, sources)
    provenance |= {"half_weights": half_weights, "decoder": decoder}
    if kp_attention != "self":
        provenance |= {"kp_attention": kp_attention}
    with write_errors(out), new_folder(out) as folder:
        images = _write_graphs(model, plan, folder, report)
        (folder / "tokenizer.json").write_text(plan.tokenizer_json, encoding="utf-8")
        manifest = _manifest(model, plan, images, provenance)
        write_manifest(folder, manifest)
        report("comparing the graphs with torch")
        checks = check_bundle(open_bundle(folder, verify=False), model, stored="float16" if half_weights else "float32")
        report("writing bundle.json")
        write_manifest(folder, manifest | {"checks": {"fp32": checks}})
    report("done")
    return out


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """What bundle.json will say and which graphs are written."""

    name: str
    description: str
    sizes: list[tuple[int, int]]
    kp_w: float
    decoder: DecoderForm
    half_weights: bool
    tokenizer_json: str
    templates: list[str]
    thresholds: dict[str, float]
    vocabulary: dict[str, Any] | None


class _Steps:
    """Counts steps for a progress callback."""

    def __init__(self, progress: ExportProgress | None) -> None:
        self._progress, self._done, self.total = progress, 0, 0

    def __call__(self, what: str, total: int | None = None) -> None:
        if self._progress:
            self._progress(what, self._done, max(self.total, total or 0))
        self._done += 1


def _plan(
    extra: Mapping[str, Any],
    model: TCL,
    out: Path,
    sizes: Sequence[tuple[int, int]] | None,
    name: str | None,
    kp_w: float | None,
    decoder: DecoderForm,
    half_weights: bool,
    tokenizer_json: str | None,
) -> _Plan:
    kp_w = model.config.kp_w if kp_w is None else kp_w
    if not 0 <= kp_w <= 1:
        raise InputError(f"kp_w should be in 0..1, found {kp_w!r}")
    if name is not None and (not name.strip() or "/" in name):
        raise InputError(f"{name!r} is no name for a bundle: give one or more characters without a slash")
    tokenizer_json = tokenizer_json or extra.get("tokenizer_json") or clip_tokenizer_json()
    _require_fitting_tokenizer(tokenizer_json, model.config.clip.vocab_size)
    return _Plan(
        name=name or extra.get("name") or out.name,
        description=extra.get("description") or _description(model.config.clip),
        sizes=_checked_sizes(sizes, extra.get("image_size"), model.config.clip.patch_size),
        kp_w=float(kp_w),
        decoder=decoder,
        half_weights=half_weights,
        tokenizer_json=tokenizer_json,
        templates=list(extra.get("templates") or PROTOCOL_TEMPLATES),
        thresholds=_THRESHOLDS | dict(extra.get("thresholds") or {}),
        vocabulary=extra.get("vocabulary"),
    )


def _checked_sizes(
    sizes: Sequence[tuple[int, int]] | None, own: int | Sequence[int] | None, patch: int
) -> list[tuple[int, int]]:
    if sizes is None:
        sizes = [DEFAULT_SIZE if own is None else (own, own) if isinstance(own, int) else (own[0], own[1])]
    unique = list(dict.fromkeys((int(height), int(width)) for height, width in sizes))
    if not unique:
        raise InputError("no image size was given; give at least one, for example 448x448")
    for height, width in unique:
        if height < patch or width < patch or height % patch or width % patch:
            near = "x".join(str(max(patch, round(side / patch) * patch)) for side in (height, width))
            raise InputError(
                f"image size {height}x{width} is no multiple of the model's patch, {patch}; the nearest is {near}",
                size=(height, width),
            )
    return unique


def _require_fitting_tokenizer(tokenizer_json: str, vocab_size: int) -> None:
    found = vocabulary_size(tokenizer_json)
    if found != vocab_size:
        raise ExportError(
            f"the tokenizer knows {found} tokens, but the model's text encoder has {vocab_size}. Give the tokenizer "
            "that it was trained with: keep it in the checkpoint as extra['tokenizer_json'], or pass tokenizer_json",
            expected=vocab_size,
            found=found,
        )


def _write_graphs(model: TCL, plan: _Plan, folder: Path, report: _Steps) -> list[dict[str, Any]]:
    """Write all graphs and return the entries of `images`."""
    images: list[dict[str, Any]] = []
    with_kp = plan.kp_w > 0
    for height, width in plan.sizes:
        report(f"image graph {height}x{width}")
        file = f"image-{height}x{width}.onnx" if images else "image.onnx"
        graph = ImageGraph(model, (height, width), with_kp=with_kp)
        write_image_graph(graph, folder / file, half_weights=plan.half_weights, decoder=plan.decoder)
        images.append({"height": height, "width": width, "files": {"fp32": file}})
    report("masks graph")
    write_masks_graph(MasksGraph(model, with_kp=with_kp), model.config.clip.embed_dim, folder / "masks.onnx")
    report("text graph")
    write_text_graph(TextGraph(model.clip), folder / "text.onnx", half_weights=plan.half_weights)
    return images


def _manifest(model: TCL, plan: _Plan, images: list[dict[str, Any]], provenance: Mapping[str, Any]) -> dict[str, Any]:
    clip = model.config.clip
    return {
        "schema_version": SCHEMA_VERSION,
        "name": plan.name,
        "description": plan.description,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "tclkit_version": importlib.metadata.version("tclkit"),
        "model": {
            "architecture": _architecture(clip),
            "patch_size": clip.patch_size,
            "embed_dim": clip.embed_dim,
            "context_length": clip.context_length,
            "vocab_size": clip.vocab_size,
            "mask_scale": model.config.mask_scale,
        },
        "images": images,
        "masks": "masks.onnx",
        "text": "text.onnx",
        "tokenizer": "tokenizer.json",
        "preprocessing": {"mean": [*IMAGE_MEAN], "std": [*IMAGE_STD], "interpolation": "bilinear-uint8"},
        "templates": plan.templates,
        "kp_w": plan.kp_w,
        "thresholds": plan.thresholds,
        "vocabulary": plan.vocabulary,
        "provenance": provenance,
        "checks": {},
    }


def _provenance(
    content: Mapping[str, Any],
    checkpoint: str | Path,
    clip: str | Path | None,
    model: TCL,
    sources: Mapping[str, Any] | None,
) -> dict[str, Any]:
    configs = {"model": model.config.to_dict()}
    if content["extra"].get("train_config"):
        configs["train"] = content["extra"]["train_config"]
    elif content["format"] != "tclkit" and content["config"]:
        configs["official"] = content["config"]
    provenance: dict[str, Any] = {
        "checkpoint_sha256": sha256_from_file(checkpoint),
        "checkpoint_format": content["format"],
        "configs": configs,
        "versions": _versions(),
    }
    if clip is not None:
        is_file = Path(clip).is_file()
        provenance |= {"clip_sha256": sha256_from_file(clip)} if is_file else {"clip": str(clip)}
    return provenance | ({"sources": dict(sources)} if sources else {})


def _versions() -> dict[str, str]:
    packages = ("torch", "open_clip_torch", "onnx", "onnxscript", "onnxruntime", "numpy")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def _description(config: ClipConfig) -> str:
    architecture = _architecture(config)
    return "TCL, open-vocabulary segmentation" + ("" if architecture == "custom" else f" on CLIP {architecture}")


def _architecture(config: ClipConfig) -> str:
    """open_clip's name for these sizes, or "custom"."""
    for name in _PUBLISHED_ARCHITECTURES:
        known = open_clip.get_model_config(name)
        vision, text = known["vision_cfg"], known["text_cfg"]
        wanted = [known["embed_dim"], *(vision[key] for key in ("image_size", "patch_size", "width", "layers"))]
        wanted += [text[key] for key in ("context_length", "vocab_size", "width", "heads", "layers")]
        found = [config.embed_dim, config.image_size, config.patch_size, config.vision_width, config.vision_layers]
        found += [config.context_length, config.vocab_size, config.text_width, config.text_heads, config.text_layers]
        if wanted == found:
            return name
    return "custom"
