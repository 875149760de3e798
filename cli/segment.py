"""`tclkit segment`: find what the prompts name, in one image or many."""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tclkit.runtime.errors import InputError

from ._console import EXIT_FAILED, DebugOption, error_text, fail, print_json, say
from ._findings import findings_line, print_findings
from ._outputs import plan_overlays
from ._progress import tracked
from ._settings import (
    DEFAULT_MODEL,
    BackendName,
    BackendOption,
    FitName,
    FlipOption,
    JsonOption,
    ModelOption,
    PrecisionName,
    PrecisionOption,
    ScalesOption,
    fraction,
    refuse_empty_contrast,
)
from ._sources import Source, find_sources, stands_for_many

if TYPE_CHECKING:
    from tclkit.runtime import PromptSet, Segmentation, Segmenter


@dataclass(kw_only=True, slots=True)
class Outcome:
    """What became of the images.

    images: one dict an image, as they are printed with --json.
    failed: images that could not be used, with the reason.
    """

    images: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, str]] = field(default_factory=list)


def segment(
    image: Annotated[
        str, typer.Argument(metavar="IMAGE", help="A file, a folder, a quoted glob, or - for standard input.")
    ],
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT", help="What to look for: 'red circle' 'a green star'.", show_default=False),
    ] = None,
    bank: Annotated[
        Path | None, typer.Option("--bank", metavar="FILE", help="Prompts from `tclkit embed` instead of PROMPT...")
    ] = None,
    model: ModelOption = DEFAULT_MODEL,
    backend: BackendOption = BackendName.AUTO,
    precision: PrecisionOption = PrecisionName.AUTO,
    exact: Annotated[
        bool, typer.Option("--exact", help="Compute in float32, whatever was built; the same as --precision fp32.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help="Where the overlay goes: a file for one image, a folder for several. Default: NAME-overlay.png here, "
            "or the folder tclkit-overlays; nothing with --json.",
        ),
    ] = None,
    json_output: JsonOption = False,
    threshold: Annotated[
        float | None,
        typer.Option(
            callback=fraction,
            metavar="0..1",
            help="A pixel is background where no prompt's mask is above this. Default: the model's.",
            show_default=False,
        ),
    ] = None,
    background: Annotated[
        bool, typer.Option("--background/--no-background", help="Whether a pixel may belong to no prompt.")
    ] = True,
    pamr: Annotated[bool, typer.Option("--pamr", help="Refine masks along the image's edges (slower).")] = False,
    kp: Annotated[
        float | None,
        typer.Option(
            callback=fraction,
            metavar="0..1",
            help="Share of CLIP's own masks in the mix. Default: the model's.",
            show_default=False,
        ),
    ] = None,
    fit: Annotated[
        FitName,
        typer.Option(
            metavar="WAY",
            help="whole: resized to fit inside the model's size; stretch: to that size; slide: overlapping windows.",
        ),
    ] = FitName.WHOLE,
    flip: FlipOption = False,
    scales: ScalesOption = False,
    contrast: Annotated[
        list[str] | None,
        typer.Option(
            "--contrast", metavar="PROMPT", help="What else may be there; its pixels count as background. Repeatable."
        ),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Colour the pixels of IMAGE that each PROMPT names."""
    _check_usage(prompts, bank, threshold, background)
    refuse_empty_contrast(contrast)
    precision = _exact_or(precision) if exact else precision
    sources, many = find_sources(image), stands_for_many(image)
    wanted = output is not None or not json_output
    overlays = plan_overlays(sources, output, many=many) if wanted else [None] * len(sources)
    settings: dict[str, Any] = {
        "threshold": threshold,
        "background": background,
        "kp_w": kp,
        "pamr": pamr,
        "fit": fit.value,
        "contrast": contrast,
    }
    segmenter, prompt_set = _opened(model, backend, precision, prompts or [], bank, flip=flip, scales=scales)
    segmenter.stream([], prompt_set, **settings)  # checks the settings: no image is to blame for them
    outcome = Outcome()
    for source, overlay in tracked(list(zip(sources, overlays, strict=True)), "segmenting", shown=many):
        result = _segment_one(segmenter, prompt_set, source, overlay, settings, outcome)
        if result is not None and not json_output:
            _print_result(result, source, many=many)
    if json_output:
        print_json(_document(segmenter, prompt_set, outcome))
    _close(outcome, many=many)


def _check_usage(prompts: list[str] | None, bank: Path | None, threshold: float | None, background: bool) -> None:
    if not prompts and bank is None:
        raise typer.BadParameter("there is nothing to look for: give at least one PROMPT, or --bank FILE")
    if prompts and bank is not None:
        raise typer.BadParameter("PROMPT and --bank exclude each other")
    if threshold is not None and not background:
        raise typer.BadParameter("--threshold and --no-background exclude each other")


def _exact_or(precision: PrecisionName) -> PrecisionName:
    """float32, where no other precision is asked for beside --exact."""
    if precision not in (PrecisionName.AUTO, PrecisionName.FP32):
        raise typer.BadParameter(f"--exact is float32, --precision asks for {precision.value}")
    return PrecisionName.FP32


def _opened(
    model: str,
    backend: BackendName,
    precision: PrecisionName,
    prompts: Sequence[str],
    bank: Path | None,
    **ways: bool,
) -> "tuple[Segmenter, PromptSet]":
    from tclkit.runtime import Segmenter, load_prompt_bank

    segmenter = Segmenter.open(model, backend=backend.value, precision=precision.value, **ways)
    if bank is None:
        return segmenter, segmenter.prompts(prompts)
    return segmenter, load_prompt_bank(bank, text_encoder_hash=segmenter.bundle.text_encoder_hash)


def _segment_one(
    segmenter: "Segmenter",
    prompts: "PromptSet",
    source: Source,
    overlay: Path | None,
    settings: dict[str, Any],
    outcome: Outcome,
) -> "Segmentation | None":
    """Segment one image, write its overlay and note the outcome; None when the image cannot be used.

    What is wrong with an image is that image's affair. What is wrong with the model or the disk ends the run.
    """
    from tclkit.runtime import load_image

    try:
        result = segmenter(load_image(source.read(), name=source.name), prompts, **settings)
    except (InputError, MemoryError) as error:
        reason = error_text(error)
        reason = reason if reason.startswith(source.name) else f"{source.name}: {reason}"
        fail(reason)
        outcome.failed.append({"file": source.name, "error": reason})
        return None
    if overlay is not None:
        result.save_overlay(overlay)
    outcome.images.append(_image_dict(result, source, overlay))
    return result


def _image_dict(result: "Segmentation", source: Source, overlay: Path | None) -> dict[str, Any]:
    """One image as --json prints it; what is the same for all images stands outside."""
    described = {key: value for key, value in result.to_dict().items() if key not in ("model", "backend", "counters")}
    return {"file": source.name, "overlay": None if overlay is None else str(overlay), **described}


def _print_result(result: "Segmentation", source: Source, *, many: bool) -> None:
    """Show one result on stdout: a table for the only image, one line for each of many."""
    if many:
        typer.echo(f"{source.name}: {findings_line(result)}")
    else:
        print_findings(result)


def _document(segmenter: "Segmenter", prompts: "PromptSet", outcome: Outcome) -> dict[str, Any]:
    return {
        "model": segmenter.model,
        "backend": segmenter.backend.name,
        "precision": segmenter.backend.precision,
        "prompts": list(prompts.names),
        "images": outcome.images,
        "failed": outcome.failed,
        "stats": dataclasses.asdict(segmenter.stats),
    }


def _close(outcome: Outcome, *, many: bool) -> None:
    written = [image["overlay"] for image in outcome.images if image["overlay"] is not None]
    if written and many:
        say(f"{len(written)} overlay(s) in {os.path.commonpath([Path(path).parent for path in written])}")
    elif written:
        say(f"overlay: {written[0]}")
    if outcome.failed:
        if many:
            total = len(outcome.failed) + len(outcome.images)
            fail(f"{len(outcome.failed)} of {total} images could not be used: {_names(outcome.failed)}")
        raise typer.Exit(EXIT_FAILED)


def _names(failed: Sequence[dict[str, str]]) -> str:
    shown = [entry["file"] for entry in failed[:5]]
    return ", ".join(shown) + (f" and {len(failed) - len(shown)} more" if len(failed) > len(shown) else "")
