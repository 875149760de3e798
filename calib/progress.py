"""Progress of long work: a callback, and the one for callers who want none."""


def silent(*where: object) -> None:
    """Take any progress and say nothing."""
