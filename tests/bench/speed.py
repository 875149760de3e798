"""How fast a model of ViT-B/16's size is, against the reference in torch: tables in Markdown, charts, and all samples.

The weights are random: speed does not depend on them, accuracy does, so agreement is stated against torch with the same
weights. Each part measures its own rows in one interleaved run, through the library behind `tclkit bench`.

    python tests/bench/speed.py --folder /tmp/speed --parts model      # writes the bundle: 448, 672 and 896 pixels
    tclkit build-engine --model /tmp/speed/bundle ...                  # graphs and engines in other precisions
    python tests/bench/speed.py --folder /tmp/speed --parts against text growth

Precisions that were not built are rows that say so. Writing the model with 896 pixels takes over 10 GB and minutes;
`--sides 448` leaves the larger ones out, and growth then has no sizes to compare.
"""

import argparse
import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from tclkit.calib import BenchResult, BenchSettings, Contender, draw_chart, run_bench
from tclkit.calib.bench_contenders import bundle_of_size, choose_entrants
from tclkit.calib.bench_inputs import open_picture, prompt_texts
from tclkit.calib.bench_tables import TextTable, lines_from_result, tables_from_result
from tclkit.runtime import Segmenter, open_bundle
from tclkit.runtime.bundle import Bundle
from tclkit.runtime.errors import TclkitError
from tclkit.runtime.prompts import expand_prompt
from tclkit.runtime.tokenizer import Tokenizer

PROMPTS, BATCHES = (20, 1, 150, 1000), (1, 2, 4, 8)
_TEXTS_PER_RUN = 64


def write_model(folder: Path, sizes: Sequence[tuple[int, int]]) -> Path:
    """Write a randomly initialised TCL of ViT-B/16's layout, text tower included, and its bundle."""
    import torch

    from tclkit.export import export_bundle
    from tclkit.tcl import TCL, ClipConfig, TCLConfig, save_checkpoint

    torch.manual_seed(0)
    clip = ClipConfig(
        embed_dim=512,
        image_size=224,
        patch_size=16,
        vision_width=768,
        vision_layers=12,
        text_width=512,
        text_heads=8,
        text_layers=12,
        quick_gelu=True,
    )
    model = TCL(TCLConfig(clip=clip))
    model.grounder.open_gates(0.5)  # shut, the decoder would have no say in what is compared
    save_checkpoint(folder / "tcl.pt", model)
    return export_bundle(folder / "tcl.pt", folder / "bundle", sizes=list(sizes), name="vit-b-random")


def torch_row(folder: Path) -> Contender:
    """Torch with the bundle's own weights where its checkpoint is there, else with random ones."""
    from tclkit.tcl import random_torch_contender, torch_contender

    checkpoint = folder / "tcl.pt"
    return torch_contender(checkpoint) if checkpoint.exists() else random_torch_contender()


def label_agreement(bundle: Bundle, settings: BenchSettings) -> TextTable:
    """Share of the sample frame's pixels that each contender labels as torch does, without a background."""
    entrants = choose_entrants(bundle, settings.backends, settings.precisions, settings.contenders)
    picture, labels = open_picture(settings.image).image_hwc, {}
    for entrant in entrants:
        # Who did not run, and why, is in a table already.
        with (
            contextlib.suppress(TclkitError),
            Segmenter(bundle, entrant.open(bundle, threads=settings.threads)) as segmenter,
        ):
            prompts = segmenter.prompts(prompt_texts(20, bundle.manifest.vocabulary))
            labels[entrant.name] = segmenter(picture, prompts, background=False).label_map
    reference = labels["torch fp32"]
    rows = tuple((name, f"{(found == reference).mean():.5f}") for name, found in labels.items())
    return TextTable(
        title="Pixels labelled as torch fp32 labels them", columns=("contender", "share"), right=("share",), rows=rows
    )


def shares(result: BenchResult) -> TextTable:
    """What new prompts, and all that is not a graph, cost of a pass."""
    rows = []
    for row in result.base_rows:
        assert row.new_prompts is not None
        stages = {name: spread.median_ms for name, spread in row.stages.items()}
        around = stages["preprocess"] + stages["post-process"]
        full = stages["preprocess"] + row.graphs.median_ms + stages["post-process"]
        rows.append(
            (
                row.contender,
                f"{full:.1f}",
                f"{row.new_prompts.median_ms:.2f}",
                f"{row.new_prompts.median_ms / full * 100:.2f} %",
                f"{around:.2f}",
                f"{around / full * 100:.2f} %",
            )
        )
    right = ("full pass", "new prompts", "of it", "pre and post", "share")
    title = (
        "A full pass from the decoded image to its labels, median ms; new prompts on the same image; what is no graph"
    )
    return TextTable(title=title, columns=("contender", *right), right=right, rows=tuple(rows))


def text_lengths(bundle: Bundle, settings: BenchSettings) -> TextTable:
    """20 prompts with all templates through the text encoder: as tclkit does it, and padded to the whole context."""
    entrants = choose_entrants(bundle, settings.backends, ("fp32",), settings.contenders)
    names = prompt_texts(20, bundle.manifest.vocabulary)
    tokenizer = Tokenizer.from_bundle(bundle)
    rows_ML = [row for name in names for row in tokenizer.encode(expand_prompt(name, bundle.manifest.templates))]
    padded_ML = np.zeros((len(rows_ML), bundle.manifest.model.context_length), np.int64)
    for target, row in zip(padded_ML, rows_ML, strict=True):
        target[: len(row)] = row
    table = []
    for entrant in entrants:
        try:
            with Segmenter(bundle, entrant.open(bundle, threads=settings.threads)) as segmenter:
                took = _interleaved_texts(segmenter, names, padded_ML, settings.rounds)
        except TclkitError:
            continue
        cut, whole = (float(np.median(samples)) for samples in took)
        table.append((entrant.name, f"{cut:.0f}", f"{whole:.0f}", f"{whole / cut:.2f}"))
    right = ("cut", "padded", "ratio")
    title = f"{len(names)} prompts x {len(bundle.manifest.templates)} templates without a cache, median ms"
    return TextTable(title=title, columns=("contender", *right), right=right, rows=tuple(table))


def _interleaved_texts(
    segmenter: Segmenter, names: Sequence[str], padded_ML: np.ndarray, rounds: int
) -> tuple[list[float], list[float]]:
    """Milliseconds of either way, in turn; the first run of both does not count."""
    cut: list[float] = []
    whole: list[float] = []
    for number in range(rounds + 1):
        asked = [names[0] + " " * number, *names[1:]]  # a list that is not remembered yet
        start = time.perf_counter()
        segmenter.prompts(asked)
        middle = time.perf_counter()
        for first in range(0, len(padded_ML), _TEXTS_PER_RUN):
            segmenter.backend.encode_text(padded_ML[first : first + _TEXTS_PER_RUN])
        end = time.perf_counter()
        cut.append((middle - start) * 1000)
        whole.append((end - middle) * 1000)
    return cut[1:], whole[1:]


def measured(part: str, bundle: Bundle, settings: BenchSettings) -> Iterator[str]:
    """Markdown of one part, as it comes."""
    if part == "text":
        yield text_lengths(bundle_of_size(bundle, settings.sizes[0]), settings).to_markdown()
        return
    if part == "growth":
        settings = replace(settings, prompts=PROMPTS, sizes=(), batches=BATCHES, memory=False)
    result = run_bench(settings, progress=_show)
    folder = bundle.folder.parent
    Image.fromarray(draw_chart(result)).save(folder / f"{part}.png")
    (folder / f"{part}.json").write_text(json.dumps(result.to_dict(), indent=1) + "\n", encoding="utf-8")
    for table in tables_from_result(result):
        yield table.to_markdown()
    yield "\n".join(f"- {line}" for line in (*lines_from_result(result), *result.notes)) + "\n"
    if part == "against":
        yield shares(result).to_markdown()
        if (folder / "tcl.pt").exists() and settings.contenders:  # torch with other weights labels something else
            yield label_agreement(bundle_of_size(bundle, settings.sizes[0]), settings).to_markdown()


def _show(what: str, done: int, total: int) -> None:
    print(f"<!-- {what} {done}/{total} -->", flush=True)


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(",")) if text else ()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="holds tcl.pt and bundle, and gets charts and JSON")
    parser.add_argument("--parts", nargs="+", choices=["model", "against", "text", "growth"], required=True)
    parser.add_argument("--sides", type=int, nargs="+", default=[448, 672, 896], help="of the model that is written")
    parser.add_argument("--backends", type=_names, default=(), help="NAME,NAME...; default: all that can be used")
    parser.add_argument("--precisions", type=_names, default=(), help="NAME,NAME...; default: all that there are")
    parser.add_argument("--without-torch", action="store_true", help="no row for the reference")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=1)
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    parts: list[str] = list(arguments.parts)
    if "model" in parts:
        parts.remove("model")
        print(write_model(folder, [(side, side) for side in arguments.sides]))
    if not parts:
        return
    bundle = open_bundle(folder / "bundle")
    settings = BenchSettings(
        model=str(bundle.folder),
        backends=arguments.backends,
        precisions=arguments.precisions,
        contenders=() if arguments.without_torch else (torch_row(folder),),
        prompts=PROMPTS[:1],
        sizes=((bundle.manifest.images[0].height, bundle.manifest.images[0].width),),
        rounds=arguments.rounds,
        warm_up=arguments.warm_up,
    )
    for part in parts:
        print(f"## {part}\n", flush=True)
        for piece in measured(part, bundle, settings):
            print(piece, flush=True)


if __name__ == "__main__":
    main()
