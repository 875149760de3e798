"""Fetch one file over HTTP(S): resumed after a break, verified, and in place only when whole.

Bytes arrive in `NAME.part` beside the target, with `NAME.part.json` saying where they come from. Both outlive a broken
connection, a full disk and a killed process; the next call goes on where they end, if the server still has that file.
"""

import contextlib
import errno
import http.client
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from tclkit.runtime.errors import DownloadError
from tclkit.runtime.files import sha256_from_file

from ._part_file import PartFile, locked_part_file, part_path

ByteProgress = Callable[[int, int | None], None]
"""Called as progress(bytes_so_far, bytes_in_all); the latter is None when the server does not say."""

_CHUNK_BYTES = 1 << 18
_TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})


def download(
    url: str,
    target: str | Path,
    *,
    sha256: str | None = None,
    size_bytes: int | None = None,
    progress: ByteProgress | None = None,
    timeout_s: float = 30.0,
    attempts: int = 4,
    pause_s: float = 0.5,
) -> Path:
    """Download `url` to `target` and return the target's path.

    A target that is already there is kept: it was put there whole. Only one that contradicts `sha256` is fetched anew.

    Args:
        url: http or https; redirects are followed, but never to another scheme or from https to http.
        target: the file to write; its folder is made.
        sha256: expected hex digest of the whole file; without it only the length is checked.
        size_bytes: expected length of the whole file.
        progress: called at the start of an answer and after every piece.
        timeout_s: longest silence of the server.
        attempts: tries in a row that may fail without a new byte before giving up.
        pause_s: pause after the first such failure; doubled after each.

    Raises:
        DownloadError: the address is refused, the server says no, the connection keeps breaking, the bytes are not the
            expected ones (the part file is removed), or the disk is full (the part file is kept).
    """
    target = Path(target)
    sha256 = sha256.lower() if sha256 else None
    _check_address(url)
    with _file_errors(target):
        if target.exists() and (sha256 is None or sha256_from_file(target) == sha256):
            return target
        with locked_part_file(target) as part:
            transfer = _Transfer(url, part, size_bytes, sha256 is not None, progress, timeout_s, attempts, pause_s)
            was_resumed = transfer.fetch_whole()
            if was_resumed and sha256 and sha256_from_file(part.path) != sha256:
                part.restart()  # what was kept may stem from another version of the file: a clean try settles it
                transfer.fetch_whole()
            if sha256:
                _check_digest(part, url, sha256)
            part.become(target)
    return target


class _InterruptedError(Exception):
    """A failure that another attempt may mend."""


@dataclass(slots=True)
class _Transfer:
    """One file on its way into its part file, over as many requests as it takes."""

    url: str
    part: PartFile
    size_bytes: int | None
    is_verified_later: bool
    progress: ByteProgress | None
    timeout_s: float
    attempts: int
    pause_s: float

    def fetch_whole(self) -> bool:
        """Ask until the part is whole. Return whether it holds bytes of more than the last answer."""
        furthest, failures = self.part.size, 0
        while True:
            offset = self._resume_offset()
            try:
                return self._fetch_once(offset)
            except _InterruptedError as interruption:
                failures = 1 if self.part.size > furthest else failures + 1
                furthest = max(furthest, self.part.size)
                if failures >= self.attempts:
                    raise self._given_up(interruption, failures) from interruption
            time.sleep(self.pause_s * 2 ** (failures - 1))

    def _given_up(self, interruption: Exception, failures: int) -> DownloadError:
        return DownloadError(
            f"could not download {self.url}: {interruption}; gave up after {failures} tries without progress. "
            f"{self.part.size:,} bytes are kept: run this again to go on from there",
            url=self.url,
            path=str(self.part.path),
        )

    def _resume_offset(self) -> int:
        """How many bytes can be kept: only bytes of this address, and only if a swapped file would be noticed."""
        note = self.part.note()
        is_safe = note.get("url") == self.url and (self.is_verified_later or _validator(note) is not None)
        return self.part.size if is_safe else 0

    def _fetch_once(self, offset: int) -> bool:
        response = self._ask(offset)
        if response is None:  # the part was whole already
            return True
        with response:
            total = self._begin(response, offset)
            was_resumed = self.part.size > 0
            self._check_size(total)
            self._report(total)
            while chunk := _read(response):
                self.part.append(chunk)
                self._report(total)
                if self.size_bytes is not None and self.part.size > self.size_bytes:
                    self._refuse_size(f"sends more than {self.part.size - 1:,} bytes", self.part.size)
        expected = self.size_bytes if total is None else total
        if expected is not None and self.part.size != expected:
            raise _InterruptedError(f"the connection ended after {self.part.size:,} of {expected:,} bytes")
        return was_resumed

    def _ask(self, offset: int) -> http.client.HTTPResponse | None:
        """Send the request; None when the server says that the part already is the whole file."""
        headers = {"User-Agent": "tclkit", "Accept-Encoding": "identity"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
            if validator := _validator(self.part.note()):
                headers["If-Range"] = validator
        try:
            response: http.client.HTTPResponse = _opener().open(
                urllib.request.Request(self.url, headers=headers), timeout=self.timeout_s
            )
        except urllib.error.HTTPError as error:
            with error:
                self._raise_unless_whole(error, offset)
                return None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise DownloadError(
                    f"{self.url}: the server's certificate is not valid: {reason.verify_message}. Check this machine's "
                    "date and its certificates (package ca-certificates)",
                    url=self.url,
                ) from error
            raise _InterruptedError(f"no connection ({reason})") from error
        return response

    def _raise_unless_whole(self, error: urllib.error.HTTPError, offset: int) -> None:
        """Sort an error answer; it may also mean that nothing is missing."""
        if error.code == 416 and offset:
            if error.headers.get("Content-Range", "") == f"bytes */{offset}":
                return
            self.part.restart()
            raise _InterruptedError("the file on the server has changed") from error
        if error.code in _TRANSIENT_STATUS:
            raise _InterruptedError(f"the server answered {error.code} {error.reason}") from error
        raise DownloadError(
            f"{self.url}: the server answered {error.code} {error.reason}. Check the address, or fetch the file by "
            "hand and give its path",
            url=self.url,
            status=error.code,
        ) from error

    def _begin(self, response: http.client.HTTPResponse, offset: int) -> int | None:
        """Bring the part in line with the answer and return the length of the whole file, None if not told."""
        headers = response.headers
        if headers.get_content_type() == "text/html" or headers.get("Content-Encoding", "identity") != "identity":
            raise DownloadError(
                f"{self.url}: the server sent {headers.get('Content-Type')} instead of the file. "
                "Check the address, and whether this network wants a login first",
                url=self.url,
            )
        if response.status == 200:
            etag, date = headers.get("ETag"), headers.get("Last-Modified")
            self.part.begin({"url": self.url, "etag": etag, "last_modified": date})
            length = headers.get("Content-Length", "")
            return int(length) if length.isdecimal() else None
        span = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", headers.get("Content-Range", ""))
        if response.status != 206 or span is None:
            raise DownloadError(f"{self.url}: the server answered {response.status}, not with a file", url=self.url)
        etag = self.part.note().get("etag")
        if int(span[1]) != offset or headers.get("ETag", etag) != etag:
            self.part.restart()
            raise _InterruptedError("the file on the server has changed")
        return int(span[2]) + 1 if span[3] == "*" else int(span[3])  # all from the offset on was asked for

    def _check_size(self, total: int | None) -> None:
        if self.size_bytes is not None and total is not None and total != self.size_bytes:
            self._refuse_size(f"offers {total:,} bytes", total)

    def _refuse_size(self, what: str, found: int) -> NoReturn:
        self.part.discard()
        raise DownloadError(
            f"{self.url} {what}, expected {self.size_bytes:,}: it is another file. Check the address",
            url=self.url,
            expected=self.size_bytes,
            found=found,
        )

    def _report(self, total: int | None) -> None:
        if self.progress:
            self.progress(self.part.size, total)


def _check_digest(part: PartFile, url: str, sha256: str) -> None:
    found = sha256_from_file(part.path)
    if found != sha256:
        part.discard()
        raise DownloadError(
            f"{url} gave a file with SHA-256 {found}, expected {sha256}: it was changed or replaced. Nothing was kept; "
            "try again, from another network if it stays so",
            url=url,
            expected=sha256,
            found=found,
        )


def _validator(note: Mapping[str, Any]) -> str | None:
    """What may stand in If-Range: a strong ETag, else the date of the last change."""
    etag = note.get("etag")
    if isinstance(etag, str) and etag.startswith('"'):
        return etag
    date = note.get("last_modified")
    return date if isinstance(date, str) else None


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read1(_CHUNK_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise _InterruptedError(f"the connection broke ({error})") from error


@contextlib.contextmanager
def _file_errors(target: Path) -> Iterator[None]:
    """Turn what the file system refuses into a DownloadError; network errors never get here."""
    try:
        yield
    except OSError as error:
        part = part_path(target)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            kept = part.stat().st_size if part.exists() else 0
            raise DownloadError(
                f"the disk is full: {kept:,} bytes of {target.name} are kept in {part}. Free some space, "
                "or point TCLKIT_HOME to another disk, and run this again",
                path=str(part),
            ) from error
        raise DownloadError(f"cannot write {target}: {error.strerror or error}", path=str(target)) from error


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        _check_address(newurl)
        if urlsplit(req.full_url).scheme == "https" and urlsplit(newurl).scheme != "https":
            raise DownloadError(f"{req.full_url} redirects to {newurl}, which is not encrypted: refused", url=newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    """Opener without urllib's handlers for file:, ftp: and data: addresses."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _SafeRedirects(),
    ):
        opener.add_handler(handler)
    return opener


def _check_address(url: str) -> None:
    try:
        parts = urlsplit(url)
        is_web = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        is_web = False
    if not is_web:
        raise DownloadError(f"cannot download {url!r}: only http:// and https:// addresses are taken", url=url)
