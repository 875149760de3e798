"""`tclkit info`: what is installed here, and where."""

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._console import DebugOption, plain, print_json, printer, size_text, table
from ._settings import JsonOption

if TYPE_CHECKING:
    from tclkit.runtime import Bundle, DeviceIdentity
    from tclkit.runtime.cpu_records import CpuIdentity

_PACKAGES = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "numpy": ("numpy",),
    "opencv": ("opencv-python-headless", "opencv-python", "opencv-contrib-python"),
    "pillow": ("pillow",),
    "tokenizers": ("tokenizers",),
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "cuda-python": ("cuda-python", "cuda-bindings"),
    "torch": ("torch",),
    "open_clip": ("open_clip_torch", "open-clip-torch"),
    "onnx": ("onnx",),
    "onnxscript": ("onnxscript",),
}


def version_text() -> str:
    """What `tclkit --version` prints."""
    return f"tclkit {package_version('tclkit')}"


def package_version(*distributions: str) -> str | None:
    """Version of the first of these distributions that is installed; None when none is. Imports nothing."""
    import importlib.metadata  # costs a tenth of the start-up of every command

    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # noqa: PERF203
            continue
    return None


def info(
    json_output: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show models, backends, versions and the cache."""
    found = gather()
    if json_output:
        print_json(found)
    else:
        _print(found)


def gather() -> dict[str, Any]:
    """Everything `tclkit info` knows, as plain values."""
    return {"models": _models(), "backends": _backends(), "versions": _versions(), "folders": _folders()}


def _models() -> list[dict[str, Any]]:
    from tclkit.runtime import list_bundles

    return [
        {
            "name": bundle.name,
            "folder": str(bundle.folder),
            "size_bytes": bundle.size_bytes,
            "image_sizes": [f"{image.height}x{image.width}" for image in bundle.manifest.images],
            "precisions": sorted({precision for image in bundle.manifest.images for precision in image.files}),
            "for_processors": _for_processors(bundle),
            "engines": _engines(bundle),
            "on_cpu": _on_cpu(bundle),
            "description": bundle.manifest.description,
        }
        for bundle in list_bundles()
    ]


def _for_processors(bundle: "Bundle") -> list[dict[str, Any]]:
    """Graphs that only processors run, and whether they do: not where the float32 graph has changed since."""
    outdated = bundle.manifest.outdated_files
    return [
        {
            "file": graph.file,
            "precision": precision,
            "image_size": f"{image.height}x{image.width}",
            "decoder": graph.decoder,
            "outdated": graph.file in outdated,
        }
        for image in bundle.manifest.images
        for precision, graph in image.processor.items()
    ]


def _engines(bundle: "Bundle") -> list[dict[str, Any]]:
    """Engines beside a bundle, and whether they fit this machine; `why_not` is empty for those that do."""
    from tclkit.runtime import engine_misfit, read_engines

    found = []
    for engine in read_engines(bundle):
        device = _device()  # TensorRT is loaded only where there are engines
        miss = engine_misfit(bundle, engine, device) if not isinstance(device, str) else None
        record = engine.record
        why_not = device if isinstance(device, str) else miss.message if miss is not None else ""
        found.append(
            {
                "file": engine.path.name,
                "graph": record.graph,
                "precision": record.precision,
                "image_size": f"{record.height}x{record.width}",
                "built_by": record.place,
                "max_batch": record.max_batch,
                "max_prompts": record.max_prompts,
                "fits": not why_not,
                "why_not": why_not,
            }
        )
    return found


def _on_cpu(bundle: "Bundle") -> list[dict[str, Any]]:
    """What passed the gate on some processor, and whether it counts here; `why_not` is empty for what does."""
    from tclkit.runtime.cpu_records import cpu_misfit, read_cpu_records

    found = []
    for record in read_cpu_records(bundle):
        cpu = _cpu()  # OpenVINO is loaded only where there are records
        why_not = cpu if isinstance(cpu, str) else cpu_misfit(bundle, record, cpu)
        found.append(
            {
                "precision": record.precision,
                "image_size": f"{record.height}x{record.width}",
                "judged_by": str(record.identity),
                "label_agreement": record.figures["label_agreement"],
                "fits": not why_not,
                "why_not": why_not,
            }
        )
    return found


def _cpu() -> "CpuIdentity | str":
    """This processor as OpenVINO sees it, or why it does not."""
    from tclkit.runtime import BackendError
    from tclkit.runtime.cpu_records import cpu_identity
    from tclkit.runtime.openvino_backend import openvino_core

    try:
        return cpu_identity(openvino_core())
    except BackendError as error:
        return error.message


def _device() -> "DeviceIdentity | str":
    """This machine's device, or why there is none to speak of."""
    from tclkit.runtime import BackendError, current_device

    try:
        return current_device()
    except BackendError as error:
        return error.message


def _backends() -> list[dict[str, Any]]:
    from tclkit.runtime import available_backends

    return [
        {"name": b.name, "available": b.available, "version": b.version, "remedy": b.remedy}
        for b in available_backends()
    ]


def _versions() -> dict[str, str | None]:
    packages = {name: package_version(*distributions) for name, distributions in _PACKAGES.items()}
    system = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
    return {"tclkit": package_version("tclkit"), "python": platform.python_version(), "system": system, **packages}


def _folders() -> dict[str, dict[str, Any]]:
    from tclkit.runtime.files import cache_folder, models_folder

    return {
        name: {"path": str(folder), "size_bytes": _size_bytes(folder)}
        for name, folder in {"models": models_folder(), "cache": cache_folder()}.items()
    }


def _precisions(model: dict[str, Any]) -> list[str]:
    """Lines that say in which precisions a model has graphs, and which are for processors only."""
    own: dict[str, None] = {}
    for graph in model["for_processors"]:
        state = ", outdated" if graph["outdated"] else ""
        own[f"{graph['precision']} for processors ({graph['decoder']}{state})"] = None
    return [", ".join(model["precisions"]), *map(plain, own)]


def _size_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


def _print(found: dict[str, Any]) -> None:
    console = printer()
    models = table("model", "size", "images", "precision", "what it is", right=("size",), title="Models")
    for model in found["models"]:
        sizes, precisions = ", ".join(model["image_sizes"]), "\n".join(_precisions(model))
        what = f"{plain(model['description'])}\n[dim]{plain(model['folder'])}[/dim]"
        models.add_row(plain(model["name"]), size_text(model["size_bytes"]), sizes, precisions, what)
    engines = table("engine", "model", "built by", "images", "prompts", "state", title="Engines")
    for model in found["models"]:
        for engine in model["engines"]:
            state = "fits this machine" if engine["fits"] else plain(engine["why_not"])
            limits = (str(engine["max_batch"]), str(engine["max_prompts"]) if engine["graph"] == "masks" else "-")
            engines.add_row(plain(engine["file"]), plain(model["name"]), plain(engine["built_by"]), *limits, state)
    on_cpu = table("on a processor", "model", "images", "judged by", "agreement", "state", title="Built for processors")
    for model in found["models"]:
        for built in model["on_cpu"]:
            state = "fits this machine" if built["fits"] else plain(built["why_not"])
            figures = (built["image_size"], plain(built["judged_by"]), f"{built['label_agreement']:.4f}")
            on_cpu.add_row(built["precision"], plain(model["name"]), *figures, state)
    backends = table("backend", "version", "state", title="Backends")
    for backend in found["backends"]:
        state = "ready" if backend["available"] else plain(backend["remedy"])
        backends.add_row(backend["name"], backend["version"] or "-", state)
    versions = table("package", "version", title="Versions")
    for name, version in found["versions"].items():
        versions.add_row(name, plain(version or "not installed"))
    folders = table("folder", "size", "path", right=("size",), title="Folders")
    for name, folder in found["folders"].items():
        folders.add_row(name, size_text(folder["size_bytes"]), plain(folder["path"]))
    for part in (
        models,
        *([engines] if engines.rows else []),
        *([on_cpu] if on_cpu.rows else []),
        backends,
        versions,
        folders,
    ):
        console.print(part)
