"""Pulling a published model, end to end from a web server on this machine that serves the tiny golden files."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tclkit.export import bundle_writer
from tclkit.export import pull as pull_module
from tclkit.export.pull import PUBLISHED_MODELS, pull
from tclkit.runtime import open_bundle
from tclkit.runtime.bundle import PUBLISHED_NAMES
from tclkit.runtime.errors import CheckpointError, DownloadError, ExportError, InputError
from tclkit.runtime.files import cache_folder, models_folder, sha256_from_file

NAME = "tcl-vit-b-16"
SIZES = [(64, 64)]


@pytest.fixture
def mirror(site: Any, golden: Path, golden_tokenizer_json: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The web as pull sees it: tcl.pth and ViT-B-16.pt are the tiny golden files."""
    digest = sha256_from_file(golden / "clip_tiny.pt")
    clip_path = f"/clip/models/{digest}/ViT-B-16.pt"
    site.files = {
        "/v1.0.0/tcl.pth": (golden / "official_learned.pth").read_bytes(),
        clip_path: (golden / "clip_tiny.pt").read_bytes(),
    }
    published = pull_module.PublishedModel(url=f"{site.url}/v1.0.0/tcl.pth", clip="ViT-B-16", clip_tag="openai")
    monkeypatch.setitem(PUBLISHED_MODELS, NAME, published)
    monkeypatch.setattr("open_clip.get_pretrained_cfg", lambda name, tag: {"url": f"{site.url}{clip_path}"})
    monkeypatch.setattr(bundle_writer, "clip_tokenizer_json", lambda: golden_tokenizer_json)
    return site


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What export_bundle was called with, instead of its being called."""
    calls: list[dict[str, Any]] = []

    def export(checkpoint: str | Path, out: str | Path, **options: Any) -> Path:
        calls.append({"checkpoint": Path(checkpoint), "out": Path(out), **options})
        return Path(out)

    monkeypatch.setattr(pull_module, "export_bundle", export)
    return calls


def paths(site: Any) -> list[str]:
    return [path.rsplit("/", 1)[1] for path, _, _ in site.requests]


def test_the_published_model_is_the_authors() -> None:
    model = PUBLISHED_MODELS[NAME]
    assert model.url == "https://github.com/kakaobrain/tcl/releases/download/v1.0.0/tcl.pth"
    url, digest = pull_module._clip_address(model)
    assert url.startswith("https://openaipublic.azureedge.net/")
    assert digest == "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"


def test_end_to_end_over_a_breaking_connection(mirror: Any, golden: Path, caplog: pytest.LogCaptureFixture) -> None:
    mirror.break_after = [1_000_000, 500_000, None, 700_000]
    bytes_seen: dict[str, list[int]] = {}
    steps: list[str] = []
    with caplog.at_level(logging.WARNING):
        folder = pull(
            NAME,
            sizes=SIZES,
            progress=lambda file, done, total: bytes_seen.setdefault(file, []).append(done),
            export_progress=lambda what, done, total: steps.append(what),
        )
    assert folder == models_folder() / NAME
    bundle = open_bundle(NAME)
    assert bundle.name == NAME
    digests = {
        "tcl.pth": sha256_from_file(golden / "official_learned.pth"),
        "ViT-B-16.pt": sha256_from_file(golden / "clip_tiny.pt"),
    }
    assert {file: seen[-1] for file, seen in bytes_seen.items()} == {
        "tcl.pth": (golden / "official_learned.pth").stat().st_size,
        "ViT-B-16.pt": (golden / "clip_tiny.pt").stat().st_size,
    }
    assert [status for _, _, status in mirror.requests] == [200, 206, 206, 200, 206]
    assert steps[-1] == "done"
    provenance = bundle.manifest.provenance
    assert provenance["checkpoint_sha256"] == digests["tcl.pth"]
    assert provenance["clip_sha256"] == digests["ViT-B-16.pt"]
    assert provenance["sources"]["checkpoint"]["is_verified"] is False
    assert provenance["sources"]["clip"]["is_verified"] is True
    assert digests["tcl.pth"] in caplog.text
    assert "publish no hash" in caplog.text

    mirror.requests.clear()
    assert pull(NAME) == folder  # nothing left to do
    assert mirror.requests == []


def test_downloads_are_kept_for_the_next_time(mirror: Any, exported: list[dict[str, Any]], tmp_path: Path) -> None:
    for _ in range(2):
        pull(NAME, out=tmp_path / "b")
    assert paths(mirror) == ["tcl.pth", "ViT-B-16.pt"]
    assert exported[0]["checkpoint"] == exported[1]["checkpoint"]
    assert exported[0]["checkpoint"].is_relative_to(cache_folder())


def test_local_copies_need_no_network(
    mirror: Any, exported: list[dict[str, Any]], golden: Path, tmp_path: Path
) -> None:
    checkpoint, clip = golden / "official_learned.pth", golden / "clip_tiny.pt"
    pull(NAME, checkpoint=checkpoint, clip=clip, out=tmp_path / "b")
    assert mirror.requests == []
    assert (exported[0]["checkpoint"], exported[0]["clip"], exported[0]["name"]) == (checkpoint, clip, NAME)


def test_a_local_checkpoint_alone_fetches_clip(
    mirror: Any, exported: list[dict[str, Any]], golden: Path, tmp_path: Path
) -> None:
    pull(NAME, checkpoint=golden / "official_learned.pth", out=tmp_path / "b")
    assert paths(mirror) == ["ViT-B-16.pt"]


def test_a_checkpoint_with_its_own_clip_fetches_none(
    mirror: Any, exported: list[dict[str, Any]], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    pull(NAME, checkpoint=tiny_checkpoint, out=tmp_path / "b")
    assert mirror.requests == []
    assert exported[0]["clip"] is None


def test_a_mirror_is_asked_for_the_same_files(mirror: Any, exported: list[dict[str, Any]], tmp_path: Path) -> None:
    contents = list(mirror.files.values())
    mirror.files = {"/my/tcl.pth": contents[0], "/my/clip.pt": contents[1]}
    pull(NAME, url=f"{mirror.url}/my/tcl.pth", clip_url=f"{mirror.url}/my/clip.pt", out=tmp_path / "b")
    assert paths(mirror) == ["tcl.pth", "clip.pt"]
    assert exported[0]["sources"]["checkpoint"]["url"] == f"{mirror.url}/my/tcl.pth"


def test_an_expected_hash_is_required(
    mirror: Any, exported: list[dict[str, Any]], golden: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    right = sha256_from_file(golden / "official_learned.pth")
    with pytest.raises(DownloadError, match=r"tcl\.pth gave a file with SHA-256"):
        pull(NAME, sha256="0" * 64, out=tmp_path / "b")
    pull(NAME, sha256=right, out=tmp_path / "b")
    assert exported[0]["sources"]["checkpoint"]["is_verified"] is True
    assert caplog.text == ""


def test_a_local_checkpoint_of_another_hash_is_refused(
    exported: list[dict[str, Any]], golden: Path, tmp_path: Path
) -> None:
    with pytest.raises(DownloadError, match=r"official_learned\.pth has SHA-256 .*, expected 000"):
        pull(NAME, checkpoint=golden / "official_learned.pth", sha256="0" * 64, out=tmp_path / "b")
    with pytest.raises(CheckpointError, match="there is no file"):
        pull(NAME, checkpoint=tmp_path / "none.pth", sha256="0" * 64, out=tmp_path / "b")
    assert exported == []


@pytest.mark.parametrize("fault", ["wrong clip", "no checkpoint", "not found", "cut checkpoint"])
def test_nothing_is_built_from_what_is_wrong(
    mirror: Any, exported: list[dict[str, Any]], tmp_path: Path, fault: str
) -> None:
    (checkpoint_path, checkpoint), (clip_path, clip) = mirror.files.items()
    faults: dict[str, tuple[dict[str, bytes], str]] = {
        "wrong clip": ({clip_path: clip[:-1] + b"x"}, "SHA-256"),
        "no checkpoint": ({checkpoint_path: b"hello"}, "is not the checkpoint"),
        "not found": ({checkpoint_path: b""}, "404"),
        "cut checkpoint": ({checkpoint_path: checkpoint[:-1000]}, "is not the checkpoint"),
    }
    changed, message = faults[fault]
    mirror.files = {path: content for path, content in {**mirror.files, **changed}.items() if content}
    with pytest.raises(DownloadError, match=message) as caught:
        pull(NAME, out=tmp_path / "b")
    assert ".." not in str(caught.value)
    assert exported == []
    assert not (tmp_path / "b").exists()

    mirror.files = {checkpoint_path: checkpoint, clip_path: clip}
    pull(NAME, out=tmp_path / "b")
    assert len(exported) == 1


def test_a_damaged_bundle_is_built_anew(mirror: Any, exported: list[dict[str, Any]]) -> None:
    folder = models_folder() / NAME
    folder.mkdir(parents=True)
    (folder / "bundle.json").write_text("{}")
    pull(NAME)
    assert exported[0]["out"] == folder


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tcl-vit-b16", r"no published model 'tcl-vit-b16'\. Did you mean 'tcl-vit-b-16'\?.*tclkit export"),
        ("", "no published model ''"),
        ("../x", "no published model"),
    ],
)
def test_an_unknown_model_is_one_clear_error(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pull(name)


def test_a_model_that_is_installed_but_not_published(write_tiny_bundle: Callable[..., Path]) -> None:
    write_tiny_bundle(models_folder() / "mine")
    with pytest.raises(InputError, match="One of this name is installed already"):
        pull("mine")


def test_a_clip_without_a_published_hash_is_not_fetched(
    mirror: Any, exported: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("open_clip.get_pretrained_cfg", lambda name, tag: {"hf_hub": "somewhere/"})
    with pytest.raises(DownloadError, match=r"no address with a hash for ViT-B-16:openai.*--clip FILE"):
        pull(NAME, out=tmp_path / "b")


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"sha256": "zz"}, InputError, "'zz' is no SHA-256"),
        ({"clip": "/nope/clip.pt"}, CheckpointError, "neither a file nor an open_clip model"),
        ({"out": "file"}, ExportError, "file is a file"),
        ({"out": "."}, ExportError, "holds other files"),
    ],
    ids=str,
)
def test_what_could_only_fail_is_refused_before_anything_is_fetched(
    mirror: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, str],
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    with pytest.raises(error, match=message):
        pull(NAME, **({"out": "new"} | given))  # type: ignore[arg-type]
    assert paths(mirror) == []


def test_the_runtime_knows_the_names_that_can_be_pulled() -> None:
    assert set(PUBLISHED_NAMES) == set(PUBLISHED_MODELS)
