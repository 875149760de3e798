"""What runs on the device: bundles, prompts, backends, `Segmenter`, drawing. Never imports torch.

Names are imported when they are asked for, so that `import tclkit.runtime` costs next to nothing.
"""

from typing import TYPE_CHECKING

from .lazy_names import lazy_names

if TYPE_CHECKING:
    from .backends import Backend, BackendStatus, Features, HostFeatures, available_backends, choose_backend
    from .bundle import Bundle, find_bundle, list_bundles, open_bundle, read_manifest, write_manifest
    from .cpu_records import CpuIdentity, CpuRecord, cpu_misfit, fitting_precisions, read_cpu_records
    from .drawing import draw_overlay
    from .embedding import EmbeddedPrompts, embed_prompts
    from .engines import (
        DeviceIdentity,
        EngineFile,
        EngineMiss,
        EngineRecord,
        EngineSet,
        current_device,
        engine_misfit,
        find_engine,
        find_engines,
        read_engines,
        write_engine,
    )
    from .errors import (
        BackendError,
        BuildError,
        BundleError,
        CheckpointError,
        ConfigError,
        DownloadError,
        EngineMismatchError,
        ExportError,
        InputError,
        ParityError,
        TclkitError,
        TrainingError,
    )
    from .images import load_image
    from .manifest import FileRecord, ImageEntry, Manifest, ModelInfo, Preprocessing, Thresholds, Vocabulary
    from .onnxruntime_backend import OnnxRuntimeBackend
    from .openvino_backend import OpenVinoBackend, open_openvino
    from .palette import label_colours
    from .pamr import refine_masks
    from .preprocess import FitPlan, plan_fit, rescaled_size, resize_image
    from .prompt_bank import load_prompt_bank, save_prompt_bank
    from .prompts import PROTOCOL_TEMPLATES, PromptSet, check_prompts, expand_prompt, unknown_words
    from .regions import Region, regions_from_label_map
    from .result import Segmentation
    from .segmenter import ImageFeatures, Segmenter, Stats
    from .tensorrt_backend import TensorRTBackend, open_tensorrt
    from .text_cache import TextCache
    from .tokenizer import Tokenizer, clean_text
    from .upsample import resize_masks
    from .windows import Window, WindowAverage, window_positions

__all__ = [
    "PROTOCOL_TEMPLATES",
    "Backend",
    "BackendError",
    "BackendStatus",
    "BuildError",
    "Bundle",
    "BundleError",
    "CheckpointError",
    "ConfigError",
    "CpuIdentity",
    "CpuRecord",
    "DeviceIdentity",
    "DownloadError",
    "EmbeddedPrompts",
    "EngineFile",
    "EngineMismatchError",
    "EngineMiss",
    "EngineRecord",
    "EngineSet",
    "ExportError",
    "Features",
    "FileRecord",
    "FitPlan",
    "HostFeatures",
    "ImageEntry",
    "ImageFeatures",
    "InputError",
    "Manifest",
    "ModelInfo",
    "OnnxRuntimeBackend",
    "OpenVinoBackend",
    "ParityError",
    "Preprocessing",
    "PromptSet",
    "Region",
    "Segmentation",
    "Segmenter",
    "Stats",
    "TclkitError",
    "TensorRTBackend",
    "TextCache",
    "Thresholds",
    "Tokenizer",
    "TrainingError",
    "Vocabulary",
    "Window",
    "WindowAverage",
    "available_backends",
    "check_prompts",
    "choose_backend",
    "clean_text",
    "cpu_misfit",
    "current_device",
    "draw_overlay",
    "embed_prompts",
    "engine_misfit",
    "expand_prompt",
    "find_bundle",
    "find_engine",
    "find_engines",
    "fitting_precisions",
    "label_colours",
    "list_bundles",
    "load_image",
    "load_prompt_bank",
    "open_bundle",
    "open_openvino",
    "open_tensorrt",
    "plan_fit",
    "read_cpu_records",
    "read_engines",
    "read_manifest",
    "refine_masks",
    "regions_from_label_map",
    "rescaled_size",
    "resize_image",
    "resize_masks",
    "save_prompt_bank",
    "unknown_words",
    "window_positions",
    "write_engine",
    "write_manifest",
]

_HOMES = {
    "backends": (
        "Backend",
        "BackendStatus",
        "Features",
        "HostFeatures",
        "available_backends",
        "choose_backend",
    ),
    "bundle": (
        "Bundle",
        "find_bundle",
        "list_bundles",
        "open_bundle",
        "read_manifest",
        "write_manifest",
    ),
    "cpu_records": (
        "CpuIdentity",
        "CpuRecord",
        "cpu_misfit",
        "fitting_precisions",
        "read_cpu_records",
    ),
    "drawing": ("draw_overlay",),
    "embedding": (
        "EmbeddedPrompts",
        "embed_prompts",
    ),
    "engines": (
        "DeviceIdentity",
        "EngineFile",
        "EngineMiss",
        "EngineRecord",
        "EngineSet",
        "current_device",
        "engine_misfit",
        "find_engine",
        "find_engines",
        "read_engines",
        "write_engine",
    ),
    "errors": (
        "BackendError",
        "BuildError",
        "BundleError",
        "CheckpointError",
        "ConfigError",
        "DownloadError",
        "EngineMismatchError",
        "ExportError",
        "InputError",
        "ParityError",
        "TclkitError",
        "TrainingError",
    ),
    "images": ("load_image",),
    "manifest": (
        "FileRecord",
        "ImageEntry",
        "Manifest",
        "ModelInfo",
        "Preprocessing",
        "Thresholds",
        "Vocabulary",
    ),
    "onnxruntime_backend": ("OnnxRuntimeBackend",),
    "openvino_backend": (
        "OpenVinoBackend",
        "open_openvino",
    ),
    "palette": ("label_colours",),
    "pamr": ("refine_masks",),
    "preprocess": (
        "FitPlan",
        "plan_fit",
        "rescaled_size",
        "resize_image",
    ),
    "prompt_bank": (
        "load_prompt_bank",
        "save_prompt_bank",
    ),
    "prompts": (
        "PROTOCOL_TEMPLATES",
        "PromptSet",
        "check_prompts",
        "expand_prompt",
        "unknown_words",
    ),
    "regions": (
        "Region",
        "regions_from_label_map",
    ),
    "result": ("Segmentation",),
    "segmenter": (
        "ImageFeatures",
        "Segmenter",
        "Stats",
    ),
    "tensorrt_backend": (
        "TensorRTBackend",
        "open_tensorrt",
    ),
    "text_cache": ("TextCache",),
    "tokenizer": (
        "Tokenizer",
        "clean_text",
    ),
    "upsample": ("resize_masks",),
    "windows": (
        "Window",
        "WindowAverage",
        "window_positions",
    ),
}
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
