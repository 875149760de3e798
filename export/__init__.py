"""From a checkpoint to a bundle, and from the web to a checkpoint.

Names are imported when they are asked for: exporting needs torch, and most commands do not.
"""

from typing import TYPE_CHECKING

from tclkit.runtime.lazy_names import lazy_names

if TYPE_CHECKING:
    from .bundle_writer import ExportProgress, export_bundle
    from .graph_rules import check_graph
    from .wrapper import ImageGraph, MasksGraph, TextGraph

__all__ = ["ExportProgress", "ImageGraph", "MasksGraph", "TextGraph", "check_graph", "export_bundle"]

_HOMES = {
    "bundle_writer": ("ExportProgress", "export_bundle"),
    "wrapper": ("ImageGraph", "MasksGraph", "TextGraph"),
    "graph_rules": ("check_graph",),
}
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
