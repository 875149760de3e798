"""How the result of one image reads at a terminal."""

from typing import TYPE_CHECKING

from ._console import printer, table

if TYPE_CHECKING:
    from tclkit.runtime import Segmentation

_SMALLEST_SHARE = 0.0005  # reads as 0.1 %


def print_findings(result: "Segmentation") -> None:
    """Print the table of one image: each prompt with its share of the image and its number of regions.

    At a terminal, each prompt shows the colour that it has in the overlay.
    """
    from rich.text import Text

    from tclkit.runtime.palette import label_colours

    console, counts = printer(), result.region_counts()
    rows = table("prompt", "area", "regions", right=("area", "regions"))
    for (name, share), (red, green, blue) in zip(result.areas.items(), label_colours(len(result.areas)), strict=True):
        swatch = ("■ ", f"rgb({red},{green},{blue})") if console.is_terminal else ""
        rows.add_row(Text.assemble(swatch, name), share_text(share), str(counts[name]))
    console.print(rows)


def findings_line(result: "Segmentation") -> str:
    """Say in one line what was found, the largest first: 'red circle 12.3 %, green star 4.0 %'."""
    found = sorted(((share, name) for name, share in result.areas.items() if share >= _SMALLEST_SHARE), reverse=True)
    return ", ".join(f"{name} {share_text(share)}" for share, name in found) or "nothing found"


def share_text(share: float) -> str:
    """Fraction of the image as a percentage; what is there but tiny does not read as nothing."""
    return "<0.1 %" if 0 < share < _SMALLEST_SHARE else f"{share * 100:.1f} %"
