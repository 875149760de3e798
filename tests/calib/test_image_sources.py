import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from tclkit.calib.image_sources import ImageSource, open_source, spread_frames
from tclkit.runtime.errors import InputError


def names_of(source: ImageSource) -> list[str]:
    return [candidate.name for candidate in source.candidates]


def test_a_folder_is_searched_through(photos: Callable[..., Path]) -> None:
    folder = photos(6)
    source = open_source(folder, wanted=10)
    names = names_of(source)
    assert sorted(names) == ["0000.png", "0001.png", "0003.png", "0004.png", "more/0002.png", "more/0005.png"]
    assert (source.kind, source.name, source.found, source.takes) == ("folder", "photos", 6, 10)
    assert names != sorted(names)
    assert next(iter(open_source(folder, wanted=10).candidates)).read().shape == (48, 64, 3)


def test_what_is_no_photo_is_passed_over(photos: Callable[..., Path]) -> None:
    folder = photos(2)
    for name in ("0000-overlay.png", "._0000.png", "notes.txt"):
        (folder / name).write_bytes(b"x")
    (folder / ".trash").mkdir()
    (folder / ".trash" / "old.png").write_bytes(b"x")
    assert sorted(names_of(open_source(folder, wanted=10))) == ["0000.png", "0001.png"]


def test_the_order_does_not_depend_on_the_listing(photos: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = photos(9)
    before = names_of(open_source(folder, wanted=10))
    walk = os.walk

    def backwards(*arguments: Any, **options: Any) -> Iterator[tuple[str, list[str], list[str]]]:
        for root, folders, files in reversed(list(walk(*arguments, **options))):
            yield root, folders, files[::-1]

    monkeypatch.setattr("os.walk", backwards)
    assert names_of(open_source(folder, wanted=10)) == before
    assert names_of(open_source(folder, wanted=10, seed=1)) != before


def test_a_glob_gives_the_order_of_its_folder(photos: Callable[..., Path]) -> None:
    folder = photos(9)
    source = open_source(str(folder / "**" / "*.png"), wanted=10)
    assert names_of(source) == names_of(open_source(folder, wanted=10))
    assert (source.kind, source.name) == ("glob", "*.png")


def test_few_candidates_of_many_are_offered(tmp_path: Path) -> None:
    for index in range(100):
        (tmp_path / f"{index}.png").touch()
    source = open_source(tmp_path, wanted=2)
    assert len(names_of(source)) == 32
    assert source.found == 100


def test_a_list_is_relative_to_its_folder(photos: Callable[..., Path]) -> None:
    folder = photos(3)
    lines = ["# a comment", "", "0001.png", " more/0002.png ", "0001.png", str(folder / "0000.png"), "gone.png"]
    path = folder / "train.txt"
    path.write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    source = open_source(path, wanted=10)
    found = {candidate.name: candidate for candidate in source.candidates}
    assert set(found) == {"0001.png", "more/0002.png", str(folder / "0000.png"), "gone.png"}
    assert found["more/0002.png"].read().shape == (48, 64, 3)
    with pytest.raises(InputError, match=r"gone\.png does not exist"):
        found["gone.png"].read()
    assert (source.kind, source.name) == ("list", "train.txt")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"\xff\xfe\x00\x80", "no UTF-8 text"),
        (b"# nothing\n\n", "names no image: write one path a line"),
        (b"a\0b.png\n", "a line that is no path"),
        (b"a" * 5000, "a line that is no path"),
    ],
)
def test_lists_that_cannot_be_used(content: bytes, text: str, tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=text):
        open_source(path, wanted=2)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (candidate,) = open_source(tmp_path, wanted=2).candidates
    with pytest.raises(InputError, match=r"pipe\.png is no file"):
        candidate.read()
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(InputError, match="neither a file nor a folder"):
        open_source(tmp_path / "pipe.mp4", wanted=2)


@pytest.mark.parametrize("spelling", ["shard-{0000..0001}.tar", "shard-{0000,0001}.tar", "shard-*.tar"])
def test_shards_by_braces_and_by_glob(
    spelling: str, shard: Callable[..., Path], picture: Any, encoded: Any, tmp_path: Path
) -> None:
    for number in (0, 1):
        images = {f"{number}{index}.png": encoded(picture(10 * number + index)) for index in range(3)}
        shard({**images, f"{number}0.txt": b"a caption", "._00.png": b"macOS"}, f"shard-000{number}.tar")
    source = open_source(str(tmp_path / spelling), wanted=10)
    read = {candidate.name: candidate.read() for candidate in source.candidates}
    assert sorted(read) == [f"shard-000{number}.tar: {number}{index}.png" for number in (0, 1) for index in range(3)]
    np.testing.assert_array_equal(read["shard-0001.tar: 12.png"], picture(12))
    assert (source.kind, source.name, source.found, source.problems) == ("shards", spelling, 6, [])


def test_one_shard_is_ranked_whatever_its_order(shard: Callable[..., Path], picture: Any, encoded: Any) -> None:
    images = {f"{index}.png": encoded(picture(index)) for index in range(6)}
    before = names_of(open_source(shard(images), wanted=10))
    assert names_of(open_source(shard(dict(reversed(images.items()))), wanted=10)) == before


def test_member_names_are_never_paths(
    shard: Callable[..., Path], picture: Any, encoded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["../../escaped.png", "/etc/absolute.png", "line\nbreak.png"]
    path = shard({name: encoded(picture(index)) for index, name in enumerate(names)})
    before = sorted(tmp_path.parent.rglob("*"))
    opened: list[Path] = []
    plain_open = Path.open

    def noting(self: Path, *arguments: Any, **options: Any) -> Any:
        opened.append(self)
        return plain_open(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", noting)
    source = open_source(path, wanted=10)
    candidates = list(source.candidates)
    assert all(candidate.read().shape == (48, 64, 3) for candidate in candidates)
    assert set(opened) == {path}
    assert all("\n" not in candidate.name for candidate in candidates)
    assert sorted(tmp_path.parent.rglob("*")) == before


def test_links_and_folders_in_a_shard_are_passed_over(
    shard: Callable[..., Path], picture: Any, encoded: Any, tmp_path: Path
) -> None:
    path = tmp_path / "odd.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("link.png", tarfile.SYMTYPE), ("folder.png", tarfile.DIRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/hostname"
            tar.addfile(info)
    with pytest.raises(InputError, match=r"odd\.tar: no images in the shard"):
        open_source(path, wanted=2)


def test_a_huge_member_is_refused_unread(
    shard: Callable[..., Path], picture: Any, encoded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shard({"a.png": encoded(picture(0))})
    monkeypatch.setattr("tclkit.calib.image_sources._MAX_MEMBER_BYTES", 100)
    (candidate,) = open_source(path, wanted=2).candidates
    with pytest.raises(InputError, match=r"shard-0000\.tar: a\.png is .* bytes; the limit is 100"):
        candidate.read()


def test_damaged_and_missing_shards_are_problems(
    shard: Callable[..., Path], picture: Any, encoded: Any, tmp_path: Path
) -> None:
    whole = shard({f"{index}.png": encoded(picture(index)) for index in range(4)})
    cut = tmp_path / "shard-0001.tar"
    cut.write_bytes(whole.read_bytes()[:3000])
    (tmp_path / "shard-0002.tar").write_bytes(b"no tar" * 1000)
    source = open_source(str(tmp_path / "shard-{0000..0003}.tar"), wanted=10)
    assert 4 < len(names_of(source)) < 8
    assert [problem.split(" ")[0] for problem in source.problems] == [f"shard-000{n}.tar" for n in (1, 2, 3)]
    assert source.problems[2] == "shard-0003.tar cannot be read: No such file or directory"
    with pytest.raises(InputError, match=r"no images in the shard.*shard-0002\.tar is no tar file, or a damaged one"):
        open_source(tmp_path / "shard-0002.tar", wanted=2)


def test_braces_have_a_limit() -> None:
    with pytest.raises(InputError, match="stands for more than 100,000 files"):
        open_source("s-{0..9}{0..999999999999}.tar", wanted=2)


def test_video_frames_are_spread(video: Callable[..., Path], picture: Any) -> None:
    path = video([picture(index) for index in range(40)])
    source = open_source(path, wanted=5)
    read = {candidate.name: candidate.read() for candidate in source.candidates}
    places = [int(name.removeprefix("drive.avi: frame ")) for name in read]
    assert places == spread_frames(40, 10, 0)
    for place, frame in zip(places, read.values(), strict=True):
        difference = np.abs(frame.astype(int) - picture(place)).mean()
        assert difference < 20, f"frame {place} is another one"
    assert (source.kind, source.name, source.found) == ("video", "drive.avi", 40)


def capture_that_claims(frames: int) -> type:
    """cv2.VideoCapture, but for the number of frames that the file is said to hold."""
    plain = cv2.VideoCapture

    class Capture:
        def __init__(self, path: str) -> None:
            self._capture = plain(path)

        def get(self, what: int) -> float:
            return float(frames) if what == cv2.CAP_PROP_FRAME_COUNT else self._capture.get(what)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._capture, name)

    return Capture


def test_a_video_of_unknown_length_is_counted(
    video: Callable[..., Path], picture: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = video([picture(index) for index in range(7)])

    monkeypatch.setattr("cv2.VideoCapture", capture_that_claims(-1))
    assert open_source(path, wanted=5).found == 7


def test_a_video_that_ends_early_says_so(
    video: Callable[..., Path], picture: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = video([picture(index) for index in range(7)])

    monkeypatch.setattr("cv2.VideoCapture", capture_that_claims(20))
    source = open_source(path, wanted=10)
    assert len(names_of(source)) == 7
    assert source.problems == ["drive.avi: says it has more frames, but ends after 7"]


def test_a_video_that_is_none(tmp_path: Path, video: Callable[..., Path], picture: Any) -> None:
    path = tmp_path / "notes.mp4"
    path.write_bytes(b"not a video" * 100)
    with pytest.raises(InputError, match=r"notes\.mp4 cannot be opened as a video: .*Re-encode it \(ffmpeg"):
        open_source(path, wanted=2)
    with pytest.raises(InputError, match=r"frames of 64 x 48 pixels; the limit is 100"):
        open_source(video([picture(0)]), wanted=2, max_pixels=100)


@pytest.mark.parametrize(("frames", "count"), [(0, 3), (1, 3), (3, 3), (10, 3), (1000, 7)])
def test_spread_frames(frames: int, count: int) -> None:
    places = spread_frames(frames, count, 0)
    assert len(places) == min(frames, count)
    assert places == sorted(set(places))
    assert all(0 <= place < frames for place in places)
    if frames > count:
        assert [place * count // frames for place in places] == pytest.approx(range(count), abs=1)
        assert places != spread_frames(frames, count, 1)


def empty(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).touch()
        return folder / name

    return make


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda folder: "", "no calibration images are named. Give a folder"),
        (lambda folder: folder / "gone", r"gone does not exist; check the path. Give a folder"),
        (lambda folder: folder / "*.jpg", r"\*\.jpg: no file matches this pattern. Give a folder"),
        (lambda folder: folder / "s-{0..3}.tar", "no file matches this pattern"),
        (lambda folder: folder, r"no images in this folder \(looked for .*\.png.*\)\. Give a folder"),
        (empty("one.jpg"), r"one\.jpg is one image; calibration takes many. Give a folder"),
        (empty("data.npz"), r"of no kind that calibration can read \(its ending is '\.npz'\). Give a folder"),
        (empty("shard.tar.gz"), r"shard\.tar\.gz is compressed; unpack it"),
        (lambda folder: "x" * 5000, "cannot be read: File name too long|does not exist"),
    ],
)
def test_sources_that_cannot_be_used(make: Callable[[Path], str | Path], text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=text):
        open_source(make(tmp_path), wanted=2)


def test_a_folder_of_videos_or_shards_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "a.tar").touch()
    (tmp_path / "b.mp4").touch()
    (tmp_path / "c.mp4").touch()
    with pytest.raises(InputError, match=r"It holds \.mp4 files: name them themselves.*It holds \.tar files"):
        open_source(tmp_path, wanted=2)
    with pytest.raises(InputError, match=r"matches 2 files, but neither images nor \.tar shards; of videos and lists"):
        open_source(tmp_path / "*.mp4", wanted=2)


def test_the_home_folder_in_a_glob(photos: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(photos(2).parent))
    assert len(names_of(open_source("~/photos/*.png", wanted=2))) == 2


def test_image_bombs_are_refused(shard: Callable[..., Path], picture: Any, encoded: Any) -> None:
    path = shard({"a.png": encoded(picture(0))})
    (candidate,) = open_source(path, wanted=2, max_pixels=100).candidates
    with pytest.raises(InputError, match="64 x 48 = 3,072 pixels; the limit is 100"):
        candidate.read()
