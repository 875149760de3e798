"""The synthetic world on disk: image-text shards to train from, and labelled scenes to judge by. Needs no torch.

Shards are laid out as img2dataset writes webdataset: 00000.tar holds 000000000.jpg, .txt and .json, and so on. What was
written by an interrupted run is kept, since every shard appears whole.
"""

import dataclasses
import io
import json
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from tclkit.calib.benchmarks import BACKGROUND_NAME
from tclkit.calib.label_files import write_label_map
from tclkit.runtime.errors import InputError
from tclkit.runtime.files import atomic_file, atomic_folder

from .world import EVALUATION_SEED, PALETTE, Palette, Scene, WorldConfig, scene

ShardProgress = Callable[[int, int], None]
"""Called as progress(scenes that stand, scenes in all)."""

WORLD_FILE: Final = "world.json"
_PER_SHARD_LIMIT: Final = 10_000  # four digits of a sample's name
_SHARDS_LIMIT: Final = 100_000  # five
_FORMATS: Final[dict[str, dict[str, Any]]] = {
    "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},  # edges keep their colours
    "png": {"format": "PNG"},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class WorldFiles:
    """What a call left behind.

    folder: where it lies.
    scenes: how many there are in all.
    written, kept: files (shards, or labelled scenes) made by this call, and those that stood already.
    """

    folder: Path
    scenes: int
    written: int
    kept: int


def write_world_shards(
    folder: Path,
    world: WorldConfig,
    *,
    scenes: int,
    per_shard: int = 1000,
    first: int = 0,
    palette: Palette = PALETTE,
    image_format: str = "jpg",
    progress: ShardProgress | None = None,
) -> WorldFiles:
    """Write scenes as shards of image-text pairs; the same call goes on where an earlier one was cut off.

    Train from them with the source "FOLDER/*.tar".

    Args:
        folder: gets the shards and world.json, which says what they were drawn with.
        world: what scenes look like; its seed is not that of the evaluation.
        scenes: how many.
        per_shard: pairs of a shard, 1 to 10,000; the last shard has what is left.
        first: number of the first scene.
        palette: the objects' colours, and so the captions' words.
        image_format: "jpg" or "png".
        progress: called after every shard.

    Returns:
        Where they are, and how many shards were written or kept.

    Raises:
        InputError: a number is out of range, the seed is that of the evaluation, or the folder holds shards that were
            made otherwise.
    """
    _check_count("scenes", scenes, _PER_SHARD_LIMIT * _SHARDS_LIMIT)
    _check_count("per_shard", per_shard, _PER_SHARD_LIMIT)
    shards = -(-scenes // per_shard)
    if shards > _SHARDS_LIMIT:
        raise InputError(f"{scenes} scenes make {shards:,} shards of {per_shard}; raise per_shard")
    if first < 0:
        raise InputError(f"first is {first}; scenes are counted from 0")
    if image_format not in _FORMATS:
        raise InputError(f"image_format is {image_format!r}; choose {' or '.join(_FORMATS)}")
    if world.seed == EVALUATION_SEED:
        raise InputError(f"seed {world.seed} is that of the evaluation's scenes, which nothing may learn from")
    scene(world, first, palette=palette)  # says now what is wrong with world and palette
    settings = {"scenes": scenes, "per_shard": per_shard, "first": first, "image_format": image_format}
    _begin(folder, _description(world, palette, **settings))
    written = 0
    for shard in range(shards):
        path, start = folder / f"{shard:05d}.tar", shard * per_shard
        stop = min(start + per_shard, scenes)
        if not path.exists():
            with atomic_file(path) as temporary, tarfile.open(temporary, "w") as archive:
                for number in range(start, stop):
                    index = first + number
                    key = f"{shard:05d}{number - start:04d}"
                    drawn = scene(world, index, palette=palette)
                    for suffix, content in _members(drawn, key, index, palette, image_format).items():
                        _add(archive, f"{key}.{suffix}", content)
            written += 1
        if progress:
            progress(stop, scenes)
    return WorldFiles(folder=folder, scenes=scenes, written=written, kept=shards - written)


def write_labelled_scenes(
    folder: Path,
    world: WorldConfig,
    *,
    scenes: int,
    first: int = 0,
    palette: Palette = PALETTE,
    progress: ShardProgress | None = None,
) -> WorldFiles:
    """Write scenes with exact label maps, for `tclkit eval --benchmark folder --data FOLDER`.

    The folder appears whole; one that the same call has written is kept.

    Args:
        folder: gets images/, labels/ and names.txt, whose first line is the background, and world.json.
        world: what scenes look like; its seed is replaced by that of the evaluation, from which no shard is drawn.
        scenes: how many.
        first: number of the first scene.
        palette: the objects' colours, and so the classes.
        progress: called after every scene.

    Returns:
        Where they are, and how many scenes were written or kept.

    Raises:
        InputError: a number is out of range, or the folder holds something else.
    """
    _check_count("scenes", scenes, _PER_SHARD_LIMIT * _SHARDS_LIMIT)
    if first < 0:
        raise InputError(f"first is {first}; scenes are counted from 0")
    world = replace(world, seed=EVALUATION_SEED)
    scene(world, first, palette=palette)
    description = _description(world, palette, scenes=scenes, first=first)
    if folder.exists() and any(folder.iterdir()):
        _require_same(folder, description)
        return WorldFiles(folder=folder, scenes=scenes, written=0, kept=scenes)
    with atomic_folder(folder) as temporary:
        images, labels = temporary / "images", temporary / "labels"
        images.mkdir()
        labels.mkdir()
        for number in range(scenes):
            drawn = scene(world, first + number, palette=palette)
            Image.fromarray(drawn.image).save(images / f"{number:09d}.png", "PNG")
            write_label_map(labels / f"{number:09d}.png", (drawn.label_map + 1).astype(np.uint8))
            if progress:
                progress(number + 1, scenes)
        names = [BACKGROUND_NAME, *palette.names]
        (temporary / "names.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
        _write_description(temporary, description)
    return WorldFiles(folder=folder, scenes=scenes, written=scenes, kept=0)


def _members(drawn: Scene, key: str, index: int, palette: Palette, image_format: str) -> dict[str, bytes]:
    """Contents of a sample's files by suffix."""
    image = io.BytesIO()
    Image.fromarray(drawn.image).save(image, **_FORMATS[image_format])
    height, width = drawn.label_map.shape
    meta = {
        "key": key,
        "status": "success",
        "caption": drawn.caption,
        "width": width,
        "height": height,
        "scene": index,
        "objects": [palette.names[i] for i in drawn.present],
    }
    return {image_format: image.getvalue(), "txt": drawn.caption.encode(), "json": json.dumps(meta).encode()}


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # without times and owners: the same call gives the same bytes
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def _check_count(name: str, value: int, limit: int) -> None:
    if not 1 <= value <= limit:
        raise InputError(f"{name} is {value}; it must be in 1..{limit:,}")


def _description(world: WorldConfig, palette: Palette, **settings: Any) -> dict[str, Any]:
    colours = {name: "".join(f"{value:02x}" for value in rgb) for name, rgb in palette.colours}
    return {"world": dataclasses.asdict(world), "colours": colours, **settings}


def _begin(folder: Path, description: Mapping[str, Any]) -> None:
    """Say in the folder what its shards will be, or see that it says so already."""
    if (folder / WORLD_FILE).exists() or any(folder.glob("*.tar")):
        _require_same(folder, description)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        _write_description(folder, description)


def _require_same(folder: Path, description: Mapping[str, Any]) -> None:
    path = folder / WORLD_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} holds other files, and no {WORLD_FILE}; choose another folder") from error
    differ = [key for key in description if not isinstance(found, dict) or found.get(key) != description[key]]
    if differ:
        raise InputError(
            f"{folder} was written with another {' and '.join(differ)} ({path} says which). Choose another folder, or "
            "delete that one",
            differ=differ,
        )


def _write_description(folder: Path, description: Mapping[str, Any]) -> None:
    with atomic_file(folder / WORLD_FILE) as temporary:
        temporary.write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
