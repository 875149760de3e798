"""How the optional extras are installed, for every message that names one as a remedy."""


def install_command(extra: str) -> str:
    """The pip command that brings an extra: from a checkout, which works today, and by name for when it is published.

    Args:
        extra: its name in pyproject.toml, such as "openvino".
    """
    return f'pip install ".[{extra}]" in a checkout of tclkit, or "tclkit[{extra}]" once it is published'
