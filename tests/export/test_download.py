"""Downloads that break, change, lie, meet a full disk, or are killed."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tclkit.export import _part_file
from tclkit.export.download import download
from tclkit.runtime.errors import DownloadError

CONTENT = bytes(range(256)) * 4000  # 1 MB
DIGEST = hashlib.sha256(CONTENT).hexdigest()
QUICK: dict[str, Any] = {"pause_s": 0.0, "timeout_s": 5.0, "attempts": 3}


@pytest.fixture
def served(site: Any) -> Any:
    site.files["/model.pth"] = CONTENT
    return site


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "model.pth"


def names(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir())


def statuses(site: Any) -> list[int]:
    return [status for _, _, status in site.requests]


def test_a_file_arrives_whole_with_progress(served: Any, target: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    path = download(f"{served.url}/model.pth", target, sha256=DIGEST.upper(), progress=lambda *at: seen.append(at))
    assert path.read_bytes() == CONTENT
    assert names(target) == ["model.pth"]
    assert seen[0] == (0, len(CONTENT))
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert seen == sorted(seen)


def test_a_file_that_is_there_is_not_fetched_again(served: Any, target: Path) -> None:
    for _ in range(2):
        download(f"{served.url}/model.pth", target, sha256=DIGEST)
    assert statuses(served) == [200]


def test_a_file_that_contradicts_its_hash_is_fetched_again(served: Any, target: Path) -> None:
    target.parent.mkdir()
    target.write_bytes(b"something else")
    download(f"{served.url}/model.pth", target, sha256=DIGEST)
    assert target.read_bytes() == CONTENT


def test_breaks_are_resumed_where_they_happened(served: Any, target: Path) -> None:
    served.break_after = [100_000, 50_000]
    download(f"{served.url}/model.pth", target, **QUICK)
    assert target.read_bytes() == CONTENT
    assert [asked for _, asked, _ in served.requests] == [None, "bytes=100000-", "bytes=150000-"]
    assert statuses(served) == [200, 206, 206]


def test_giving_up_keeps_the_part_and_the_next_call_goes_on(served: Any, target: Path) -> None:
    served.break_after = [100_000, 0, 0]
    with pytest.raises(DownloadError, match=r"ended after 100,000 of 1,024,000 bytes.*3 tries.*run this again"):
        download(f"{served.url}/model.pth", target, **QUICK)
    assert names(target) == ["model.pth.part", "model.pth.part.json"]
    download(f"{served.url}/model.pth", target, sha256=DIGEST, **QUICK)
    assert served.requests[-1] == ("/model.pth", "bytes=100000-", 206)
    assert names(target) == ["model.pth"]


def test_a_server_without_ranges_starts_over(served: Any, target: Path) -> None:
    served.ignores_range = True
    served.break_after = [300_000]
    download(f"{served.url}/model.pth", target, sha256=DIGEST, **QUICK)
    assert statuses(served) == [200, 200]


def test_a_server_without_ranges_that_always_breaks_is_given_up(served: Any, target: Path) -> None:
    served.ignores_range = True
    served.break_after = [300_000] * 9
    with pytest.raises(DownloadError, match="gave up after 3 tries"):
        download(f"{served.url}/model.pth", target, **QUICK)


def test_a_file_that_changed_between_two_attempts_starts_over(served: Any, target: Path) -> None:
    served.break_after = [100_000, 0, 0]
    with pytest.raises(DownloadError):
        download(f"{served.url}/model.pth", target, **QUICK)
    served.etag, served.files["/model.pth"] = '"v2"', CONTENT[::-1]
    download(f"{served.url}/model.pth", target, **QUICK)
    assert target.read_bytes() == CONTENT[::-1]


def test_a_changed_file_is_noticed_on_a_server_that_ignores_if_range(served: Any, target: Path) -> None:
    served.break_after = [100_000, 0, 0]
    with pytest.raises(DownloadError):
        download(f"{served.url}/model.pth", target, **QUICK)
    note = target.with_name("model.pth.part.json")
    note.write_text(json.dumps(json.loads(note.read_text()) | {"etag": 'W/"v0"', "last_modified": None}))
    download(f"{served.url}/model.pth", target, sha256=DIGEST, **QUICK)
    assert statuses(served)[-2:] == [206, 200]


def test_without_any_validator_and_hash_nothing_is_kept(served: Any, target: Path) -> None:
    served.etag = None
    served.break_after = [100_000]
    download(f"{served.url}/model.pth", target, **QUICK)
    assert statuses(served) == [200, 200]
    assert target.read_bytes() == CONTENT


def test_a_date_serves_where_there_is_no_etag(served: Any, target: Path) -> None:
    served.etag = None
    served.extra_headers = {"Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}
    served.break_after = [100_000]
    download(f"{served.url}/model.pth", target, **QUICK)
    assert statuses(served) == [200, 206]


def test_a_part_of_another_address_is_not_used(served: Any, target: Path) -> None:
    served.files["/other.pth"] = CONTENT[::-1]
    served.break_after = [100_000, 0, 0]
    with pytest.raises(DownloadError):
        download(f"{served.url}/other.pth", target, **QUICK)
    download(f"{served.url}/model.pth", target, sha256=DIGEST, **QUICK)
    assert served.requests[-1] == ("/model.pth", None, 200)


def test_wrong_bytes_are_refused_and_removed(served: Any, target: Path) -> None:
    served.files["/model.pth"] = CONTENT[:-1] + b"x"
    with pytest.raises(DownloadError, match=rf"SHA-256 [0-9a-f]{{64}}, expected {DIGEST}") as caught:
        download(f"{served.url}/model.pth", target, sha256=DIGEST, **QUICK)
    assert caught.value.values["expected"] == DIGEST
    assert names(target) == []


def test_a_spoilt_first_half_is_mended_by_one_clean_try(served: Any, target: Path) -> None:
    served.break_after = [100_000, 0, 0]
    with pytest.raises(DownloadError):
        download(f"{served.url}/model.pth", target, **QUICK)
    target.with_name("model.pth.part").write_bytes(b"?" * 100_000)
    download(f"{served.url}/model.pth", target, sha256=DIGEST, **QUICK)
    assert statuses(served)[-2:] == [206, 200]
    assert target.read_bytes() == CONTENT


def test_wrong_bytes_keep_the_old_target(served: Any, target: Path) -> None:
    target.parent.mkdir()
    target.write_bytes(b"old")
    served.files["/model.pth"] = b"wrong"
    with pytest.raises(DownloadError, match="SHA-256"):
        download(f"{served.url}/model.pth", target, sha256=DIGEST, **QUICK)
    assert target.read_bytes() == b"old"


def test_wrong_length_is_refused_before_the_bytes_come(served: Any, target: Path) -> None:
    with pytest.raises(DownloadError, match=r"offers 1,024,000 bytes, expected 5"):
        download(f"{served.url}/model.pth", target, size_bytes=5, **QUICK)
    assert names(target) == []


def test_no_announced_length_is_checked_against_the_expected_one(served: Any, target: Path) -> None:
    served.announces_length = False
    download(f"{served.url}/model.pth", target, size_bytes=len(CONTENT), **QUICK)
    assert target.read_bytes() == CONTENT
    target.unlink()
    served.break_after = [10, 0, 0]
    with pytest.raises(DownloadError, match=r"ended after 10 of 1,024,000"):
        download(f"{served.url}/model.pth", target, size_bytes=len(CONTENT), **QUICK)


def test_a_resumed_answer_that_does_not_tell_the_whole_length_is_not_taken_cut_short(served: Any, target: Path) -> None:
    served.announces_length, served.tells_whole = False, False
    target.parent.mkdir()
    (target.parent / "model.pth.part").write_bytes(CONTENT[:1000])
    note = {"url": f"{served.url}/model.pth", "etag": served.etag, "last_modified": None}
    (target.parent / "model.pth.part.json").write_text(json.dumps(note))
    served.break_after = [100, 100]
    download(f"{served.url}/model.pth", target, **QUICK)
    assert target.read_bytes() == CONTENT
    assert statuses(served) == [206, 206, 206]


def test_an_answer_that_does_not_end_is_stopped_at_the_expected_length(served: Any, target: Path) -> None:
    served.announces_length = False
    with pytest.raises(DownloadError, match=r"sends more than [\d,]+ bytes, expected 1,000: it is another file"):
        download(f"{served.url}/model.pth", target, size_bytes=1000, **QUICK)
    assert names(target) == []


def test_an_empty_file(served: Any, target: Path) -> None:
    served.files["/model.pth"] = b""
    assert download(f"{served.url}/model.pth", target).read_bytes() == b""


def test_a_whole_part_is_taken_at_416(served: Any, target: Path) -> None:
    target.parent.mkdir()
    target.with_name("model.pth.part").write_bytes(CONTENT)
    note = {"url": f"{served.url}/model.pth", "etag": '"v1"', "last_modified": None}
    target.with_name("model.pth.part.json").write_text(json.dumps(note))
    download(f"{served.url}/model.pth", target, sha256=DIGEST, **QUICK)
    assert statuses(served) == [416]
    assert names(target) == ["model.pth"]


def test_a_part_longer_than_the_file_starts_over_at_416(served: Any, target: Path) -> None:
    target.parent.mkdir()
    target.with_name("model.pth.part").write_bytes(CONTENT + b"more")
    note = {"url": f"{served.url}/model.pth", "etag": '"v1"', "last_modified": None}
    target.with_name("model.pth.part.json").write_text(json.dumps(note))
    download(f"{served.url}/model.pth", target, **QUICK)
    assert statuses(served) == [416, 200]
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("note", ["", "{", "[]", '{"url": 5}'])
def test_a_damaged_note_starts_over(served: Any, target: Path, note: str) -> None:
    target.parent.mkdir()
    target.with_name("model.pth.part").write_bytes(b"?" * 10)
    target.with_name("model.pth.part.json").write_text(note)
    download(f"{served.url}/model.pth", target, **QUICK)
    assert target.read_bytes() == CONTENT


def test_not_found_is_said_at_once(served: Any, target: Path) -> None:
    with pytest.raises(DownloadError, match=r"nothing\.pth: the server answered 404 Not Found.*give its path"):
        download(f"{served.url}/nothing.pth", target, **QUICK)
    assert len(served.requests) == 1
    assert names(target) == []


def test_a_busy_server_is_asked_again(served: Any, target: Path) -> None:
    served.status = 503
    with pytest.raises(DownloadError, match=r"503.*gave up after 3 tries"):
        download(f"{served.url}/model.pth", target, **QUICK)
    assert len(served.requests) == 3


def test_nobody_listens(target: Path) -> None:
    with pytest.raises(DownloadError, match=r"no connection \(.*refused.*\)"):
        download("http://127.0.0.1:9/model.pth", target, **QUICK)


def test_a_web_page_is_not_a_model(served: Any, target: Path) -> None:
    served.extra_headers = {"Content-Type": "text/html; charset=utf-8"}
    with pytest.raises(DownloadError, match="wants a login"):
        download(f"{served.url}/model.pth", target, **QUICK)
    assert names(target) == []


def test_redirects_are_followed_and_resumed(served: Any, target: Path) -> None:
    served.redirects["/latest"] = f"{served.url}/model.pth"
    served.break_after = [100_000]
    download(f"{served.url}/latest", target, sha256=DIGEST, **QUICK)
    assert statuses(served) == [302, 200, 302, 206]


@pytest.mark.parametrize("address", ["file:///etc/hostname", "ftp://127.0.0.1/x", "data:,x"])
def test_redirects_to_other_schemes_are_refused(served: Any, target: Path, address: str) -> None:
    served.redirects["/latest"] = address
    with pytest.raises(DownloadError, match=r"only http:// and https://|is not allowed"):
        download(f"{served.url}/latest", target, **QUICK)
    assert names(target) == []


def test_a_redirect_to_itself_ends(served: Any, target: Path) -> None:
    served.redirects["/latest"] = f"{served.url}/latest"
    with pytest.raises(DownloadError, match="302"):
        download(f"{served.url}/latest", target, **QUICK)


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://x/y", "/etc/hostname", "", "http://", "http://[x"])
def test_only_web_addresses_are_taken(target: Path, url: str) -> None:
    with pytest.raises(DownloadError, match="only http:// and https://"):
        download(url, target)
    assert not target.parent.exists()


def test_a_full_disk_keeps_the_part(served: Any, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append = _part_file.PartFile.append

    def append_until_full(part: _part_file.PartFile, chunk: bytes) -> None:
        if part.size + len(chunk) > 600_000:
            append(part, chunk[: 600_000 - part.size])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(part, chunk)

    with monkeypatch.context() as patch:
        patch.setattr(_part_file.PartFile, "append", append_until_full)
        with pytest.raises(DownloadError, match=r"disk is full: 600,000 bytes of model\.pth are kept.*Free some space"):
            download(f"{served.url}/model.pth", target, **QUICK)
    assert not target.exists()
    download(f"{served.url}/model.pth", target, sha256=DIGEST, **QUICK)
    assert served.requests[-1] == ("/model.pth", "bytes=600000-", 206)


def test_a_target_that_cannot_be_written_is_said(served: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match=r"cannot write .*model\.pth: "):
        download(f"{served.url}/model.pth", tmp_path / "file" / "model.pth", **QUICK)


def test_two_downloads_of_one_file_do_not_mix(served: Any, target: Path) -> None:
    with (
        _part_file.locked_part_file(target),
        pytest.raises(DownloadError, match=r"another process is downloading model\.pth"),
    ):
        download(f"{served.url}/model.pth", target, **QUICK)


def test_a_killed_download_is_resumed_by_the_next(served: Any, target: Path) -> None:
    served.bytes_per_second = 1_000_000
    url = f"{served.url}/model.pth"
    code = f"from tclkit.export.download import download; download({url!r}, {str(target)!r})"
    process = subprocess.Popen([sys.executable, "-c", code])
    part = target.with_name("model.pth.part")
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size > 100_000):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = part.stat().st_size
    assert not target.exists()

    served.bytes_per_second = None
    download(url, target, sha256=DIGEST, **QUICK)
    assert served.requests[-1] == ("/model.pth", f"bytes={kept}-", 206)
    assert target.read_bytes() == CONTENT
    assert names(target) == ["model.pth"]
