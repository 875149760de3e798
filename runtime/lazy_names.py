"""Names of a package that are imported when they are asked for, so that importing the package costs next to nothing."""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy_names(
    package: str, homes: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make the functions by which a package finds and lists its public names (PEP 562).

    Used as `__getattr__, __dir__ = lazy_names(__name__, _HOMES)`.

    Args:
        package: its full name.
        homes: for each module in it the names that it gives the package.

    Returns:
        `__getattr__` and `__dir__`.
    """
    home_of = {name: module for module, names in homes.items() for name in names}

    def get(name: str) -> Any:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f".{home_of[name]}", package), name)
        setattr(sys.modules[package], name, value)  # the next access costs nothing
        return value

    return get, lambda: sorted(home_of)
