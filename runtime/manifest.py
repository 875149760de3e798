"""What bundle.json says, as frozen dataclasses, read strictly: a wrong, missing or unknown key is one clear error."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ._section import AGAIN, Section
from .errors import BundleError

SCHEMA_VERSION = 1
PRECISIONS = ("fp32", "fp16", "int8")
"""Of the image graphs' files."""
PROCESSOR_PRECISIONS = ("fp32", "int8")
"""Of the graphs that only processors run."""
RUN_PRECISIONS = ("fp32", "fp16", "bf16", "int8")
"""What a backend may compute in: bf16 is no file of its own, but the float32 graph computed in bfloat16."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInfo:
    """Shape of the model.

    architecture: open_clip's name of the ViT, or "custom".
    patch_size: pixels along one side of a patch.
    embed_dim: width D of text embeddings and features.
    context_length: tokens the text encoder reads at most.
    vocab_size: tokens the tokenizer knows.
    mask_scale: the mask grid is the patch grid times this.
    """

    architecture: str
    patch_size: int
    embed_dim: int
    context_length: int
    vocab_size: int
    mask_scale: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessorGraph:
    """A graph that only processors run: the float32 graph with its decoder in a form that is quicker there.

    file: its name.
    decoder: that form, such as "winograd4".
    source_sha256: of the float32 graph that it was made from, as bundle.json had it then.
    """

    file: str
    decoder: str
    source_sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageEntry:
    """One image size of the bundle.

    height, width: pixels the graph takes.
    files: file name by precision ("fp32", "fp16", "int8"): what every device runs.
    processor: by precision ("fp32", "int8") what processors run in its place; empty in a bundle as it was exported.
    """

    height: int
    width: int
    files: Mapping[str, str]
    processor: Mapping[str, ProcessorGraph] = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return self.height, self.width


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocessing:
    """What the image graph does with the bytes, for information; `mean` is also the colour of padding.

    mean, std: RGB, on the scale of 0 to 255.
    interpolation: how images are resized before the graph.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Thresholds:
    """Values of the background channel.

    background: without PAMR, in [0, 1].
    background_pamr: with PAMR, in [0, 1].
    """

    background: float
    background_pamr: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """What a model with a small world knows.

    note: a sentence for the user.
    words: lower-case words the model was trained with.
    """

    note: str
    words: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """What a file of the bundle has to be.

    sha256: hex SHA-256 of its bytes.
    size_bytes: its size.
    """

    sha256: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """bundle.json, schema 1.

    name, description, created (ISO time), tclkit_version: for people.
    model, images, preprocessing, thresholds, vocabulary (None: open): see their classes.
    masks, text, tokenizer: file names.
    templates: prompt templates, each with one "{}".
    kp_w: default share of the KP branch in [0, 1]; 0 means the graphs have no such branch.
    files: every file of the bundle but bundle.json.
    provenance, checks: as written by the exporter.
    """

    name: str
    description: str
    created: str
    tclkit_version: str
    model: ModelInfo
    images: tuple[ImageEntry, ...]
    masks: str
    text: str
    tokenizer: str
    preprocessing: Preprocessing
    templates: tuple[str, ...]
    kp_w: float
    thresholds: Thresholds
    vocabulary: Vocabulary | None
    files: Mapping[str, FileRecord]
    provenance: Mapping[str, Any]
    checks: Mapping[str, Any]

    @property
    def has_kp(self) -> bool:
        """Whether the graphs have the KP branch."""
        return self.kp_w > 0

    @property
    def precisions(self) -> tuple[str, ...]:
        """Precisions that every image size of the bundle comes in."""
        return tuple(p for p in PRECISIONS if all(p in image.files for image in self.images))

    def processor_graph(self, image: ImageEntry, precision: str) -> ProcessorGraph | None:
        """The graph that processors run in the place of the common one.

        Returns:
            None where there is none, or only one that was made from another float32 graph than the bundle has now.
        """
        graph = image.processor.get(precision)
        return None if graph is None or graph.file in self.outdated_files else graph

    @property
    def outdated_files(self) -> tuple[str, ...]:
        """Processors' graphs that were made from another float32 graph than the bundle has now: nothing runs them."""
        return tuple(
            graph.file
            for image in self.images
            for graph in image.processor.values()
            if graph.source_sha256 != self._float32_sha256(image)
        )

    def _float32_sha256(self, image: ImageEntry) -> str:
        return self.files[image.files["fp32"]].sha256 if "fp32" in image.files else ""


def graph_precision(precision: str) -> str:
    """Precision of the file that is run to compute in one of `RUN_PRECISIONS`."""
    return "fp32" if precision == "bf16" else precision


def manifest_from_dict(raw: Mapping[str, Any], *, where: str) -> Manifest:
    """Check a parsed bundle.json.

    Args:
        raw: the JSON object.
        where: path of the file, for messages.

    Raises:
        BundleError: another schema, or a key that is wrong, missing or unknown; names the key.
    """
    top = Section(raw, where, "")
    version = top.integer("schema_version")
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{where} has schema_version {version}, this tclkit reads {SCHEMA_VERSION}. "
            f"{'Take a newer tclkit' if version > SCHEMA_VERSION else AGAIN}",
            expected=SCHEMA_VERSION,
            found=version,
        )
    manifest = Manifest(
        name=top.text("name"),
        description=top.text("description"),
        created=top.text("created"),
        tclkit_version=top.text("tclkit_version"),
        model=_model(top.section("model")),
        images=tuple(_image(section) for section in top.sections("images")),
        masks=top.text("masks"),
        text=top.text("text"),
        tokenizer=top.text("tokenizer"),
        preprocessing=_preprocessing(top.section("preprocessing")),
        templates=_templates(top),
        kp_w=top.fraction("kp_w"),
        thresholds=_thresholds(top.section("thresholds")),
        vocabulary=_vocabulary(top),
        files=MappingProxyType({name: _record(top.section("files"), name) for name in top.section("files").raw}),
        provenance=MappingProxyType(dict(top.section("provenance").raw)),
        checks=MappingProxyType(dict(top.section("checks").raw)),
    )
    top.refuse_unknown(["schema_version", *Manifest.__dataclass_fields__])
    _check_whole(manifest, where)
    return manifest


def _model(section: Section) -> ModelInfo:
    section.refuse_unknown(ModelInfo.__dataclass_fields__)
    return ModelInfo(
        architecture=section.text("architecture"),
        patch_size=section.positive("patch_size"),
        embed_dim=section.positive("embed_dim"),
        context_length=section.positive("context_length"),
        vocab_size=section.positive("vocab_size"),
        mask_scale=section.positive("mask_scale"),
    )


def _image(section: Section) -> ImageEntry:
    section.refuse_unknown(ImageEntry.__dataclass_fields__)
    files = section.section("files")
    files.refuse_unknown(PRECISIONS)
    names = {precision: files.text(precision) for precision in files.raw}
    return ImageEntry(
        height=section.positive("height"),
        width=section.positive("width"),
        files=MappingProxyType(names),
        processor=MappingProxyType(_processor(section)),
    )


def _processor(image: Section) -> dict[str, ProcessorGraph]:
    if "processor" not in image.raw:  # as exported, and before there were such graphs
        return {}
    section = image.section("processor")
    section.refuse_unknown(PROCESSOR_PRECISIONS)
    if not section.raw:
        raise image.wrong("processor", "at least one graph", {})
    return {precision: _processor_graph(section.section(precision)) for precision in section.raw}


def _processor_graph(section: Section) -> ProcessorGraph:
    section.refuse_unknown(ProcessorGraph.__dataclass_fields__)
    return ProcessorGraph(
        file=section.text("file"), decoder=section.text("decoder"), source_sha256=_sha256(section, "source_sha256")
    )


def _preprocessing(section: Section) -> Preprocessing:
    section.refuse_unknown(Preprocessing.__dataclass_fields__)
    return Preprocessing(
        mean=section.triple("mean"), std=section.triple("std"), interpolation=section.text("interpolation")
    )


def _thresholds(section: Section) -> Thresholds:
    section.refuse_unknown(Thresholds.__dataclass_fields__)
    return Thresholds(background=section.fraction("background"), background_pamr=section.fraction("background_pamr"))


def _vocabulary(top: Section) -> Vocabulary | None:
    if top.value("vocabulary") is None:
        return None
    section = top.section("vocabulary")
    section.refuse_unknown(Vocabulary.__dataclass_fields__)
    return Vocabulary(note=section.text("note"), words=section.texts("words"))


def _record(files: Section, name: str) -> FileRecord:
    section = files.section(name)
    section.refuse_unknown(FileRecord.__dataclass_fields__)
    digest = _sha256(section, "sha256")
    size = section.integer("size_bytes")
    if size < 0:
        raise section.wrong("size_bytes", "0 or more", size)
    return FileRecord(sha256=digest, size_bytes=size)


def _sha256(section: Section, key: str) -> str:
    digest = section.text(key)
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise section.wrong(key, "64 lower-case hexadecimal digits", digest)
    return digest


def _templates(top: Section) -> tuple[str, ...]:
    templates = top.texts("templates")
    for template in templates:
        if template.count("{}") != 1:
            raise top.wrong("templates", 'texts with one "{}" each', template)
    if not templates:
        raise top.wrong("templates", "at least one template", [])
    return templates


def _check_whole(manifest: Manifest, where: str) -> None:
    """What no key shows alone: sizes fit the patch, named files are listed, there is something to run."""
    if not manifest.images:
        raise BundleError(f"{where} lists no image graph under 'images'. {AGAIN}", key="images")
    sizes = [image.size for image in manifest.images]
    if len(set(sizes)) < len(sizes):
        raise BundleError(f"{where} lists an image size twice under 'images'. {AGAIN}", key="images")
    patch = manifest.model.patch_size
    named = [manifest.masks, manifest.text, manifest.tokenizer]
    for image in manifest.images:
        if image.height % patch or image.width % patch:
            size = f"{image.height}x{image.width}"
            raise BundleError(f"{where}: image size {size} is no multiple of the patch, {patch}. {AGAIN}", key="images")
        if not image.files:
            raise BundleError(f"{where}: image size {image.height}x{image.width} names no file. {AGAIN}", key="images")
        named += image.files.values()
    own = [graph.file for image in manifest.images for graph in image.processor.values()]
    for file in own:  # it is removed when its precision is built without it
        if file in named or own.count(file) > 1:
            message = f"{where} names {file!r} under 'processor', and for something else too"
            raise BundleError(f"{message}. {AGAIN}", file=file)
    for file in (*named, *own):
        if file not in manifest.files:
            raise BundleError(f"{where} uses {file!r} but does not list it under 'files'. {AGAIN}", file=file)
