import io
import logging
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tclkit.runtime.errors import InputError
from tclkit.runtime.images import DEFAULT_MAX_PIXELS, load_image

ORIENTATION = 0x0112
LEFT_RED = np.zeros((6, 8, 3), np.uint8)
LEFT_RED[:, :4] = (255, 0, 0)
LEFT_RED[:, 4:] = (0, 0, 255)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is huge and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


def assert_plain_rgb(image: NDArray[np.uint8], height: int, width: int) -> None:
    assert image.shape == (height, width, 3)
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    assert image.flags.writeable


@pytest.mark.parametrize("source", [None, 7, np.zeros((4, 4, 3), np.uint8)])
def test_what_is_no_file_is_refused(source: Any) -> None:
    with pytest.raises(InputError, match="an image file is a path or bytes, found"):
        load_image(source)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "GIF"])
def test_lossless_rgb_comes_back_as_it_was(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(encoded(Image.fromarray(LEFT_RED), kind))
    for source in (path, str(path), path.read_bytes()):
        image = load_image(source)
        assert_plain_rgb(image, 6, 8)
        np.testing.assert_array_equal(image, LEFT_RED)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "MPO"])
def test_lossy_rgb(kind: str) -> None:
    image = load_image(encoded(Image.fromarray(LEFT_RED).resize((64, 48)), kind, quality=95))
    assert_plain_rgb(image, 48, 64)
    assert image[24, 4, 0] > 200
    assert image[24, 60, 2] > 200


def test_one_pixel() -> None:
    image = load_image(encoded(Image.new("RGB", (1, 1), (1, 2, 3))))
    np.testing.assert_array_equal(image, [[[1, 2, 3]]])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    kind = "TIFF" if mode == "CMYK" else "PNG"
    loaded = load_image(encoded(Image.fromarray(LEFT_RED).convert(mode), kind))
    assert_plain_rgb(loaded, 6, 8)
    if mode in ("1", "L", "LA"):
        assert (loaded[..., 0] == loaded[..., 2]).all()
    else:
        np.testing.assert_allclose(loaded.astype(int), LEFT_RED, atol=3)


def test_cmyk_jpeg() -> None:
    image = load_image(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95))
    assert image[8, 8, 0] > 240
    assert image[8, 8, 1:].max() < 15


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_uses_the_full_range(kind: str) -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    pgm = b"P5 6 1 65535\n" + values.astype(">u2").tobytes()
    image = load_image(pgm if kind == "PPM" else encoded(Image.fromarray(values), kind))
    np.testing.assert_array_equal(image[0, :, 0], np.round(values[0] / 257.0))
    assert_plain_rgb(image, 1, 6)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_values_without_a_range_are_refused(dtype: type) -> None:
    source = encoded(Image.fromarray(np.array([[0, 7], [90000, 3]], dtype)), "TIFF")
    with pytest.raises(InputError, match="no defined brightness range; save it with 8 or 16 bits"):
        load_image(source, name="depth.tiff")


def test_alpha_is_laid_over_white() -> None:
    rgba = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 51]]], np.uint8)
    image = load_image(encoded(Image.fromarray(rgba)))
    np.testing.assert_array_equal(image, [[[255, 0, 0], [255, 255, 255], [204, 204, 204]]])


@pytest.mark.parametrize("mode", ["L", "RGB", "P"])
def test_transparent_colour_is_laid_over_white(mode: str) -> None:
    source = Image.fromarray(np.array([[10, 20]], np.uint8)).convert(mode)
    transparent = (20, 20, 20) if mode == "RGB" else source.getpixel((1, 0))
    image = load_image(encoded(source, transparency=transparent))
    np.testing.assert_array_equal(image, [[[10] * 3, [255] * 3]])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation: int) -> None:
    upright = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8) * 5)
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = upright if undo is None else upright.transpose(undo)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image = load_image(encoded(stored, exif=exif.tobytes()))
    np.testing.assert_array_equal(image[..., 0], np.asarray(upright))


def test_unreadable_exif_is_announced(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(image: Image.Image) -> Image.Image:
        raise SyntaxError("not a TIFF\nfile")

    monkeypatch.setattr("PIL.ImageOps.exif_transpose", broken)
    with caplog.at_level(logging.WARNING):
        image = load_image(encoded(Image.fromarray(LEFT_RED)), name="a.jpg")
    np.testing.assert_array_equal(image, LEFT_RED)
    assert "a.jpg: its EXIF data cannot be read (not a TIFF file), so it is not rotated" in caplog.text


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    image = load_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert tuple(image[0, 0]) == (255, 0, 0)


@pytest.mark.parametrize(("width", "height"), [(30_000, 30_000), (100_001, 1_000)])
def test_too_many_pixels_are_refused_by_the_header(width: int, height: int, tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(width, height))
    with pytest.raises(
        InputError, match=rf"bomb.png is {width} x {height} = .* the limit is 100,000,000\. Scale"
    ) as info:
        load_image(path)
    assert info.value.values["width"] == width
    assert Image.MAX_IMAGE_PIXELS is not None


def test_the_limit_is_a_parameter() -> None:
    source = encoded(Image.fromarray(LEFT_RED))
    assert load_image(source, max_pixels=48).shape == (6, 8, 3)
    with pytest.raises(InputError, match="8 x 6 = 48 pixels; the limit is 47"):
        load_image(source, max_pixels=47)


def test_a_raised_limit_reaches_past_pillows_own() -> None:
    with pytest.raises(InputError, match="truncated or damaged"):  # so it got past the header
        load_image(png_header(20_000, 10_000), max_pixels=2 * DEFAULT_MAX_PIXELS)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000"])
@pytest.mark.parametrize("share", [0.02, 0.5])
def test_truncated_files(kind: str, share: float, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    path = tmp_path / "half.bin"
    path.write_bytes(data[: max(4, int(len(data) * share))])
    with pytest.raises(InputError, match=r"half\.bin .*(truncated|damaged|not an image)") as info:
        load_image(path)
    assert "\n" not in str(info.value)


def test_text_named_jpg(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_text("hello\nworld, I am not a picture")
    with pytest.raises(
        InputError, match=r"photo\.jpg is not an image .* begins with b'hello\\nworld,'\. JPEG, PNG"
    ) as info:
        load_image(path)
    assert "\n" not in str(info.value)


def test_damaged_header_is_called_by_its_kind() -> None:
    with pytest.raises(InputError, match="image begins like a PNG file, but its header is truncated"):
        load_image(b"\x89PNG\r\n\x1a\n" + b"\0" * 30)


def test_empty_missing_and_folder(tmp_path: Path) -> None:
    empty = tmp_path / "empty.png"
    empty.touch()
    with pytest.raises(InputError, match=r"empty\.png is empty \(0 bytes\)"):
        load_image(empty)
    with pytest.raises(InputError, match="image is empty"):
        load_image(b"")
    with pytest.raises(InputError, match=r"gone\.png does not exist; check the path"):
        load_image(tmp_path / "gone.png")
    with pytest.raises(InputError, match="is a folder, not an image"):
        load_image(tmp_path)
    with pytest.raises(InputError, match="cannot be read: Not a directory"):
        load_image(empty / "below.png")


def test_the_name_stands_in_messages() -> None:
    with pytest.raises(InputError, match="standard input is empty"):
        load_image(b"", name="standard input")
