"""`tclkit demo`: the main job on sample scenes, with the model that ships inside the package."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tclkit.runtime.errors import BundleError
from tclkit.runtime.files import atomic_file

from ._console import DebugOption, say
from ._findings import print_findings
from ._outputs import require_output_folder
from ._settings import DEFAULT_MODEL
from ._sources import OVERLAY_ENDING

if TYPE_CHECKING:
    from tclkit.runtime import Segmenter

_INDEX = "samples.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One sample scene.

    file: name of the picture in the samples folder.
    prompts: what to look for in it.
    """

    file: str
    prompts: tuple[str, ...]


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the scenes and the overlay.")
    ] = Path("tclkit-demo"),
    debug: DebugOption = False,
) -> None:
    """Write sample scenes into a folder and find shapes in one of them: no download, a few seconds."""
    from tclkit.runtime import Segmenter, load_image

    require_output_folder(output)
    samples = read_samples(samples_folder())
    first = samples[0]
    copy_samples(samples, output)
    segmenter = Segmenter.open(DEFAULT_MODEL)
    image, overlay = output / first.file, output / f"{Path(first.file).stem}{OVERLAY_ENDING}"
    result = segmenter(load_image(image), list(first.prompts), pamr=True)
    result.save_overlay(overlay, compare=True)
    say(f"model    {segmenter.bundle.name}: {segmenter.bundle.manifest.description}")
    say(f"image    {image}")
    say(f"prompts  {', '.join(first.prompts)}\n")
    print_findings(result)
    _what_next(segmenter, samples, output, overlay)


def samples_folder() -> Path:
    """Where the sample scenes lie inside the package."""
    import tclkit.runtime

    return Path(tclkit.runtime.__file__).parent / "samples"


def read_samples(folder: Path) -> list[Sample]:
    """Scenes that samples.json lists, the one to segment first.

    Raises:
        BundleError: the list is missing or damaged, that is, the installation is.
    """
    try:
        listed = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["scenes"]
        samples = [Sample(file=scene["file"], prompts=tuple(scene["prompts"])) for scene in listed]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{folder / _INDEX} is missing or damaged; install tclkit again") from error
    if not samples:
        raise BundleError(f"{folder / _INDEX} lists no scenes; install tclkit again")
    return samples


def copy_samples(samples: list[Sample], target: Path) -> None:
    """Copy the scenes into a folder; what is there under other names stays."""
    for sample in samples:
        with atomic_file(target / sample.file) as temporary:
            temporary.write_bytes((samples_folder() / sample.file).read_bytes())


def _what_next(segmenter: "Segmenter", samples: list[Sample], folder: Path, overlay: Path) -> None:
    say(f"overlay  {overlay.resolve()}\n")
    say("Next:")
    if len(samples) > 1:
        other = samples[1]
        say(f"  {_command('tclkit', 'segment', str(folder / other.file), *other.prompts, '--pamr')}")
    say(f"  {_command('tclkit', 'segment', str(folder), *samples[0].prompts[:1])}    the whole folder")
    vocabulary = segmenter.bundle.manifest.vocabulary
    if vocabulary is not None:
        say(vocabulary.note)
    say("For photographs:")
    say("  tclkit pull tcl-vit-b-16")
    say("  tclkit segment photo.jpg 'a dog' grass --model tcl-vit-b-16")


def _command(*words: str) -> str:
    return shlex.join(words)
