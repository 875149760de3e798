"""Peak memory of one contender, measured in a process of its own: a shared one holds what the others left."""

import multiprocessing
import signal
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from tclkit.runtime.backends import Backend
from tclkit.runtime.bundle import open_bundle
from tclkit.runtime.errors import BackendError, TclkitError
from tclkit.runtime.segmenter import Segmenter

from .bench_contenders import Size, bundle_of_size
from .bench_inputs import open_picture
from .bench_machine import peak_memory_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryJob:
    """What the process does; can be pickled.

    folder: of the bundle, whose files were verified.
    size: (H, W) of the image graph.
    open: called as open(bundle, threads=...).
    threads: CPU threads; None for the backend's own choice.
    image: path of the picture; None for the sample scenes.
    prompts: to embed, without a cache, and to look for.
    """

    folder: Path
    size: Size
    open: Callable[..., Backend]
    threads: int | None
    image: Path | None
    prompts: tuple[str, ...]


def measure_peak_memory(job: MemoryJob) -> int | None:
    """Most bytes that a process held which opens a model, embeds the prompts and segments one picture twice.

    Python and its libraries count too. None where the system does not say.

    Raises:
        TclkitError: the process ended before its work.
    """
    context = multiprocessing.get_context("spawn")  # a fork would begin with all that this process holds
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(job, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        found: int | str | None = ours.recv()
    except EOFError:
        process.join()
        raise TclkitError(f"its process ended with exit code {process.exitcode}; memory may have run out") from None
    finally:
        process.terminate()
        process.join()
        ours.close()
    if isinstance(found, str):
        raise BackendError(found)
    return found


def _measure(job: MemoryJob, connection: Connection) -> None:
    """Body of the process; Ctrl-C is the parent's affair."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        bundle = bundle_of_size(open_bundle(job.folder, verify=False), job.size)
        with Segmenter(bundle, job.open(bundle, threads=job.threads)) as segmenter:
            prompts = segmenter.prompts(job.prompts)
            picture = open_picture(job.image)
            for _ in range(2):  # some libraries take more in the second run
                segmenter(picture.image_hwc, prompts).overlay()
            connection.send(peak_memory_bytes())
    except (TclkitError, OSError, MemoryError) as error:
        connection.send(str(error) or type(error).__name__)
