"""How fast a model is on this machine, what takes the time, and how near it comes to what the machine can do.

Contenders are measured in one process, in rounds: in every round each contender does each piece of work once, in an
order drawn anew, so that what changes on the machine meets all of them alike. Peak memory, which a shared process
cannot show, is measured in a process of its own for each.
"""

import contextlib
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from tclkit.runtime.backends import Backend, available_backends, image_file
from tclkit.runtime.bundle import Bundle, open_bundle
from tclkit.runtime.errors import InputError, TclkitError
from tclkit.runtime.images import load_image
from tclkit.runtime.manifest import RUN_PRECISIONS
from tclkit.runtime.prompts import PromptSet
from tclkit.runtime.segmenter import Segmenter
from tclkit.runtime.text_cache import TextCache

from .bench_contenders import Entrant, Size, bundle_of_size, choose_entrants
from .bench_inputs import Picture, open_picture, prompt_texts, with_random_rest
from .bench_machine import current_load, describe_machine
from .bench_memory import MemoryJob, measure_peak_memory
from .bench_results import GRAPHS, STAGES, BenchResult, BenchRow, ContenderReport, spread_from_samples
from .bench_work import ONNX_REMEDY, can_count, graph_gflop, image_inputs, masks_gflop, reference_gflop
from .evaluation import Contender
from .gemm_peak import GemmMeter, GemmPeak, best_peaks, open_gemm_meters
from .progress import silent

Progress = Callable[[str, int, int], None]
MOST_PROMPTS, MOST_IMAGES = 10_000, 256
_EMBEDDED = 20  # prompts that go through the text encoder; what compares prompts does not see where they come from
_TEXT_ROUNDS, _CACHED_RUNS = 3, 4
_SETTLE_S = 0.005  # threads of the runtime before, which wait for work for a while, have gone to sleep by then
_ON_CPU = ("onnxruntime", "openvino", "torch")
_QUICK_MS = 50.0  # what takes less runs once unmeasured first: its caches were lost to the others
_PEAK_SAMPLES = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchSettings:
    """What is measured, and how.

    Of sizes, batches and prompts the first is the base; the others are measured one at a time, the rest at the base.

    model: name of an installed bundle, or its folder.
    backends: names; empty takes all that can be used here.
    precisions: names; empty takes all the bundle has.
    contenders: other implementations beside them; they run in fp32.
    prompts: numbers of prompts.
    sizes: (H, W) of image graphs; empty takes all the bundle has.
    batches: images that go through the graphs at once; more than one is measured on the graphs alone.
    rounds: measured runs of each.
    warm_up: runs of each before, not measured.
    image: a picture of the user's; None takes the sample scenes.
    threads: CPU threads; None for each backend's own choice.
    seed: of the order within the rounds.
    memory: measure peak memory.
    gemm_side: rows and columns of the matrices whose multiplication is the machine's peak; 0 measures none.
    """

    model: str
    backends: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    contenders: tuple[Contender, ...] = ()
    prompts: tuple[int, ...] = (20, 1, 150)
    sizes: tuple[Size, ...] = ()
    batches: tuple[int, ...] = (1,)
    rounds: int = 10
    warm_up: int = 2
    image: Path | None = None
    threads: int | None = None
    seed: int = 0
    memory: bool = True
    gemm_side: int = 2048

    def __post_init__(self) -> None:
        known = {
            "backends": tuple(status.name for status in available_backends()),
            "precisions": RUN_PRECISIONS,
        }
        for field, names in known.items():
            for name in getattr(self, field):
                if name not in names:
                    raise InputError(f"unknown {field[:-1]} {name!r}. Choose some of {', '.join(names)}")
        for field, most in (("prompts", MOST_PROMPTS), ("batches", MOST_IMAGES)):
            wrong = [number for number in getattr(self, field) if not 1 <= number <= most]
            if wrong or not getattr(self, field):
                raise InputError(f"{field} should be numbers from 1 to {most}, got {wrong[0] if wrong else 'none'}")
        for field in ("backends", "precisions", "prompts", "sizes", "batches"):
            values = getattr(self, field)
            if len(set(values)) != len(values):
                raise InputError(f"{field} should be different ones, got {', '.join(map(str, values))}")
        for field, least in (("rounds", 1), ("warm_up", 1), ("threads", 1), ("seed", 0), ("gemm_side", 0)):
            value = getattr(self, field)
            if value is not None and value < least:
                raise InputError(f"{field} should be {least} or more, got {value}")

    def pieces(self, size: Size, sizes: Sequence[Size]) -> tuple["Piece", ...]:
        """What each contender does at one of the sizes in every round; the base comes first."""
        base = Piece(batch=self.batches[0], prompts=self.prompts[0])
        if size != sizes[0]:
            return (base,)
        return (
            *(replace(base, prompts=count) for count in self.prompts),
            *(replace(base, batch=count) for count in self.batches[1:]),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """One piece of work: so many images at once, compared with so many prompts."""

    batch: int
    prompts: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Job:
    """What all contenders share: the model, the picture and the prompts by their number."""

    settings: BenchSettings
    bundle: Bundle
    picture: Picture
    texts: tuple[str, ...]
    report: Progress


def run_bench(settings: BenchSettings, *, progress: Progress | None = None) -> BenchResult:
    """Measure a model; minutes for a large one.

    Contenders that cannot run are in the result with the reason. Whether one ran at all is for the caller to look at.

    Args:
        settings: what is measured, and how.
        progress: called with (what is done now, steps done, steps in all).

    Raises:
        InputError: a size the bundle has no graph for, a picture that cannot be read, more prompts than can be made.
        BundleError: the model is unknown or damaged.
    """
    load_before = current_load()
    bundle = open_bundle(settings.model)
    chosen = choose_entrants(bundle, settings.backends, settings.precisions, settings.contenders)
    entrants = {entrant.name: entrant for entrant in chosen}
    sizes = settings.sizes or tuple((image.height, image.width) for image in bundle.manifest.images)
    bundles = {size: bundle_of_size(bundle, size) for size in sizes}
    job = _Job(
        settings=settings,
        bundle=bundles[sizes[0]],
        picture=open_picture(settings.image),
        texts=tuple(prompt_texts(max(settings.prompts), bundle.manifest.vocabulary)),
        report=progress or silent,
    )
    meters: list[GemmMeter] = []
    notes: list[str] = []
    reports = {
        name: ContenderReport(name=name, backend=entrant.backend, precision=entrant.precision)
        for name, entrant in entrants.items()
    }
    samples: _Samples = {}
    for size in sizes:
        lanes = _opened_lanes(replace(job, bundle=bundles[size]), chosen, reports)
        if not lanes:
            continue
        try:
            if not samples:
                meters, notes = _opened_meters(job, chosen)
            samples |= _measured_lanes(job, lanes, settings.pieces(size, sizes), meters, reports, size)
            if size == sizes[0]:
                _measure_text(job, lanes, reports)
        finally:
            for lane in lanes:
                lane.close()
    if settings.memory:
        ran = [entrant for entrant in chosen if not reports[entrant.name].problem]
        notes += _measure_memory(job, ran, sizes[0], reports)
    peaks = tuple(meter.peak() for meter in meters)
    work = _Work(bundles, peaks)
    rows = tuple(
        work.row(entrants[name], size, piece, stages)
        for (name, size, piece), stages in samples.items()
        if not reports[name].problem
    )
    notes += work.notes
    machine = describe_machine(load_before=load_before)
    return BenchResult(
        model=bundle.name,
        picture=job.picture.source,
        settings=_settings_dict(settings, sizes),
        text_prompts=len(job.texts[:_EMBEDDED]),
        text_templates=len(bundle.manifest.templates),
        contenders=tuple(reports.values()),
        rows=rows,
        peaks=peaks,
        reference_gflop=reference_gflop(bundle.manifest, sizes[0], settings.batches[0], settings.prompts[0]),
        machine=machine,
        notes=(*notes, *machine.warnings()),
    )


_Key = tuple[str, Size, Piece]
_Samples = dict[_Key, dict[str, list[float]]]
_NEW_PROMPTS = "new prompts"


class _Lane:
    """One contender, opened on one image size."""

    def __init__(self, job: _Job, entrant: Entrant, backend: Backend) -> None:
        self.name, self.backend = entrant.name, backend
        self._job = job
        self.segmenter = Segmenter(job.bundle, backend)
        self._prompts: dict[int, PromptSet] = {}
        image = job.bundle.manifest.images[0]
        self._input_hwc = cv2.resize(job.picture.image_hwc, (image.width, image.height)).astype(np.uint8, copy=False)
        self._features: Any = None
        self._quick: dict[Piece, bool] = {}

    def warm_up(self, pieces: Sequence[Piece], runs: int) -> None:
        """Embed the prompts, run everything so often, and see which pieces are quick."""
        embedded = self.segmenter.prompts(self._job.texts[:_EMBEDDED])
        for count in {piece.prompts for piece in pieces}:
            self._prompts[count] = with_random_rest(embedded, self._job.texts[:count], self._job.settings.seed)
        self._features = self.segmenter.features(self._job.picture.image_hwc)
        for piece in pieces:
            took_ms = [sum(self._run(piece).values()) for _ in range(runs)]
            self._quick[piece] = took_ms[-1] < _QUICK_MS

    def measure(self, piece: Piece) -> dict[str, float]:
        """Milliseconds by stage of one piece of work."""
        time.sleep(_SETTLE_S)
        if self._quick[piece]:
            self._run(piece)
        return self._run(piece)

    def close(self) -> None:
        """Release the model."""
        self._features = None
        self.segmenter.close()

    def _run(self, piece: Piece) -> dict[str, float]:
        prompts = self._prompts[piece.prompts]
        return self._run_frame(prompts) if piece.batch == 1 else self._run_graphs(piece.batch, prompts)

    def _run_frame(self, prompts: PromptSet) -> dict[str, float]:
        """One frame from its bytes to the overlay, and its features with prompts once more."""
        clock = _Clock()
        image_hwc = load_image(self._job.picture.encoded)
        decoded_ms = clock.lap_ms()
        result = self.segmenter(image_hwc, prompts)
        called_ms = clock.lap_ms()
        result.overlay()
        drawn_ms = clock.lap_ms()
        self.segmenter.segment(self._features, prompts)
        again_ms = clock.lap_ms()
        within = [result.timings_ms.get(stage, 0.0) for stage in ("preprocess", "image", "masks")]
        return {
            "decode": decoded_ms,
            "preprocess": within[0],
            "image graph": within[1],
            "mask graph": within[2],
            "post-process": called_ms - sum(within),
            "draw": drawn_ms,
            _NEW_PROMPTS: again_ms,
        }

    def _run_graphs(self, batch: int, prompts: PromptSet) -> dict[str, float]:
        """Both graphs on several images at once."""
        images_BHWC = np.repeat(self._input_hwc[None], batch, axis=0)
        clock = _Clock()
        features = self.backend.image_features(images_BHWC)
        image_ms = clock.lap_ms()
        self.backend.masks(features, prompts.embeddings, self._job.bundle.manifest.kp_w)
        return {"image graph": image_ms, "mask graph": clock.lap_ms()}


class _Clock:
    def __init__(self) -> None:
        self._last_s = time.perf_counter()

    def lap_ms(self) -> float:
        now_s = time.perf_counter()
        took_ms, self._last_s = (now_s - self._last_s) * 1000, now_s
        return took_ms


def draw_rounds(items: Sequence[Any], rounds: int, seed: int) -> Iterator[list[Any]]:
    """All items once a round, every round in an order of its own; the same seed gives the same orders."""
    random = np.random.default_rng(seed)
    for _ in range(rounds):
        yield [items[index] for index in random.permutation(len(items))]


def _opened_meters(job: _Job, entrants: Sequence[Entrant]) -> tuple[list[GemmMeter], list[str]]:
    if not job.settings.gemm_side:
        return [], []
    backends = {"onnxruntime", *(entrant.backend for entrant in entrants)}
    job.report("preparing the peak's matrices", 0, 1)
    return open_gemm_meters(backends, threads=job.settings.threads, side=job.settings.gemm_side)


def _opened_lanes(job: _Job, entrants: Sequence[Entrant], reports: dict[str, ContenderReport]) -> list[_Lane]:
    """A lane for each contender that can be opened; why others cannot goes into their reports."""
    lanes = []
    for number, entrant in enumerate(entrants):
        if reports[entrant.name].problem:
            continue
        job.report(f"opening: {entrant.name}", number, len(entrants))
        try:
            backend = entrant.open(job.bundle, threads=job.settings.threads)
        except TclkitError as error:
            reports[entrant.name] = replace(reports[entrant.name], problem=error.message)
            continue
        reports[entrant.name] = replace(reports[entrant.name], reason=backend.reason)
        lanes.append(_Lane(job, entrant, backend))
    return lanes


def _measured_lanes(
    job: _Job,
    lanes: list[_Lane],
    pieces: Sequence[Piece],
    meters: Sequence[GemmMeter],
    reports: dict[str, ContenderReport],
    size: Size,
) -> _Samples:
    """Samples of every lane and piece; a lane that fails is closed, taken out, and its reason goes into its report."""
    settings = job.settings
    for number, lane in enumerate(list(lanes)):
        job.report(f"warming up: {lane.name}", number, len(lanes))
        with _problems(lane, lanes, reports):
            lane.warm_up(pieces, settings.warm_up)
    samples: _Samples = {(lane.name, size, piece): defaultdict(list) for piece in pieces for lane in lanes}
    every = max(1, settings.rounds // _PEAK_SAMPLES)
    items = [(lane, piece) for lane in lanes for piece in pieces]
    what = f"measuring: {size[0]}x{size[1]}, round"
    for number, order in enumerate(draw_rounds(items, settings.rounds, settings.seed)):
        if not lanes:
            break
        job.report(what, number, settings.rounds)
        if number % every == 0:
            for meter in meters:
                meter.sample()
        for lane, piece in order:
            if lane in lanes:
                with _problems(lane, lanes, reports):
                    for stage, took_ms in lane.measure(piece).items():
                        samples[lane.name, size, piece][stage].append(took_ms)
    job.report(what, settings.rounds, settings.rounds)
    return samples


@contextlib.contextmanager
def _problems(lane: _Lane, lanes: list[_Lane], reports: dict[str, ContenderReport]) -> Iterator[None]:
    """Take a contender out of the running when it fails, and say why in its report."""
    try:
        yield
    except TclkitError as error:
        reports[lane.name] = replace(reports[lane.name], problem=error.message)
        lanes.remove(lane)
        lane.close()


def _measure_text(job: _Job, lanes: list[_Lane], reports: dict[str, ContenderReport]) -> None:
    """Put into the reports what embedding the first prompts takes, without a cache and from it."""
    texts = job.texts[:_EMBEDDED]
    cold: dict[str, list[float]] = defaultdict(list)
    cached: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        embedders = {}
        for number, lane in enumerate(list(lanes)):
            job.report("embedding texts", number, (1 + _TEXT_ROUNDS) * len(lanes))
            with _problems(lane, lanes, reports):
                cache = TextCache(Path(folder) / f"{number}.sqlite")
                both = Segmenter(job.bundle, lane.backend), Segmenter(job.bundle, lane.backend, cache=cache)
                for segmenter in both:  # reads the tokenizer, and fills the cache
                    segmenter.prompts(texts)
                embedders[lane.name] = both
        variant = 0
        for round_number, order in enumerate(draw_rounds(list(lanes), _TEXT_ROUNDS, job.settings.seed), start=1):
            job.report("embedding texts", round_number * len(lanes), (1 + _TEXT_ROUNDS) * len(lanes))
            for lane in order:
                for times, segmenter, runs in zip((cold, cached), embedders[lane.name], (1, _CACHED_RUNS), strict=True):
                    for _ in range(runs):
                        variant += 1
                        asked = _varied(texts, variant)
                        time.sleep(_SETTLE_S)
                        clock = _Clock()
                        segmenter.prompts(asked)
                        times[lane.name].append(clock.lap_ms())
    for lane in lanes:
        reports[lane.name] = replace(
            reports[lane.name],
            text_cold=spread_from_samples(cold[lane.name]),
            text_cached=spread_from_samples(cached[lane.name]),
        )


def _varied(texts: Sequence[str], variant: int) -> list[str]:
    """The same prompts in a list that a Segmenter has not seen: white space at the end is no part of a prompt."""
    return [texts[0] + " " * variant, *texts[1:]]


def _measure_memory(
    job: _Job, entrants: Sequence[Entrant], size: Size, reports: dict[str, ContenderReport]
) -> list[str]:
    """Put into the reports what a process of each contender's own holds at most; returns why it is not known."""
    notes = []
    for number, entrant in enumerate(entrants):
        job.report(f"peak memory: {entrant.name}", number, len(entrants))
        memory_job = MemoryJob(
            folder=job.bundle.folder,
            size=size,
            open=entrant.open,
            threads=job.settings.threads,
            image=job.settings.image,
            prompts=job.texts[: min(_EMBEDDED, job.settings.prompts[0])],
        )
        try:
            peak = measure_peak_memory(memory_job)
        except TclkitError as error:
            notes.append(f"the peak memory of {entrant.name} could not be measured: {error.message}")
        else:
            reports[entrant.name] = replace(reports[entrant.name], peak_memory_bytes=peak)
    return notes


class _Work:
    """Rows from samples, with the arithmetic behind them."""

    def __init__(self, bundles: Mapping[Size, Bundle], peaks: Sequence[GemmPeak]) -> None:
        self.notes: list[str] = [] if can_count() else [ONNX_REMEDY]
        self._bundles, self._peaks = bundles, best_peaks(peaks)
        self._counted: dict[Path, float | None] = {}

    def row(self, entrant: Entrant, size: Size, piece: Piece, stages: Mapping[str, Sequence[float]]) -> BenchRow:
        """Medians and 95th percentiles of sums are taken of the sums, round by round."""
        known = [stage for stage in STAGES if stage in stages]
        graphs = spread_from_samples(_sums(stages, GRAPHS))
        gflop = self._gflop(entrant, size, piece)
        peak = self._peaks.get(entrant.precision) if entrant.backend in _ON_CPU else None
        reached = None if gflop is None or peak is None else gflop / (graphs.median_ms / 1000) / peak.gflops
        return BenchRow(
            contender=entrant.name,
            height=size[0],
            width=size[1],
            batch=piece.batch,
            prompts=piece.prompts,
            stages={stage: spread_from_samples(stages[stage]) for stage in known},
            total=spread_from_samples(_sums(stages, known)),
            graphs=graphs,
            new_prompts=spread_from_samples(stages[_NEW_PROMPTS]) if _NEW_PROMPTS in stages else None,
            gflop=gflop,
            peak_fraction=reached,
        )

    def _gflop(self, entrant: Entrant, size: Size, piece: Piece) -> float | None:
        bundle = self._bundles[size]
        manifest = bundle.manifest
        if entrant.backend not in {status.name for status in available_backends()}:
            return reference_gflop(manifest, size, piece.batch, piece.prompts)
        file = image_file(bundle, entrant.backend, entrant.precision, size) or manifest.images[0].files["fp32"]
        image = self._image_gflop(bundle.path(file), size)
        return None if image is None else piece.batch * image + masks_gflop(manifest, size, piece.batch, piece.prompts)

    def _image_gflop(self, path: Path, size: Size) -> float | None:
        if path not in self._counted:
            self._counted[path] = None
            if can_count():
                try:
                    self._counted[path] = graph_gflop(path, image_inputs(size, 1))
                except InputError as error:
                    self.notes.append(error.message)
        return self._counted[path]


def _sums(stages: Mapping[str, Sequence[float]], names: Sequence[str]) -> list[float]:
    return [sum(of_one_run) for of_one_run in zip(*(stages[name] for name in names), strict=True)]


def _settings_dict(settings: BenchSettings, sizes: Sequence[Size]) -> dict[str, Any]:
    return {
        "prompts": list(settings.prompts),
        "sizes": [list(size) for size in sizes],
        "batches": list(settings.batches),
        "rounds": settings.rounds,
        "warm_up": settings.warm_up,
        "seed": settings.seed,
        "threads": settings.threads,
        "image": None if settings.image is None else str(settings.image),
    }
