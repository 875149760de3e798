"""A bundle of a few kilobytes with the interface of a real one, whose label maps can be predicted exactly.

The "model" knows the colours of `PALETTE` by name. A block of pixels of exactly one of these colours gets that
colour's unit vector as its grounded feature, any colour far from all of them gets the unit vector of `other` (the last
dimension), and a prompt gets the vectors of the colour words in it; one that names no colour matches nothing. So a
scene painted in palette colours, whose borders lie on the mask grid, is labelled on that grid without error where kp_w
is 0; upsampled to the image, corners lose a pixel. With the KP branch, which sees whole patches, borders move by up to
two pixels.

bundle.json is written by hand here, not through tclkit: it states the schema a second time.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "cyan": (0, 255, 255),
    "magenta": (255, 0, 255),
    "black": (0, 0, 0),
    "white": (255, 255, 255),
}
OTHER_RGB = (124, 116, 104)  # the pad colour; far from every colour of the palette
FILLER_WORDS = ("a", "an", "the", "photo", "of", "circle", "square", "itap", ".")
TEMPLATES = ("itap of a {}.", "a photo of the {}.", "a photo of {}s.")
WIDTH = len(PALETTE) + 1
MASK_SCALE = 4  # mask grid = patch grid x 4
SPECIALS = ("<|startoftext|>", "<|endoftext|>")

_SHARPNESS = 20.0
_OTHER_FEATURE = 0.05
_MASK_W, _MASK_B = 12.7, -3.6
_SPLIT = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


def write_tiny_bundle(
    folder: str | Path,
    *,
    size: tuple[int, int] = (64, 64),
    more_sizes: Sequence[tuple[int, int]] = (),
    patch: int = 16,
    name: str = "tiny",
    kp_w: float = 0.3,
    templates: Sequence[str] = TEMPLATES,
    context_length: int = 77,
    vocabulary: Sequence[str] | None = None,
) -> Path:
    """Write the bundle into `folder` (made if need be) and return it.

    Args:
        folder: where to.
        size: (H, W) of the first image graph, multiples of `patch`.
        more_sizes: further image graphs, image-HxW.onnx.
        patch: pixels, a multiple of 4.
        name: name in bundle.json.
        kp_w: share of the KP branch; 0 leaves the branch out of all graphs.
        templates: prompt templates.
        context_length: tokens.
        vocabulary: words the model claims to know; None for no claim.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer()
    images = []
    for index, (height, width) in enumerate([size, *more_sizes]):
        file = "image.onnx" if index == 0 else f"image-{height}x{width}.onnx"
        onnx.save(_image_graph(height, width, patch, with_kp=kp_w > 0), folder / file)
        images.append({"height": height, "width": width, "files": {"fp32": file}})
    onnx.save(_masks_graph(with_kp=kp_w > 0), folder / "masks.onnx")
    onnx.save(_text_graph(tokenizer), folder / "text.onnx")
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    manifest = {
        "schema_version": 1,
        "name": name,
        "description": "knows eight colours; for tests",
        "created": "2024-01-01T00:00:00+00:00",
        "tclkit_version": "0.1.0",
        "model": {
            "architecture": "custom",
            "patch_size": patch,
            "embed_dim": WIDTH,
            "context_length": context_length,
            "vocab_size": tokenizer.get_vocab_size(),
            "mask_scale": MASK_SCALE,
        },
        "images": images,
        "masks": "masks.onnx",
        "text": "text.onnx",
        "tokenizer": "tokenizer.json",
        "preprocessing": {
            "mean": [123.675, 116.28, 103.53],
            "std": [58.395, 57.12, 57.375],
            "interpolation": "bilinear-uint8",
        },
        "templates": list(templates),
        "kp_w": kp_w,
        "thresholds": {"background": 0.5, "background_pamr": 0.4},
        "vocabulary": None if vocabulary is None else {"note": "knows only colours", "words": list(vocabulary)},
        "files": {},
        "provenance": {"checkpoint_sha256": "0" * 64, "configs": {}, "versions": {}},
        "checks": {"fp32": {"image.onnx": {"max_abs_error": 0.0}}},
    }
    write_manifest(folder, manifest)
    return folder


def write_manifest(folder: Path, manifest: dict[str, object]) -> None:
    """Write bundle.json with sizes and hashes of the files that lie in `folder`."""
    manifest["files"] = {
        path.name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "size_bytes": path.stat().st_size}
        for path in sorted(folder.iterdir())
        if path.name != "bundle.json" and path.is_file()
    }
    (folder / "bundle.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def tiny_tokenizer() -> Tokenizer:
    """CLIP's kind of tokenizer whose merges make one token of each known word; other words fall to bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _merges([*FILLER_WORDS, *PALETTE])
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(pair) for pair in merges), *SPECIALS]
    vocab = {token: index for index, token in enumerate(tokens)}  # end of text is the largest id
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    start, end = SPECIALS
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, vocab[start]), (end, vocab[end])]
    )
    return tokenizer


def _merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Merges that make one token of each word; appended in order, so that earlier words stay whole."""
    merges: list[tuple[str, str]] = []
    for word in words:
        symbols = [*word[:-1], word[-1] + "</w>"]
        for pair in merges:
            symbols = _apply(symbols, pair)
        while len(symbols) > 1:
            merges.append((symbols[0], symbols[1]))
            symbols = _apply(symbols, merges[-1])
    return merges


def _apply(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    index = 0
    while index < len(symbols):
        step = 2 if tuple(symbols[index : index + 2]) == pair else 1
        merged.append("".join(symbols[index : index + step]))
        index += step
    return merged


def _image_graph(height: int, width: int, patch: int, *, with_kp: bool) -> onnx.ModelProto:
    """Uint8 [B,H,W,3] -> grounded [B,D,4h,4w] and kp [B,D,h,w], both of unit length over D."""
    palette = np.array(list(PALETTE.values()), np.float32) / 255  # (K, 3)
    colours = len(palette)
    # exp(-s |p - c|^2) = exp(s (2 p.c - |c|^2 - |p|^2)); a 1x1 convolution over (r, g, b, |rgb|^2)
    weight = np.concatenate([2 * palette, -np.ones((colours, 1), np.float32)], axis=1)[:, :, None, None]
    constants = {
        "scale": np.float32(1 / 255),
        "weight": (_SHARPNESS * weight).astype(np.float32),
        "bias": (-_SHARPNESS * (palette**2).sum(1)).astype(np.float32),
        "other_pads": np.array([0, 0, 0, 0, 0, 1, 0, 0], np.int64),  # one more channel at the end
        "other": np.float32(_OTHER_FEATURE),
        "channel_axis": np.array([1], np.int64),
    }
    nodes = [
        helper.make_node("Cast", ["image"], ["bytes"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["bytes", "scale"], ["unit"]),
        helper.make_node("Transpose", ["unit"], ["rgb"], perm=[0, 3, 1, 2]),
    ]
    outputs = []
    branches = {"grounded": patch // MASK_SCALE} | ({"kp": patch} if with_kp else {})
    for name, stride in branches.items():
        nodes += [
            helper.make_node(
                "AveragePool", ["rgb"], [f"{name}_rgb"], kernel_shape=[stride, stride], strides=[stride, stride]
            ),
            helper.make_node("Mul", [f"{name}_rgb", f"{name}_rgb"], [f"{name}_squares"]),
            helper.make_node("ReduceSum", [f"{name}_squares", "channel_axis"], [f"{name}_norm"], keepdims=1),
            helper.make_node("Concat", [f"{name}_rgb", f"{name}_norm"], [f"{name}_in"], axis=1),
            helper.make_node("Conv", [f"{name}_in", "weight", "bias"], [f"{name}_log"]),
            helper.make_node("Exp", [f"{name}_log"], [f"{name}_colours"]),
            helper.make_node("Pad", [f"{name}_colours", "other_pads", "other"], [f"{name}_raw"]),
            helper.make_node("ReduceL2", [f"{name}_raw", "channel_axis"], [f"{name}_length"], keepdims=1),
            helper.make_node("Div", [f"{name}_raw", f"{name}_length"], [name]),
        ]
        shape = ["B", WIDTH, height // stride, width // stride]
        outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    inputs = [helper.make_tensor_value_info("image", TensorProto.UINT8, ["B", height, width, 3])]
    return _model("image", nodes, inputs, outputs, constants)


def _masks_graph(*, with_kp: bool) -> onnx.ModelProto:
    """Features, text [N,D] and kp_w -> soft masks [B,N,4h,4w]."""
    constants = {
        "w": np.float32(_MASK_W),
        "b": np.float32(_MASK_B),
        "ten": np.float32(10),
        "quarter": np.float32(0.25),
        "one": np.float32(1),
        "scales": np.array([1, 1, MASK_SCALE, MASK_SCALE], np.float32),
    }
    inputs = [
        helper.make_tensor_value_info("grounded", TensorProto.FLOAT, ["B", WIDTH, "mh", "mw"]),
        helper.make_tensor_value_info("text", TensorProto.FLOAT, ["N", WIDTH]),
    ]
    grounded = "grounded_mask" if with_kp else "masks"
    nodes = [
        helper.make_node("Einsum", ["grounded", "text"], ["cosine"], equation="bdhw,nd->bnhw"),
        helper.make_node("Mul", ["cosine", "w"], ["scaled"]),
        helper.make_node("Add", ["scaled", "b"], ["logits"]),
        helper.make_node("Sigmoid", ["logits"], [grounded]),
    ]
    if with_kp:
        inputs.insert(1, helper.make_tensor_value_info("kp", TensorProto.FLOAT, ["B", WIDTH, "h", "w"]))
        inputs.append(helper.make_tensor_value_info("kp_w", TensorProto.FLOAT, []))
        nodes += [
            helper.make_node("Einsum", ["kp", "text"], ["kp_cosine"], equation="bdhw,nd->bnhw"),
            helper.make_node("Sub", ["kp_cosine", "quarter"], ["kp_centred"]),
            helper.make_node("Mul", ["kp_centred", "ten"], ["kp_logits"]),
            helper.make_node("Sigmoid", ["kp_logits"], ["kp_small"]),
            helper.make_node("Resize", ["kp_small", "", "scales"], ["kp_mask"], mode="linear"),
            helper.make_node("Mul", ["kp_mask", "kp_w"], ["kp_share"]),
            helper.make_node("Sub", ["one", "kp_w"], ["rest"]),
            helper.make_node("Mul", ["grounded_mask", "rest"], ["grounded_share"]),
            helper.make_node("Add", ["kp_share", "grounded_share"], ["masks"]),
        ]
    outputs = [helper.make_tensor_value_info("masks", TensorProto.FLOAT, ["B", "N", "mh", "mw"])]
    return _model("masks", nodes, inputs, outputs, constants)


def _text_graph(tokenizer: Tokenizer) -> onnx.ModelProto:
    """Token ids [M,L] -> raw embeddings [M,D]: the sum of the rows of its tokens, of which only colours count."""
    table = np.zeros((tokenizer.get_vocab_size(), WIDTH), np.float32)
    for index, word in enumerate(PALETTE):
        (token,) = tokenizer.encode(word, add_special_tokens=False).ids
        table[token, index] = 3.0
    table[tokenizer.token_to_id(SPECIALS[0]), WIDTH - 1] = -0.01  # no prompt is the zero vector, none is `other`
    constants = {"table": table, "token_axis": np.array([1], np.int64)}
    nodes = [
        helper.make_node("Gather", ["table", "token_ids"], ["rows"], axis=0),
        helper.make_node("ReduceSum", ["rows", "token_axis"], ["embeddings"], keepdims=0),
    ]
    inputs = [helper.make_tensor_value_info("token_ids", TensorProto.INT64, ["M", "L"])]
    outputs = [helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, ["M", WIDTH])]
    return _model("text", nodes, inputs, outputs, constants)


def _model(
    name: str,
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    constants: dict[str, np.ndarray],
) -> onnx.ModelProto:
    initialisers = [numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items()]
    graph = helper.make_graph(nodes, name, inputs, outputs, initialisers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model
