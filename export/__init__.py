"""From a checkpoint to a bundle, and from the web to a checkpoint.

Names are imported when they are asked for: exporting needs torch, and most commands do not.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bundle_writer import ExportProgress, export_bundle
    from .graph_rules import check_graph
    from .wrapper import ImageGraph, MasksGraph, TextGraph

__all__ = ["ExportProgress", "ImageGraph", "MasksGraph", "TextGraph", "check_graph", "export_bundle"]

_HOMES = {
    "ExportProgress": "bundle_writer",
    "ImageGraph": "wrapper",
    "MasksGraph": "wrapper",
    "TextGraph": "wrapper",
    "check_graph": "graph_rules",
    "export_bundle": "bundle_writer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
