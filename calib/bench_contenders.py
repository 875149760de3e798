"""Who takes part in a benchmark: backends in precisions, other implementations beside them; and on which image size."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tclkit.runtime.backends import Backend, available_backends, choose_backend, image_file
from tclkit.runtime.bundle import Bundle
from tclkit.runtime.errors import InputError
from tclkit.runtime.manifest import RUN_PRECISIONS

from .evaluation import Contender

Size = tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Entrant:
    """One contender that is to be measured.

    name: its row.
    backend, precision: what it is.
    open: called as open(bundle, threads=...); can be pickled.
    """

    name: str
    backend: str
    precision: str
    open: Callable[..., Backend]


def choose_entrants(
    bundle: Bundle, backends: Sequence[str], precisions: Sequence[str], others: Sequence[Contender]
) -> tuple[Entrant, ...]:
    """Every backend in every precision, then the other implementations.

    Args:
        bundle: the model.
        backends: names; empty takes those that can be used here.
        precisions: names; empty takes those the bundle has graphs for, and bf16 with a backend that computes in it.
        others: named implementations that run in fp32.

    Raises:
        InputError: none is left.
    """
    named = backends or [status.name for status in available_backends() if status.available]
    entrants = []
    for backend in named:
        for precision in precisions or _precisions_of(backend, bundle):
            opener = functools.partial(open_named, backend=backend, precision=precision)
            entrants.append(Entrant(name=f"{backend} {precision}", backend=backend, precision=precision, open=opener))
    entrants += [
        Entrant(name=f"{other.name} fp32", backend=other.name, precision="fp32", open=other.open) for other in others
    ]
    if not entrants:
        raise InputError("no backend is installed. Install one: pip install onnxruntime")
    return tuple(entrants)


def _precisions_of(backend: str, bundle: Bundle) -> list[str]:
    """Precisions that a backend has a graph for in every image size."""
    sizes = [entry.size for entry in bundle.manifest.images]
    return [p for p in RUN_PRECISIONS if all(image_file(bundle, backend, p, size) is not None for size in sizes)]


def open_named(bundle: Bundle, threads: int | None = None, *, backend: str, precision: str) -> Backend:
    """Open a backend by name; see `choose_backend`."""
    return choose_backend(backend, bundle, precision=precision, threads=threads)


def bundle_of_size(bundle: Bundle, size: Size) -> Bundle:
    """The bundle as if it had this image size alone, so that every image takes it.

    Raises:
        InputError: it has no such size; names those it has.
    """
    images = [image for image in bundle.manifest.images if (image.height, image.width) == size]
    if not images:
        have = ", ".join(f"{image.height}x{image.width}" for image in bundle.manifest.images)
        wanted = f"{size[0]}x{size[1]}"
        raise InputError(
            f"{bundle.name} has no image graph for {wanted}, only for {have}. Take one of these, or export more: "
            f"tclkit export CHECKPOINT --size {wanted} -o FOLDER"
        )
    manifest = dataclasses.replace(bundle.manifest, images=tuple(images))
    return dataclasses.replace(bundle, manifest=manifest)
