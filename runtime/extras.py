"""How the optional extras are installed, for every message that names one as a remedy."""


def install_command(extra: str, *, upgrade: bool = False) -> str:
    """The pip command that brings an extra: from a checkout, which works today, and by name for when it is published.

    Args:
        extra: its name in pyproject.toml, such as "openvino".
        upgrade: replace older versions of its packages.
    """
    pip = "pip install -U" if upgrade else "pip install"
    return f'{pip} ".[{extra}]" in a checkout of tclkit, or "tclkit[{extra}]" once it is published'
