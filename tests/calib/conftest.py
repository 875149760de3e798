"""Images that are easy to tell apart, and sources made of them."""

import io
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

Picture = Callable[..., NDArray[np.uint8]]


def make_picture(index: int, height: int = 48, width: int = 64) -> NDArray[np.uint8]:
    """A random mosaic of 8 x 8 colours: no two are near duplicates."""
    colours = np.random.default_rng([7, index]).integers(0, 256, (8, 8, 3), np.uint8)
    return np.asarray(cv2.resize(colours, (width, height), interpolation=cv2.INTER_NEAREST), np.uint8)


def encode(image_hwc: NDArray[np.uint8], kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image_hwc).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def picture() -> Picture:
    return make_picture


@pytest.fixture(scope="session")
def encoded() -> Callable[..., bytes]:
    return encode


@pytest.fixture
def photos(tmp_path: Path) -> Callable[..., Path]:
    """Function that makes a folder of `count` different PNGs, every third one in a subfolder."""

    def make(count: int, name: str = "photos", *, first: int = 0, height: int = 48, width: int = 64) -> Path:
        folder = tmp_path / name
        (folder / "more").mkdir(parents=True, exist_ok=True)
        for index in range(first, first + count):
            path = folder / "more" if index % 3 == 2 else folder
            (path / f"{index:04d}.png").write_bytes(encode(make_picture(index, height, width)))
        return folder

    return make


@pytest.fixture
def shard(tmp_path: Path) -> Callable[..., Path]:
    """Function that writes a .tar of the given members."""

    def make(members: Mapping[str, bytes], name: str = "shard-0000.tar") -> Path:
        path = tmp_path / name
        with tarfile.open(path, "w") as tar:
            for member, data in members.items():
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return path

    return make


@pytest.fixture
def video(tmp_path: Path) -> Callable[..., Path]:
    """Function that writes frames into an AVI of JPEGs."""

    def make(frames: list[NDArray[np.uint8]], name: str = "drive.avi") -> Path:
        path = tmp_path / name
        height, width = frames[0].shape[:2]
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (width, height))
        assert writer.isOpened()
        for frame in frames:
            writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
        writer.release()
        return path

    return make
