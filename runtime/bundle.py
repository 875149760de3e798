"""Bundles: one folder that is a deployable model, found by name, read strictly and verified before use.

bundle.json (schema 1) names every other file of the folder with its SHA-256 and size, and may seal itself with
`manifest_sha256`. `tclkit export` writes it; nothing here is trusted until it was checked.
"""

import difflib
import hashlib
import json
import logging
import math
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import BundleError
from .external_weights import has_external_weights
from .files import atomic_file, models_folder, sha256_from_file
from .manifest import Manifest, manifest_from_dict

MANIFEST_NAME = "bundle.json"
ENGINES_FOLDER = "engines"  # compiled on one device for itself: bundle.json, which travels, does not list what is in it
_SEAL = "manifest_sha256"
PUBLISHED_NAMES = ("tcl-vit-b-16",)  # what `tclkit pull` fetches; where from is known to tclkit.export.pull
_AGAIN = "Fetch or export the bundle again: tclkit pull NAME, or tclkit export CHECKPOINT -o FOLDER"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundle:
    """An opened bundle: where it lies and what its bundle.json says.

    folder: the bundle's folder, resolved.
    manifest: bundle.json, checked.
    """

    folder: Path
    manifest: Manifest

    @property
    def name(self) -> str:
        """The model's name as bundle.json gives it."""
        return self.manifest.name

    @property
    def size_bytes(self) -> int:
        """Size of all listed files."""
        return sum(record.size_bytes for record in self.manifest.files.values())

    @property
    def text_encoder_hash(self) -> str:
        """Hex SHA-256 of all that makes a text embedding: the text graph, the tokenizer, the context length."""
        files = self.manifest.files
        parts = [files[self.manifest.text].sha256, files[self.manifest.tokenizer].sha256]
        return hashlib.sha256(json.dumps([*parts, self.manifest.model.context_length]).encode()).hexdigest()

    def path(self, file: str) -> Path:
        """Path of a file that bundle.json lists, known to lie inside the bundle.

        Raises:
            BundleError: the file is not listed, missing, or leads outside the folder.
        """
        if file not in self.manifest.files:
            raise BundleError(f"{self.folder / MANIFEST_NAME} lists no file {file!r}. {_AGAIN}", file=file)
        return _confined_path(self.folder, file)

    def verify(self) -> None:
        """Compare size and SHA-256 of every listed file with bundle.json.

        Raises:
            BundleError: a file is missing or differs; names the file, what was expected and what was found. Or a graph
                keeps weights in other files.
        """
        for file in self.manifest.files:
            self.verify_file(file)

    def verify_file(self, file: str) -> None:
        """Compare one file with bundle.json; see `verify`."""
        path, record = self.path(file), self.manifest.files[file]
        try:
            size = path.stat().st_size
            if size != record.size_bytes:
                raise _damaged(path, "size", f"{record.size_bytes} bytes", f"{size} bytes")
            found = sha256_from_file(path)
            is_whole = file not in self._graphs() or not has_external_weights(path)
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error.strerror}", file=file) from error
        if found != record.sha256:
            raise _damaged(path, "SHA-256", record.sha256, found)
        if not is_whole:
            raise BundleError(
                f"{path} keeps weights in other files, which no hash in {MANIFEST_NAME} speaks for. {_AGAIN}", file=file
            )

    def _graphs(self) -> set[str]:
        """Names of the files that are graphs."""
        manifest = self.manifest
        images = [file for entry in manifest.images for file in entry.files.values()]
        own = [graph.file for entry in manifest.images for graph in entry.processor.values()]
        return {manifest.masks, manifest.text, *images, *own}


def open_bundle(name_or_path: str | Path, *, verify: bool = True) -> Bundle:
    """Find a bundle, read its bundle.json and check every file against it.

    Args:
        name_or_path: a folder that holds bundle.json, or the name of a model: one in `models_folder()`, else one that
            ships with tclkit.
        verify: compare sizes and hashes of all files (reads every byte once).

    Raises:
        BundleError: unknown name, or a bundle that is incomplete, damaged, or of another schema.
    """
    folder = find_bundle(name_or_path)
    bundle = Bundle(folder=folder, manifest=read_manifest(folder))
    for file in bundle.manifest.files:
        bundle.path(file)
    if verify:
        bundle.verify()
    return bundle


def find_bundle(name_or_path: str | Path) -> Path:
    """Folder of a bundle, by path or by name; see `open_bundle`."""
    if not isinstance(name_or_path, (str, Path)):
        raise BundleError(f"a model is a name or a folder, found {type(name_or_path).__name__}")
    given = Path(name_or_path).expanduser()
    if not str(name_or_path).strip():
        raise BundleError("the model's name is empty. Name an installed model (tclkit info lists them) or a folder")
    try:
        if (given / MANIFEST_NAME).is_file():
            return given.resolve()
        if given.name == MANIFEST_NAME and given.is_file():
            return given.parent.resolve()
        if _is_plain_name(str(name_or_path)):
            for home in _homes():
                if (home / given / MANIFEST_NAME).is_file():
                    return (home / given).resolve()
    except (
        OSError,
        ValueError,
    ) as error:  # a name too long for the file system, a NUL in it, a folder we may not enter
        why = getattr(error, "strerror", None) or error
        raise BundleError(f"{_short(name_or_path)!r} cannot be looked up: {why}", name=str(name_or_path)) from error
    raise _not_found(name_or_path, given)


def list_bundles() -> list[Bundle]:
    """All bundles that can be opened by name, sorted by folder name, their files not verified.

    A folder whose bundle.json cannot be used is announced as a warning and left out. A bundle in `models_folder()`
    hides one of the same name that ships with tclkit, as in `open_bundle`.
    """
    opened = (_opened_or_announced(folder) for folder in _installed_folders())
    return [bundle for bundle in opened if bundle is not None]


def read_manifest(folder: str | Path) -> Manifest:
    """Read and check `folder`/bundle.json.

    Raises:
        BundleError: missing, not JSON, damaged, of another schema, or wrong in a key.
    """
    path = Path(folder) / MANIFEST_NAME
    try:
        raw = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant, parse_float=_finite)
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}. {_AGAIN}", file=MANIFEST_NAME) from error
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not valid JSON ({error}). {_AGAIN}", file=MANIFEST_NAME) from error
    if not isinstance(raw, dict):
        raise BundleError(f"{path} should hold a JSON object, found {type(raw).__name__}. {_AGAIN}", file=MANIFEST_NAME)
    seal = raw.pop(_SEAL, None)
    if seal is not None and seal != _seal(raw):
        raise _damaged(path, "SHA-256", str(seal), _seal(raw))
    return manifest_from_dict(raw, where=str(path))


def write_manifest(folder: str | Path, manifest: Mapping[str, Any]) -> Manifest:
    """Write `folder`/bundle.json with size and SHA-256 of every file that lies in the folder, checked and sealed.

    Args:
        folder: holds all the bundle's files already; engines are not listed.
        manifest: bundle.json as a dict; its `files` is made here.

    Raises:
        BundleError: what would be written is not a valid manifest.
    """
    folder = Path(folder)
    found = sorted(path for path in folder.rglob("*") if path.is_file() and _belongs(path.relative_to(folder)))
    files = {
        path.relative_to(folder).as_posix(): {"sha256": sha256_from_file(path), "size_bytes": path.stat().st_size}
        for path in found
    }
    raw = {key: value for key, value in manifest.items() if key != _SEAL} | {"files": files}
    checked = manifest_from_dict(raw, where=str(folder / MANIFEST_NAME))
    text = json.dumps({**raw, _SEAL: _seal(raw)}, indent=1, ensure_ascii=False, allow_nan=False)
    with atomic_file(folder / MANIFEST_NAME) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    return checked


def _belongs(path: Path) -> bool:
    """Whether bundle.json lists a file of its folder."""
    return path != Path(MANIFEST_NAME) and path.parts[0] != ENGINES_FOLDER


def _seal(raw: Mapping[str, Any]) -> str:
    """Hash of the values, whatever the layout: a byte flipped inside bundle.json itself shows."""
    canonical = json.dumps(raw, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _refuse_constant(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is beyond what a float holds")
    return value


def _confined_path(folder: Path, file: str) -> Path:
    """Path of `file` in `folder`; refuses absolute paths, "..", and links that lead out of the folder."""
    parts = PurePosixPath(file)
    if not file or parts.is_absolute() or ".." in parts.parts or "\\" in file or ":" in file or "\0" in file:
        raise BundleError(f"{folder / MANIFEST_NAME} names {file!r}, which is no path inside the bundle", file=file)
    path = folder.joinpath(*parts.parts)
    root = folder.resolve()
    try:
        resolved = path.resolve(strict=True)
        regular = stat.S_ISREG(resolved.stat().st_mode)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise BundleError(f"{path} is listed in bundle.json but is not there. {_AGAIN}", file=file) from error
    if not resolved.is_relative_to(root):
        raise BundleError(f"{path} leads outside the bundle, to {resolved}. {_AGAIN}", file=file)
    if not regular:
        raise BundleError(f"{path} is not a regular file. {_AGAIN}", file=file)
    return resolved


def _damaged(path: Path, what: str, expected: str, found: str) -> BundleError:
    message = f"{path} is damaged: expected {what} {expected}, found {found}. {_AGAIN}"
    return BundleError(message, file=path.name, expected=expected, found=found)


def _embedded_folder() -> Path:
    """Models that ship inside the package."""
    return Path(__file__).resolve().parent / "models"


def _homes() -> tuple[Path, Path]:
    return models_folder(), _embedded_folder()


def _is_plain_name(name: str) -> bool:
    return name not in (".", "..") and "/" not in name and "\\" not in name


def _opened_or_announced(folder: Path) -> Bundle | None:
    try:
        return open_bundle(folder, verify=False)
    except BundleError as error:
        _log.warning("left out: %s", error)
        return None


def _installed_folders() -> list[Path]:
    folders: dict[str, Path] = {}
    for home in _homes():
        for folder in _subfolders(home):  # a leading dot marks a bundle that is still being written
            if not folder.name.startswith(".") and (folder / MANIFEST_NAME).is_file():
                folders.setdefault(folder.name, folder)
    return [folders[name] for name in sorted(folders)]


def _subfolders(home: Path) -> list[Path]:
    try:
        return list(home.iterdir()) if home.is_dir() else []
    except OSError as error:
        _log.warning("the models folder %s cannot be read: %s", home, error.strerror)
        return []


def _not_found(name_or_path: str | Path, given: Path) -> BundleError:
    name = _short(name_or_path)
    installed = [folder.name for folder in _installed_folders()]
    if given.exists() and not _is_plain_name(str(name_or_path)):
        message = f"{name} is no bundle: there is no {MANIFEST_NAME} in it"
    else:
        message = (
            f"model {name!r} is not installed in {models_folder()}, and no folder of this name holds a {MANIFEST_NAME}"
        )
    close = difflib.get_close_matches(str(name_or_path)[:100], [*installed, *PUBLISHED_NAMES], n=1)
    hint = f" Did you mean {close[0]!r}?" if close and close[0] != name else ""
    have = f" Installed: {', '.join(installed)}." if installed else ""
    fetch = "Either fetch it" if name in PUBLISHED_NAMES else "Either fetch a published model"
    ways = (
        f"{fetch}: tclkit pull {name if name in PUBLISHED_NAMES else ' or '.join(PUBLISHED_NAMES)}, or build one from "
        "a checkpoint: tclkit export CHECKPOINT -o FOLDER and give the folder as the model"
    )
    return BundleError(f"{message}.{hint}{have} {ways}", name=str(name_or_path), installed=installed)


def _short(name: str | Path) -> str:
    text = "".join(character if character.isprintable() else "?" for character in str(name))
    return text if len(text) <= 80 else text[:77] + "..."
