"""A small web server on this machine that can misbehave."""

import http.server
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest


@dataclass
class FileServer:
    """What the server serves, and how badly.

    files: path -> bytes.
    etag: sent with every file; None sends none.
    break_after: for one answer after the other, how many bytes are sent before the connection is cut; None sends all.
    ignores_range: answer 200 with the whole file to every range.
    status: answer this status to every request.
    redirects: path -> address.
    extra_headers: sent with every file.
    announces_length: False leaves out Content-Length.
    bytes_per_second: slows sending down.
    requests: (path, Range header, status) of every request so far.
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    etag: str | None = '"v1"'
    break_after: list[int | None] = field(default_factory=list)
    ignores_range: bool = False
    status: int | None = None
    redirects: dict[str, str] = field(default_factory=dict)
    extra_headers: dict[str, str] = field(default_factory=dict)
    announces_length: bool = True
    bytes_per_second: int | None = None
    requests: list[tuple[str, str | None, int]] = field(default_factory=list)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: "_Server"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        site, asked = self.server.site, self.headers.get("Range")
        if self.path in site.redirects:
            self._answer(302, b"", asked, {"Location": site.redirects[self.path]})
        elif site.status is not None or self.path not in site.files:
            self._answer(site.status or 404, b"no", asked, {})
        else:
            self._serve(site.files[self.path], asked)

    def _serve(self, content: bytes, asked: str | None) -> None:
        site = self.server.site
        headers = dict(site.extra_headers) | ({"ETag": site.etag} if site.etag else {})
        unchanged = self.headers.get("If-Range") in (None, site.etag, site.extra_headers.get("Last-Modified"))
        start = int(re.findall(r"\d+", asked)[0]) if asked and unchanged and not site.ignores_range else 0
        if start > 0 and start >= len(content):
            self._answer(416, b"", asked, {"Content-Range": f"bytes */{len(content)}"})
        elif start > 0:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self._answer(206, content[start:], asked, headers)
        else:
            self._answer(200, content, asked, headers)

    def _answer(self, status: int, body: bytes, asked: str | None, headers: dict[str, str]) -> None:
        site = self.server.site
        site.requests.append((self.path, asked, status))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if site.announces_length or status not in (200, 206):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        cut = site.break_after.pop(0) if site.break_after and status in (200, 206) else None
        body = body if cut is None else body[:cut]
        step = len(body) or 1
        if site.bytes_per_second:
            step = max(1, site.bytes_per_second // 50)
        for start in range(0, len(body), step):
            self.wfile.write(body[start : start + step])
            if site.bytes_per_second:
                time.sleep(0.02)


class _Server(http.server.ThreadingHTTPServer):
    site: FileServer

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients of these tests hang up and die; that is no fault of the server."""


@pytest.fixture
def site() -> Iterator[FileServer]:
    """A running web server; set its fields before and between requests."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.site = FileServer(url=f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server.site
    server.shutdown()
    server.server_close()
    thread.join()
