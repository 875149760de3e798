"""The processor as this process may use it."""

import os


def usable_cpus() -> int:
    """CPUs this process may use; runtimes would count the machine's, and fail to pin threads in a container."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
