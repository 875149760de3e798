"""Label maps: what is read and what is refused."""

from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

import tclkit.runtime.images as images
from tclkit.calib.label_files import read_label_map, write_label_map
from tclkit.runtime.errors import InputError

POSTSCRIPT = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 8 8
%%EndComments
%%x
%ImageData: 8 8 8 1 0 1 1 "x"
showpage
%%EOF
"""


@pytest.mark.parametrize("shape", [(1, 1), (3, 5)])
def test_what_is_written_is_read(tmp_path: Path, shape: tuple[int, int]) -> None:
    label_map = np.arange(shape[0] * shape[1], dtype=np.uint8).reshape(shape) + 241
    write_label_map(tmp_path / "a.png", label_map)
    np.testing.assert_array_equal(read_label_map(tmp_path / "a.png"), label_map)


def test_postscript_never_starts_ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*args: object, **options: object) -> None:
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", started)
    (tmp_path / "a.png").write_bytes(POSTSCRIPT)
    Image.init()
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "EPS"  # what Pillow takes it for
    with pytest.raises(InputError, match=r"a\.png is no image file of the kind PNG"):
        read_label_map(tmp_path / "a.png")


def test_other_formats_are_refused(tmp_path: Path) -> None:
    Image.new("L", (2, 2)).save(tmp_path / "a.png", "BMP")
    with pytest.raises(InputError, match="is no image file of the kind PNG"):
        read_label_map(tmp_path / "a.png")


def test_a_bomb_is_refused_while_another_thread_opens_an_image(tmp_path: Path) -> None:
    Image.new("1", (images.DEFAULT_MAX_PIXELS // 8000 + 1, 8000)).save(tmp_path / "a.png")
    with images._without_pillow_limit(), pytest.raises(InputError, match="the limit is 100,000,000"):
        read_label_map(tmp_path / "a.png")
