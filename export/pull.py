"""Published models: fetched from where their authors put them, and built into bundles here."""

import difflib
import hashlib
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tclkit.runtime.bundle import list_bundles, open_bundle
from tclkit.runtime.errors import BundleError, CheckpointError, DownloadError, InputError
from tclkit.runtime.files import cache_folder, models_folder, sha256_from_file

from .bundle_folder import require_replaceable
from .bundle_writer import ExportProgress, export_bundle
from .decoder import DEFAULT_DECODER, DecoderForm
from .download import download

DownloadProgress = Callable[[str, int, int | None], None]
"""Called as progress(file_name, bytes_so_far, bytes_in_all); the latter is None when the server does not say."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedModel:
    """Where a model comes from.

    url: of the authors' checkpoint, which holds the learned parameters only.
    clip, clip_tag: open_clip's name of the CLIP it was trained on.
    """

    url: str
    clip: str
    clip_tag: str


PUBLISHED_MODELS = {
    "tcl-vit-b-16": PublishedModel(
        url="https://github.com/kakaobrain/tcl/releases/download/v1.0.0/tcl.pth", clip="ViT-B-16", clip_tag="openai"
    ),
}


def pull(
    name: str,
    *,
    checkpoint: str | Path | None = None,
    clip: str | Path | None = None,
    url: str | None = None,
    clip_url: str | None = None,
    sha256: str | None = None,
    out: str | Path | None = None,
    sizes: Sequence[tuple[int, int]] | None = None,
    decoder: DecoderForm = DEFAULT_DECODER,
    progress: DownloadProgress | None = None,
    export_progress: ExportProgress | None = None,
) -> Path:
    """Fetch what a published model is made of, build its bundle and return the bundle's folder.

    Downloads are kept in the cache folder and resumed. CLIP's file is compared with the SHA-256 that open_clip
    publishes with its address. The authors of TCL publish no hash of tcl.pth: it is compared only with `sha256`, where
    given; else the hash of what arrived is announced, and noted in the bundle's provenance.

    Args:
        name: one of `PUBLISHED_MODELS`.
        checkpoint: a local copy of the authors' checkpoint.
        clip: a local copy of CLIP, or open_clip's name of one.
        url: another address of the checkpoint, a mirror for example.
        clip_url: another address of CLIP; the file there must have the published hash.
        sha256: expected hash of the checkpoint.
        out: the bundle's folder; None: `models_folder()`/name, and a whole bundle that is there already is kept when
            nothing else was asked for.
        sizes, decoder: see `export_bundle`.
        progress: of downloads.
        export_progress: of building the bundle.

    Raises:
        InputError: no such model, or `sha256` is none.
        DownloadError: a file could not be fetched or is not the one expected; see `download`.
        CheckpointError: `clip` is neither a file nor a name; see `export_bundle`.
        ExportError: `out` is a file or holds other files; see `export_bundle`.
        ParityError: see `export_bundle`.
    """
    published = _published(name)
    folder = models_folder() / name if out is None else Path(out)
    if not any((checkpoint, clip, url, clip_url, sha256, out, sizes, decoder != DEFAULT_DECODER)) and _is_whole(folder):
        return folder
    _require_usable(folder, clip, sha256)
    sources: dict[str, Any] = {}
    if checkpoint is None:
        checkpoint = _fetch_checkpoint(url or published.url, sha256, progress, sources)
    elif sha256 is not None:
        _require_digest(Path(checkpoint), sha256)
    if clip is None and not _holds_clip(checkpoint):
        clip = _fetch_clip(published, clip_url, progress, sources)
    return export_bundle(
        checkpoint,
        folder,
        clip=clip,
        sizes=sizes,
        decoder=decoder,
        name=name,
        sources=sources,
        progress=export_progress,
    )


def _published(name: str) -> PublishedModel:
    if name in PUBLISHED_MODELS:
        return PUBLISHED_MODELS[name]
    close = difflib.get_close_matches(name, PUBLISHED_MODELS, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    if name in (bundle.folder.name for bundle in list_bundles()):
        hint = " One of this name is installed already."
    raise InputError(
        f"there is no published model {name!r}.{hint} Published: {', '.join(PUBLISHED_MODELS)}. A checkpoint of your "
        "own becomes a bundle with tclkit export CHECKPOINT -o FOLDER",
        name=name,
    )


def _require_usable(folder: Path, clip: str | Path | None, sha256: str | None) -> None:
    """Refuse what could only fail, before hundreds of megabytes are fetched."""
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise InputError(f"{sha256!r} is no SHA-256: that is 64 digits from 0 to 9 and a to f", sha256=sha256)
    require_replaceable(folder)
    if clip is not None:
        from tclkit.tcl.clip import require_clip

        require_clip(clip)


def _is_whole(folder: Path) -> bool:
    try:
        open_bundle(folder)
    except BundleError:
        return False
    return True


def _fetch_checkpoint(url: str, sha256: str | None, progress: DownloadProgress | None, sources: dict[str, Any]) -> Path:
    path = _fetch(url, sha256, progress)
    try:
        _holds_clip(path)
    except CheckpointError as error:
        path.unlink(missing_ok=True)  # else the next call would take it from the cache
        why = error.message.rstrip(".")
        raise DownloadError(f"{url} is not the checkpoint: {why}. It was removed from the cache", url=url) from error
    found = sha256_from_file(path)
    if sha256 is None:
        _log.warning(
            "%s: its authors publish no hash, so it was compared with none. Its SHA-256 is %s; give sha256 to "
            "require it next time",
            url,
            found,
        )
    sources["checkpoint"] = {"url": url, "sha256": found, "is_verified": sha256 is not None}
    return path


def _fetch_clip(
    published: PublishedModel, clip_url: str | None, progress: DownloadProgress | None, sources: dict[str, Any]
) -> Path:
    url, sha256 = _clip_address(published)
    path = _fetch(clip_url or url, sha256, progress)
    sources["clip"] = {"url": clip_url or url, "sha256": sha256, "is_verified": True}
    return path


def _clip_address(published: PublishedModel) -> tuple[str, str]:
    """Address and SHA-256 of a CLIP by open_clip's table, where OpenAI's addresses hold the hash."""
    import open_clip

    name = f"{published.clip}:{published.clip_tag}"
    url = open_clip.get_pretrained_cfg(published.clip, published.clip_tag).get("url", "")
    digest = re.search(r"/([0-9a-f]{64})/", url)
    if digest is None:
        raise DownloadError(
            f"open_clip {open_clip.__version__} knows no address with a hash for {name}. Fetch "
            f"OpenAI's {published.clip}.pt by hand and give its path as clip (--clip FILE)"
        )
    return url, digest[1]


def _fetch(url: str, sha256: str | None, progress: DownloadProgress | None) -> Path:
    """Download into the cache, under a name that no other address shares."""
    file = Path(urlsplit(url).path).name or "file"
    target = cache_folder() / "downloads" / f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{file}"
    report = (lambda done, total: progress(file, done, total)) if progress else None
    return download(url, target, sha256=sha256, progress=report)


def _holds_clip(checkpoint: str | Path) -> bool:
    from tclkit.tcl.checkpoint import load_checkpoint
    from tclkit.tcl.official import clip_name

    content = load_checkpoint(checkpoint)
    return content["format"] == "tclkit" or any(clip_name(name) for name in content["model"])


def _require_digest(path: Path, sha256: str) -> None:
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}", path=str(path))
    found = sha256_from_file(path)
    if found != sha256.lower():
        raise DownloadError(
            f"{path} has SHA-256 {found}, expected {sha256.lower()}. Fetch it again", expected=sha256, found=found
        )
