"""Graphs that only processors run: a bundle's float32 graph with its decoder in a form that takes fewer products.

GPUs have kernels for the convolutions of the direct form, a processor gains by having fewer of them (see decoder.py).
So a bundle keeps the direct form for every device and holds, beside it, what processors run in its place. bundle.json
says from which float32 graph that was made; it is never run beside another.
"""

import json
import logging
from pathlib import Path
from typing import Any

from tclkit.runtime.bundle import MANIFEST_NAME, Bundle, open_bundle, write_manifest
from tclkit.runtime.cpu_records import outdated_graphs
from tclkit.runtime.errors import InputError
from tclkit.runtime.files import atomic_file
from tclkit.runtime.manifest import ImageEntry

from .decoder import DecoderForm
from .precision import PreparedGraph

PROCESSOR_FORM: DecoderForm = "winograd4"
"""What processors run where nobody says otherwise: the fewest products."""

Size = tuple[int, int]
_log = logging.getLogger(__name__)


def processor_form(bundle: Bundle, wanted: DecoderForm | None) -> DecoderForm | None:
    """Form of the decoder in the graph that processors are to run.

    Args:
        bundle: whose graph it is.
        wanted: what the user named; None: nothing.

    Returns:
        None where processors run the graph of every device: "direct" was named, or the bundle was exported in another
        form already.

    Raises:
        InputError: a form was named, and the bundle was exported in another one than that and "direct".
    """
    exported = bundle.manifest.provenance.get("decoder", "direct")
    if exported == "direct":
        return None if wanted == "direct" else wanted or PROCESSOR_FORM
    if wanted is not None and wanted != exported:
        raise InputError(
            f"{bundle.name} was exported with --decoder {exported}, and only the direct form can be rewritten. Leave "
            "--decoder out, or export it anew: tclkit export CHECKPOINT -o FOLDER"
        )
    return None


def install_graph(folder: Path, entry: ImageEntry, graph: PreparedGraph) -> str:
    """Put a graph into a staged bundle and list it, for every device or, if its decoder was rewritten, for processors.

    Returns:
        The file's name.
    """
    precision, form = graph.config.precision, graph.config.decoder
    if form is not None:
        remove_processor_graph(folder, entry.size, precision)
    parts = [Path(entry.files["fp32"]).stem, *(["cpu"] if form else []), *([precision] if precision != "fp32" else [])]
    file = ".".join([*parts, "onnx"])
    with atomic_file(folder / file) as temporary:  # renamed over a link: the bundle in use keeps its own file
        temporary.write_bytes(graph.model.SerializeToString(deterministic=True))
    raw = read_raw_manifest(folder)
    image = _image(raw, entry.size)
    if form is None:
        image["files"][precision] = file
    else:
        source = raw["files"][entry.files["fp32"]]["sha256"]
        made = {"file": file, "decoder": form, "source_sha256": source}
        image["processor"] = image.get("processor", {}) | {precision: made}
    write_manifest(folder, raw)
    return file


def remove_processor_graph(folder: Path, size: Size, precision: str) -> str | None:
    """Take a graph for processors out of a staged bundle, with what the gate said of it.

    Returns:
        The file's name; None where there was none.
    """
    raw = read_raw_manifest(folder)
    image = _image(raw, size)
    made = image.get("processor", {}).pop(precision, None)
    if made is None:
        return None
    if not image["processor"]:
        del image["processor"]
    file = str(made["file"])
    (folder / file).unlink()
    checks = raw["checks"]
    checks.get(precision, {}).pop(file, None)
    if checks.get(precision) == {}:
        del checks[precision]
    write_manifest(folder, raw)
    return file


def remove_outdated_graphs(folder: Path) -> list[str]:
    """Take out of a staged bundle what was made from another float32 graph than it has, and say so; returns names."""
    bundle = open_bundle(folder, verify=False)
    outdated = outdated_graphs(bundle)
    for entry in bundle.manifest.images:
        for precision, graph in entry.processor.items():
            if graph.file in outdated:
                _log.warning("removed: %s", outdated[graph.file])
                remove_processor_graph(folder, entry.size, precision)
    return list(outdated)


def read_raw_manifest(folder: Path) -> dict[str, Any]:
    """bundle.json of a staged bundle, to be changed and written again."""
    raw: dict[str, Any] = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    return raw


def _image(raw: dict[str, Any], size: Size) -> dict[str, Any]:
    return next(image for image in raw["images"] if (image["height"], image["width"]) == size)
