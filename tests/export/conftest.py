"""What the tests of export share: small models, their bundles, and a web server that can misbehave."""

import http.server
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tclkit.export import export_bundle
from tclkit.tcl import TCL, ClipConfig, TCLConfig, load_model, save_checkpoint, tokenizer_file
from tclkit.tcl.tokenizer_file import pruned_tokenizer_json, vocabulary_size

WORDS = ["a photo of a red circle.", "two green stars"]


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
    tells_whole: False leaves the length of the whole file out of Content-Range.
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
    tells_whole: bool = True
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
            whole = len(content) if site.tells_whole else "*"
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{whole}"
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


@pytest.fixture(scope="session")
def golden_model(golden: Path) -> TCL:
    """The authors' tiny model, for reading only."""
    return load_model(golden / "official_learned.pth", clip=golden / "clip_tiny.pt")


@pytest.fixture(scope="session")
def golden_tokenizer_json() -> str:
    """A tokenizer of 1024 tokens, as many as the tiny golden CLIP knows."""
    merges = tokenizer_file._clip_merges()[: 1024 - 2 * 256 - 2]
    return tokenizer_file._tokenizer_json(merges)


@pytest.fixture(scope="session")
def golden_bundle(golden: Path, golden_tokenizer_json: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of the authors' tiny model in two sizes, for reading only."""
    return export_bundle(
        golden / "official_learned.pth",
        tmp_path_factory.mktemp("bundles") / "golden",
        clip=golden / "clip_tiny.pt",
        sizes=[(64, 64), (96, 80)],
        tokenizer_json=golden_tokenizer_json,
    )


@pytest.fixture(scope="session")
def tiny_tokenizer_json() -> str:
    """The tokenizer of `make_model`'s text encoder."""
    return pruned_tokenizer_json(WORDS)


@pytest.fixture(scope="session")
def make_model(tiny_tokenizer_json: str) -> Callable[..., TCL]:
    """make_model(patch_size=8, decoder_blocks=1, ...): a small TCL on random weights whose every part counts."""

    def make(decoder_blocks: int = 2, **changes: Any) -> TCL:
        values: dict[str, Any] = {
            "embed_dim": 24,
            "image_size": 64,
            "patch_size": 16,
            "vision_width": 32,
            "vision_layers": 2,
            "vision_head_width": 16,
            "context_length": 12,
            "vocab_size": vocabulary_size(tiny_tokenizer_json),
            "text_width": 16,
            "text_heads": 2,
            "text_layers": 2,
            "quick_gelu": False,
        }
        torch.manual_seed(0)
        model = TCL(TCLConfig(clip=ClipConfig(**{**values, **changes}), decoder_blocks=decoder_blocks))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("gate.gate"):
                    parameter.fill_(0.6)
                elif parameter.ndim == 1 or "positional" in name or "class_embedding" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        return model.requires_grad_(False)

    return make


@pytest.fixture
def tiny_checkpoint(make_model: Callable[..., TCL], tiny_tokenizer_json: str, tmp_path: Path) -> Path:
    """A checkpoint of ours that says everything about itself that the exporter can use."""
    path = tmp_path / "tcl.pt"
    extra = {
        "name": "tiny-shapes",
        "description": "knows circles",
        "tokenizer_json": tiny_tokenizer_json,
        "templates": ["a {}.", "a photo of a {}."],
        "image_size": 48,
        "vocabulary": {"note": "knows circles only", "words": ["circle", "red"]},
        "thresholds": {"background": 0.45},
        "train_config": {"seed": 0},
    }
    save_checkpoint(path, make_model(), extra=extra)
    return path
