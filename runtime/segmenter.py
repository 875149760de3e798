"""The Segmenter: a bundle and a backend, from an image and words to the pixels that the words name."""

import collections
import logging
import numbers
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .backends import Backend, Features, choose_backend
from .bundle import Bundle, open_bundle
from .errors import BackendError, InputError, TclkitError
from .fitted_masks import FittedMasks
from .labels import labels_from_masks, without_contrast
from .pamr import highest_refined, refine_masks, resize_with_corners
from .prefetch import prefetched
from .preprocess import FitPlan, check_fit, check_image, plan_fit, plan_scales, sizes_with_scales
from .prompts import PromptSet, unknown_words
from .result import Segmentation, segmentation_from_masks
from .upsample import resize_masks

if TYPE_CHECKING:
    from .text_cache import TextCache
    from .tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Prompts = PromptSet | Sequence[str]
_REMEMBERED_PROMPT_SETS = 16
_LOCK_SECONDS = 0.1  # between two looks whether a stream that waits for the backend was closed
_BOUND_MARGIN = 1e-4  # far above what rounding does to a mean, far below what a threshold can tell


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ImageFeatures:
    """An image as the model sees it, to be asked with any prompts.

    Attributes:
        image_hwc: (H, W, 3) uint8, the image itself.
        plan: how it was brought to the model's input.
        inputs: (h, w, 3) uint8, what went in, one a window.
        features: of each run of the image graph, one window or several.
        timings_ms: what making them took.
        smaller: the same at the bundle's smaller sizes, for a Segmenter that takes the mean over scales.
        windows_per_run: of the Segmenter that made them: windows in one of `features`, at most.
        flip: of the Segmenter that made them: each of `features` holds its windows mirrored as well.
    """

    image_hwc: NDArray[np.uint8]
    plan: FitPlan
    inputs: tuple[NDArray[np.uint8], ...]
    features: tuple[Features, ...]
    timings_ms: dict[str, float]
    smaller: tuple["ImageFeatures", ...] = ()
    windows_per_run: int = 1
    flip: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Stats:
    """What a Segmenter has done so far.

    Attributes:
        images: segmented, or turned into features.
        windows: inputs of the image graph.
        text_encoder_runs: runs of the text graph.
        text_cache_hits: prompts whose embedding came from the disk cache.
        timings_ms: stage -> milliseconds, all images together.
    """

    images: int
    windows: int
    text_encoder_runs: int
    text_cache_hits: int
    timings_ms: dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Options:
    """How masks become labels; resolved against the bundle and checked."""

    threshold: float | None
    kp_w: float
    pamr: bool
    floor: float | None  # prompts that stay below it everywhere need not be refined; None refines all


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Asked:
    """Prompts of one call: the first were named, the others are contrast, which may have the same names."""

    names: tuple[str, ...]
    embeddings: NDArray[np.float32]  # (N, D), of all


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _WindowMasks:
    """Masks of one window on the mask grid; the KP masks where they are not mixed in yet."""

    window_hwc: NDArray[np.uint8]
    masks: NDArray[np.float32]  # (N, h, w)
    kp: NDArray[np.float32] | None  # (N, h, w)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Fitted:
    """An image brought to the input of one image graph."""

    plan: FitPlan
    inputs: tuple[NDArray[np.uint8], ...]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Prepared:
    """An image brought to the model's input: once, or once a scale, the finest first."""

    image_hwc: NDArray[np.uint8]
    fitted: tuple[_Fitted, ...]
    preprocess_ms: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Seen:
    """One fit of an image and its features, run by run of the image graph; they may come as they are asked for."""

    plan: FitPlan
    inputs: tuple[NDArray[np.uint8], ...]
    features: Iterable[Features]
    windows_per_run: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Run:
    """What one run of the image graph made, and how long it took."""

    features: Features
    elapsed_ms: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _LookedAt:
    """An image and the first run of the image graph on it; None where the stream was closed before."""

    prepared: _Prepared
    first: _Run | None


def _nothing() -> None:
    """Call back where nobody waits for it."""


class Segmenter:
    """Finds the pixels that words name.

        segmenter = Segmenter.open("tcl-shapes")
        prompts = segmenter.prompts(["a red circle", "a green star"])
        result = segmenter(image_hwc, prompts)
        result.save_overlay("overlay.png")

    A Segmenter belongs to the thread that first uses it, until that ends; other threads open their own. Any thread may
    close it.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        *,
        cache: "TextCache | None" = None,
        windows_per_run: int = 1,
        flip: bool = False,
        scales: bool = False,
    ) -> None:
        """Join an opened bundle and the backend that runs it; most callers use `Segmenter.open`.

        Args:
            bundle: the model.
            backend: opened on the same bundle.
            cache: of text embeddings; None embeds every prompt anew.
            windows_per_run: windows of one image that the image graph takes at once, at most.
            flip: look at the mirrored image as well; see `open`.
            scales: look at the image in several sizes; see `open`.

        Raises:
            InputError: windows_per_run is below 1, or the bundle has no two sizes for scales.
        """
        if windows_per_run < 1:
            raise InputError(f"windows_per_run should be 1 or more, found {windows_per_run}")
        self.windows_per_run = windows_per_run
        self.flip = flip
        self.scales = scales
        self.bundle = bundle
        self.backend = backend
        self.cache = cache
        self._tokenizer: Tokenizer | None = None
        self._remembered: collections.OrderedDict[tuple[str, ...], PromptSet] = collections.OrderedDict()
        self._warned_words: set[str] = set()
        self._owner: threading.Thread | None = None
        self._backend_lock = threading.Lock()  # `stream` runs the image graph in a thread
        self._counters = {"images": 0, "windows": 0, "text_encoder_runs": 0, "text_cache_hits": 0}
        self._total_ms: collections.defaultdict[str, float] = collections.defaultdict(float)
        self._pad_rgb = _bytes_from_mean(bundle.manifest.preprocessing.mean)
        self._graph_sizes = [(entry.height, entry.width) for entry in bundle.manifest.images]
        if scales:
            sizes_with_scales(self._graph_sizes)

    @classmethod
    def open(
        cls,
        model: str | Path = "tcl-shapes",
        *,
        backend: str = "auto",
        cache: bool | str | Path = True,
        precision: str = "auto",
        threads: int | None = None,
        verify: bool = True,
        windows_per_run: int = 1,
        flip: bool = False,
        scales: bool = False,
    ) -> "Segmenter":
        """Open a model.

        Args:
            model: name of an installed bundle, or its folder.
            backend: "auto", or a backend's name.
            cache: keep text embeddings on disk; a path keeps them in that file.
            precision: of the image graph, "fp32", "fp16", "bf16" or "int8"; "auto" takes with TensorRT the first of
                int8, fp16 and fp32 that has engines, with OpenVINO the first of int8 and bf16 that passed the gate on
                this machine, else fp32, with ONNX Runtime fp32.
            threads: CPU threads; None takes every CPU this process may use.
            verify: compare the bundle's files with their hashes first.
            windows_per_run: windows of one image that the image graph takes at once, at most: more fills a GPU, and
                needs memory for as many.
            flip: look at the mirrored image as well and take the mean of both masks, for twice the image graph's time.
            scales: look at the image in every size of the bundle that has the aspect nearest to the image's, and take
                the mean of the masks; of use to a bundle exported with several sizes. Sizes count as of one aspect when
                they are so to within a tenth; an aspect of which there is one size only is not taken.

        Raises:
            BundleError: unknown name, incomplete or damaged.
            BackendError: the backend is not installed or cannot run this bundle.
            EngineMismatchError: TensorRT was asked for, and its engines are for another machine or another graph.
            InputError: windows_per_run is below 1, or the bundle has no two sizes for scales.
        """
        bundle = open_bundle(model, verify=verify)
        opened = choose_backend(backend, bundle, precision=precision, threads=threads)
        return cls(bundle, opened, cache=_text_cache(cache), windows_per_run=windows_per_run, flip=flip, scales=scales)

    @property
    def model(self) -> str:
        """Name of the bundle."""
        return self.bundle.name

    @property
    def stats(self) -> Stats:
        """What was done so far: counters and milliseconds per stage."""
        return Stats(**self._counters, timings_ms=dict(self._total_ms))

    def close(self) -> None:
        """Release the backend: sessions, engines, device memory. Without it they go when the Segmenter does.

        It waits for the image graph that a stream runs just now; a stream goes on as far as the backend lets it.
        """
        with self._backend_lock:
            self.backend.close()

    def __enter__(self) -> "Segmenter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def prompts(self, prompts: Sequence[str]) -> PromptSet:
        """Embed prompts: once per Segmenter in memory, once per machine in the disk cache.

        Words that the model's vocabulary lacks, where it has one, are announced as a warning.

        Raises:
            InputError: no prompts, an empty, a repeated or a too long one.
        """
        self._check_thread()
        from .embedding import embed_prompts

        if not isinstance(prompts, Sequence):
            raise InputError(f"prompts should be a list of texts, found {type(prompts).__name__}")
        key = tuple(prompts) if isinstance(prompts, list | tuple) and all(isinstance(p, str) for p in prompts) else None
        if key is not None and key in self._remembered:
            self._remembered.move_to_end(key)
            return self._remembered[key]
        with self._timed("prompts", {}):
            embedded = embed_prompts(
                prompts,
                templates=self.bundle.manifest.templates,
                tokenizer=self._opened_tokenizer,
                encode_text=self._encode_text,
                text_encoder_hash=self.bundle.text_encoder_hash,
                cache=self.cache,
            )
        self._counters["text_encoder_runs"] += embedded.text_encoder_runs
        self._counters["text_cache_hits"] += embedded.cache_hits
        self._warn_of_unknown_words(embedded.prompts.names)
        if key is not None:
            self._remember(key, embedded.prompts)
        return embedded.prompts

    def __call__(
        self,
        image_hwc: NDArray[np.uint8],
        prompts: Prompts,
        *,
        threshold: float | None = None,
        background: bool = True,
        kp_w: float | None = None,
        pamr: bool = False,
        fit: str = "whole",
        contrast: Prompts | None = None,
    ) -> Segmentation:
        """Segment one image.

        Args:
            image_hwc: (H, W, 3) uint8 RGB.
            prompts: from `prompts`, or texts.
            threshold: soft masks must exceed it, in [0, 1]; None takes the bundle's, which is lower with `pamr`.
            background: False gives every pixel to some prompt.
            kp_w: share of CLIP's own dense features in [0, 1]; None takes the bundle's.
            pamr: refine masks along the edges of the image; slower. Prompts that cannot label a pixel are left as they
                are: the label map is that of refining all.
            fit: "whole" pads, "stretch" distorts, "slide" covers the image with windows as the published protocol.
            contrast: more prompts, for what else may be there; a pixel that one of them wins is background.

        Raises:
            InputError: not an image, or a bad prompt or option.
            BackendError: the model could not be run.
        """
        options = self._options(threshold, background, kp_w, pamr)
        asked = self._asked(prompts, contrast)
        return self._segment(self._prepare(image_hwc, fit), asked, options)

    def features(self, image_hwc: NDArray[np.uint8], *, fit: str = "whole") -> ImageFeatures:
        """Run the image graph alone; ask the result with `segment` or `masks`, for the price of the head.

        Raises:
            InputError: not an image, or a bad fit.
            BackendError: the model could not be run.
        """
        self._check_thread()
        prepared = self._prepare(image_hwc, fit)
        timings = {"preprocess": prepared.preprocess_ms}
        self._total_ms["preprocess"] += prepared.preprocess_ms
        finest, *smaller = [
            ImageFeatures(
                image_hwc=prepared.image_hwc,
                plan=fitted.plan,
                inputs=fitted.inputs,
                features=tuple(self._window_features(fitted.inputs, timings)),
                timings_ms=timings,
                windows_per_run=self.windows_per_run,
                flip=self.flip,
            )
            for fitted in prepared.fitted
        ]
        self._counters["images"] += 1
        return replace(finest, smaller=tuple(smaller))

    def segment(
        self,
        features: ImageFeatures,
        prompts: Prompts,
        *,
        threshold: float | None = None,
        background: bool = True,
        kp_w: float | None = None,
        pamr: bool = False,
        contrast: Prompts | None = None,
    ) -> Segmentation:
        """Segment an image whose features are there; arguments and errors as in a call.

        They may come from another Segmenter of the model.

        Raises:
            InputError: also where that one looked at the mirrored image and this one does not, or the other way round.
        """
        options = self._options(threshold, background, kp_w, pamr)
        asked = self._asked(prompts, contrast)
        timings = dict(features.timings_ms)
        seen = self._seen(features)
        fitted = self._fitted_masks(seen, asked.embeddings, options, timings)
        return self._labelled(features.image_hwc, [one.plan for one in seen], fitted, asked, options, timings)

    def masks(
        self, features: ImageFeatures, prompts: Prompts, *, kp_w: float | None = None, pamr: bool = False
    ) -> NDArray[np.float32]:
        """Soft masks of an image whose features are there: (N, H, W) float32 in [0, 1] at image size.

        With `pamr` every mask is refined, also those of prompts that no pixel is labelled with.

        Raises:
            InputError: as `segment`.
        """
        options = replace(self._options(None, True, kp_w, pamr), floor=None)
        text_ND = self._prompt_set(prompts).embeddings
        fitted = self._fitted_masks(self._seen(features), text_ND, options, {})
        return resize_masks(fitted.array(), features.plan.source_size)

    def stream(
        self,
        frames: Iterable[NDArray[np.uint8]],
        prompts: Prompts | Callable[[], Prompts],
        *,
        threshold: float | None = None,
        background: bool = True,
        kp_w: float | None = None,
        pamr: bool = False,
        fit: str = "whole",
        contrast: Prompts | None = None,
    ) -> Generator[Segmentation, None, None]:
        """Segment frames one after another, and work on the next ones while the caller draws the current one.

        Two threads run ahead. The first takes a frame, copies it, so that a camera may use its buffer again, and
        resizes it. The second runs the image graph, of several windows the first run. While the caller has frame i, the
        image graph runs on frame i + 1 and frame i + 2 is fetched and resized; no frame beyond it is taken. The rest,
        which is further windows and scales, comparing with the prompts, PAMR and labelling, is done in the caller's
        thread when it asks for the next result, so prompts may change until then. The backend is never used by two
        threads at once: the image graph starts on a frame when the frame before it was compared with the prompts, so
        that it runs during PAMR and labelling too, and a call of this Segmenter from within the loop waits for the
        graph where it runs already.

        What `frames` raises is raised here, after the results of the frames before it. Closing the generator ends the
        threads: it waits for the image graph, and up to 5 s for `frames`, which is then left to itself with a warning.

        Args:
            frames: images as in a call; a generator will do.
            prompts: as in a call, or a function that is asked for them before every frame, to change them on the way.
            threshold: and the others: as in a call.

        Yields:
            One Segmentation a frame, in order.

        Raises:
            InputError: as a call: a bad prompt or option at once, an image when its turn comes.
            BackendError: the model could not be run.
            TclkitError: the Segmenter was closed meanwhile, and its backend does not open again.
        """
        options = self._options(threshold, background, kp_w, pamr)
        contrast = None if contrast is None else self._prompt_set(contrast)
        ask = prompts if callable(prompts) else _always(self._prompt_set(prompts))
        check_fit(fit)  # now, not at the first frame
        return self._streamed(frames, lambda: self._asked(ask(), contrast), options, fit)

    def _streamed(
        self, frames: Iterable[NDArray[np.uint8]], ask: Callable[[], _Asked], options: _Options, fit: str
    ) -> Generator[Segmentation, None, None]:
        turn = threading.Semaphore(1)  # of the image graph; passed on when the frame before was compared
        is_closed = threading.Event()

        def look(prepared: _Prepared) -> _LookedAt:
            turn.acquire()
            return _LookedAt(prepared=prepared, first=self._first_run(prepared, is_closed))

        looked_at = prefetched(frames, lambda frame: self._prepare(check_image(frame).copy(), fit), look)
        try:
            for one in looked_at:
                yield self._segment(one.prepared, ask(), options, first=one.first, compared=turn.release)
        finally:
            is_closed.set()
            turn.release()  # the thread may wait for it
            looked_at.close()

    def _first_run(self, prepared: _Prepared, is_closed: threading.Event) -> _Run | None:
        """Run the image graph on the first windows of an image; counts nothing, since `stream` does it in a thread.

        None where the stream is closed before the backend is free: who closes it waits for this thread, and may hold
        the backend itself, where the garbage collector closes a stream that was forgotten.
        """
        windows = next(_runs(prepared.fitted[0].inputs, self.windows_per_run))
        while not is_closed.is_set():
            if self._backend_lock.acquire(timeout=_LOCK_SECONDS):
                try:
                    start = time.perf_counter()
                    features = self.backend.image_features(self._batch(windows))
                    return _Run(features=features, elapsed_ms=_elapsed_ms(start))
                finally:
                    self._backend_lock.release()
        return None

    def _prepare(self, image_hwc: NDArray[np.uint8], fit: str) -> _Prepared:
        """Resize and cut; touches nothing of the Segmenter that changes, so that `stream` may do it in its thread."""
        start = time.perf_counter()
        image = check_image(image_hwc)
        size = (image.shape[0], image.shape[1])
        patch = self.bundle.manifest.model.patch_size
        if self.scales:
            plans = plan_scales(size, self._graph_sizes, fit, patch_size=patch)
        else:
            plans = (plan_fit(size, self._graph_sizes, fit, patch_size=patch),)
        fitted = tuple(_Fitted(plan=plan, inputs=tuple(plan.inputs(image, self._pad_rgb))) for plan in plans)
        return _Prepared(image_hwc=image, fitted=fitted, preprocess_ms=_elapsed_ms(start))

    def _segment(
        self,
        prepared: _Prepared,
        asked: _Asked,
        options: _Options,
        *,
        first: _Run | None = None,
        compared: Callable[[], None] = _nothing,
    ) -> Segmentation:
        """Segment a prepared image.

        Args:
            prepared: the image.
            asked: prompts.
            options: how masks become labels.
            first: run of the image graph at the first scale, where it was made already.
            compared: called when the backend is not needed any more: before masks are refined, joined and resized.
        """
        self._check_thread()
        timings = {"preprocess": prepared.preprocess_ms}
        self._total_ms["preprocess"] += prepared.preprocess_ms
        seen = [
            _Seen(
                plan=one.plan,
                inputs=one.inputs,
                features=self._window_features(one.inputs, timings, first if index == 0 else None),
                windows_per_run=self.windows_per_run,
            )
            for index, one in enumerate(prepared.fitted)
        ]
        fitted = self._fitted_masks(seen, asked.embeddings, options, timings, compared)
        self._counters["images"] += 1
        return self._labelled(prepared.image_hwc, [one.plan for one in seen], fitted, asked, options, timings)

    def _window_features(
        self, inputs: Sequence[NDArray[np.uint8]], timings: dict[str, float], first: _Run | None = None
    ) -> Iterator[Features]:
        """Features run by run of the image graph, so that those of many windows need not be held."""
        for number, windows in enumerate(_runs(inputs, self.windows_per_run)):
            if number == 0 and first is not None:
                run = first
            else:
                start = time.perf_counter()
                run = _Run(features=self._image_features(windows), elapsed_ms=_elapsed_ms(start))
            self._note_ms("image", run.elapsed_ms, timings)
            self._counters["windows"] += len(windows) * (2 if self.flip else 1)
            yield run.features

    def _image_features(self, windows: Sequence[NDArray[np.uint8]]) -> Features:
        with self._backend_lock:
            return self.backend.image_features(self._batch(windows))

    def _batch(self, windows: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
        """Windows as the image graph takes them: (B, h, w, 3), with flip 2 B of them, the mirrored ones last."""
        images = windows[0][None] if len(windows) == 1 else np.stack(windows)
        return np.concatenate([images, images[:, :, ::-1]]) if self.flip else images

    def _fitted_masks(
        self,
        seen: Sequence[_Seen],
        text_ND: NDArray[np.float32],
        options: _Options,
        timings: dict[str, float],
        compared: Callable[[], None] = _nothing,
    ) -> FittedMasks:
        """N soft masks at the size the model saw the image; the mean over scales at the finest's."""
        scales = [
            self._all_window_masks(one, text_ND, options, timings, compared if one is seen[-1] else _nothing)
            for one in seen
        ]
        if options.pamr:
            scales = self._all_refined([list(windows) for windows in scales], options, timings)
        joined = (
            one.plan.join((self._checked(window.masks) for window in windows), len(text_ND))
            for one, windows in zip(seen, scales, strict=True)
        )
        return _mean_over_scales(joined, len(seen))

    def _all_window_masks(
        self,
        seen: _Seen,
        text_ND: NDArray[np.float32],
        options: _Options,
        timings: dict[str, float],
        compared: Callable[[], None],
    ) -> Iterator[_WindowMasks]:
        """Masks of one window after the other; `compared` is called when those of the last run are there."""
        runs = list(_runs(seen.inputs, seen.windows_per_run))
        for number, (windows, features) in enumerate(zip(runs, seen.features, strict=True), start=1):
            masks = self._window_masks(features, windows, text_ND, options, timings)
            if number == len(runs):
                compared()
            yield from masks

    def _window_masks(
        self,
        features: Features,
        windows: Sequence[NDArray[np.uint8]],
        text_ND: NDArray[np.float32],
        options: _Options,
        timings: dict[str, float],
    ) -> list[_WindowMasks]:
        """Masks on the mask grid, of every window of a run; mixed unless PAMR comes in between."""
        with self._timed("masks", timings):
            masks_BNhw = self._head(features, text_ND, 0.0 if options.pamr else options.kp_w)
            kp_BNhw = self._head(features, text_ND, 1.0) if options.pamr and options.kp_w > 0 else None
        return [
            _WindowMasks(window_hwc=window_hwc, masks=masks_BNhw[index], kp=None if kp_BNhw is None else kp_BNhw[index])
            for index, window_hwc in enumerate(windows)
        ]

    def _head(self, features: Features, text_ND: NDArray[np.float32], kp_w: float) -> NDArray[np.float32]:
        """(B, N, h, w) float32 masks of B windows; of 2 B inputs the second half is the windows mirrored."""
        with self._backend_lock:
            masks_BNhw = self.backend.masks(features, text_ND, kp_w)
        if not self.flip:
            return masks_BNhw
        straight, mirrored = np.split(masks_BNhw, 2)
        return np.asarray((straight + mirrored[..., ::-1]) * np.float32(0.5))

    def _seen(self, features: ImageFeatures) -> list[_Seen]:
        """The fits of an image whose features are there, the finest first."""
        if features.flip != self.flip:
            made, wanted = ("with" if flip else "without" for flip in (features.flip, self.flip))
            raise InputError(
                f"these features were made {made} the mirrored image, but this Segmenter works {wanted} it. Make them "
                f"with this one: segmenter.features(image), or open one with flip={features.flip}",
                expected=self.flip,
                found=features.flip,
            )
        return [
            _Seen(plan=one.plan, inputs=one.inputs, features=one.features, windows_per_run=one.windows_per_run)
            for one in (features, *features.smaller)
        ]

    def _all_refined(
        self, scales: Sequence[Sequence[_WindowMasks]], options: _Options, timings: dict[str, float]
    ) -> list[Iterator[_WindowMasks]]:
        """Refine the masks of all windows of an image at each scale, and mix."""
        with self._timed("pamr", timings):
            chosen = _prompts_to_refine(scales, options)
        return [self._refined(windows, chosen, options, timings) for windows in scales]

    def _refined(
        self,
        windows: Sequence[_WindowMasks],
        chosen: NDArray[np.bool_],
        options: _Options,
        timings: dict[str, float],
    ) -> Iterator[_WindowMasks]:
        """Refine the masks of the chosen prompts window by window, and mix.

        PAMR refines the grounder's masks alone and comes before the KP masks are mixed in, as in the reference.
        """
        for window in windows:
            with self._timed("pamr", timings):
                masks = np.array(window.masks)
                planes = np.ascontiguousarray(window.window_hwc.transpose(2, 0, 1), np.float32)
                small = resize_with_corners(planes, (masks.shape[1], masks.shape[2]))
                masks[chosen] = refine_masks(small.transpose(1, 2, 0), masks[chosen])
                if window.kp is not None:
                    masks = np.asarray(options.kp_w * window.kp + (1 - options.kp_w) * masks, np.float32)
            yield _WindowMasks(window_hwc=window.window_hwc, masks=masks, kp=None)

    def _checked(self, masks_Nhw: NDArray[np.float32]) -> NDArray[np.float32]:
        if not np.isfinite(masks_Nhw).all():
            raise BackendError(
                f"{self.backend.name} gave masks that are not finite for {self.model}: the graph overflows in this "
                "precision. Use another precision or backend",
                backend=self.backend.name,
            )
        return masks_Nhw

    def _labelled(
        self,
        image_hwc: NDArray[np.uint8],
        plans: Sequence[FitPlan],
        fitted: FittedMasks,
        asked: _Asked,
        options: _Options,
        timings: dict[str, float],
    ) -> Segmentation:
        with self._timed("labels", timings):
            label_map = labels_from_masks(fitted, plans[0].source_size, options.threshold)
            if len(asked.names) < len(asked.embeddings):
                label_map = without_contrast(label_map, len(asked.names))
        return segmentation_from_masks(
            image_hwc,
            asked.names,
            fitted.first(len(asked.names)),
            options.threshold,
            label_map=label_map,
            settings={
                "fit": plans[0].fit,
                "kp_w": options.kp_w,
                "pamr": options.pamr,
                "flip": self.flip,
                "sizes": [list(plan.graph_size) for plan in plans],
                "windows": sum(len(plan.windows) for plan in plans),
                "precision": self.backend.precision,
            },
            model=self.model,
            backend=self.backend.name,
            timings_ms=timings,
            counters=dict(self._counters),
        )

    def _options(self, threshold: float | None, background: bool, kp_w: float | None, pamr: bool) -> _Options:
        self._check_thread()
        manifest = self.bundle.manifest
        if not background and threshold is not None:
            raise InputError(f"threshold {threshold} has no effect without a background; leave one of the two out")
        if background and threshold is None:
            threshold = manifest.thresholds.background_pamr if pamr else manifest.thresholds.background
        for name, value in (("threshold", threshold), ("kp_w", kp_w)):
            if value is not None and not (isinstance(value, numbers.Real) and 0 <= value <= 1):
                raise InputError(f"{name} is a number from 0 to 1, got {value}")
        if kp_w is not None and kp_w > 0 and not manifest.has_kp:
            raise InputError(f"{self.model} was exported without the KP branch, but kp_w is {kp_w}; take kp_w 0")
        share = manifest.kp_w if kp_w is None else kp_w
        return _Options(threshold=threshold, kp_w=share, pamr=pamr, floor=threshold)

    def _asked(self, prompts: Prompts, contrast: Prompts | None) -> _Asked:
        named = self._prompt_set(prompts)
        if contrast is None or not len(contrast):
            return _Asked(names=named.names, embeddings=named.embeddings)
        more = self._prompt_set(contrast)
        return _Asked(names=named.names, embeddings=np.concatenate([named.embeddings, more.embeddings]))

    def _prompt_set(self, prompts: Prompts) -> PromptSet:
        if not isinstance(prompts, PromptSet):
            return self.prompts(prompts)
        expected = self.bundle.text_encoder_hash
        if prompts.key != expected:
            raise InputError(
                f"these prompts were embedded by another text encoder ({prompts.key[:12]}) than that of {self.model} "
                f"({expected[:12]}); embed them with this model: segmenter.prompts([...])",
                expected=expected,
                found=prompts.key,
            )
        return prompts

    def _remember(self, key: tuple[str, ...], prompts: PromptSet) -> None:
        self._remembered[key] = prompts
        if len(self._remembered) > _REMEMBERED_PROMPT_SETS:
            self._remembered.popitem(last=False)

    def _encode_text(self, token_ids_ML: NDArray[np.int64]) -> NDArray[np.float32]:
        with self._backend_lock:
            return self.backend.encode_text(token_ids_ML)

    def _opened_tokenizer(self) -> "Tokenizer":
        from .tokenizer import Tokenizer

        if self._tokenizer is None:
            self._tokenizer = Tokenizer.from_bundle(self.bundle)
        return self._tokenizer

    def _warn_of_unknown_words(self, names: Sequence[str]) -> None:
        vocabulary = self.bundle.manifest.vocabulary
        if vocabulary is None:
            return
        words = [word for word in unknown_words(names, vocabulary.words) if word not in self._warned_words]
        if words:
            self._warned_words.update(words)
            logger.warning("%s does not know %s: %s", self.model, ", ".join(map(repr, words)), vocabulary.note)

    def _check_thread(self) -> None:
        current = threading.current_thread()
        if self._owner is None or not self._owner.is_alive():  # a thread may warm it up for another
            self._owner = current
        elif self._owner is not current:
            raise TclkitError(
                f"this Segmenter belongs to the thread {self._owner.name!r}, but {current.name!r} uses it. "
                "Open one in each thread: Segmenter.open(...)"
            )

    @contextmanager
    def _timed(self, stage: str, timings: dict[str, float]) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._note_ms(stage, _elapsed_ms(start), timings)

    def _note_ms(self, stage: str, elapsed_ms: float, timings: dict[str, float]) -> None:
        timings[stage] = timings.get(stage, 0.0) + elapsed_ms
        self._total_ms[stage] += elapsed_ms


def _runs(inputs: Sequence[NDArray[np.uint8]], windows_per_run: int) -> Iterator[Sequence[NDArray[np.uint8]]]:
    """Windows that go through the image graph together."""
    for start in range(0, len(inputs), windows_per_run):
        yield inputs[start : start + windows_per_run]


def _mean_over_scales(joined: Iterator[FittedMasks], count: int) -> FittedMasks:
    """The mean of masks at the size of the first, which is the finest; a single one is left as it is."""
    finest = next(joined)
    if count == 1:
        return finest
    total = np.array(finest.array(), np.float32)
    for masks in joined:
        total += resize_masks(masks.array(), (total.shape[1], total.shape[2]))
    total /= count
    return FittedMasks.from_array(total)


def _prompts_to_refine(scales: Sequence[Sequence[_WindowMasks]], options: _Options) -> NDArray[np.bool_]:
    """(N,) bool, the prompts that may label a pixel of the image; see `highest_refined`. All where nothing bounds them.

    The mean over scales never passes the mean of the scales' bounds. A prompt that stays below the floor at one scale
    may pass it at another, so it is refined at all or at none.

    A mask that is not finite counts as one that may: it is refused later, with a message.
    """
    if options.floor is None:
        return np.ones(len(scales[0][0].masks), np.bool_)
    bounds = [np.max([_bound(window, options) for window in windows], axis=0) for windows in scales]
    highest = bounds[0] if len(bounds) == 1 else np.mean(bounds, axis=0)
    return np.asarray(~(highest <= options.floor - _BOUND_MARGIN))


def _bound(window: _WindowMasks, options: _Options) -> NDArray[np.float32]:
    bound = highest_refined(window.masks)
    if window.kp is None:
        return bound
    return np.asarray(options.kp_w * highest_refined(window.kp) + (1 - options.kp_w) * bound, np.float32)


def _elapsed_ms(start: float) -> float:
    return (time.perf_counter() - start) * 1000


def _bytes_from_mean(mean: tuple[float, float, float]) -> tuple[int, int, int]:
    """The mean colour in bytes: what is padded with it is near zero after normalisation (0.01 at most)."""
    red, green, blue = (min(255, max(0, round(value))) for value in mean)
    return red, green, blue


def _text_cache(cache: bool | str | Path) -> "TextCache | None":
    if cache is False:
        return None
    from .text_cache import TextCache

    return TextCache() if cache is True else TextCache(cache)


def _always(prompts: PromptSet) -> Callable[[], Prompts]:
    return lambda: prompts
