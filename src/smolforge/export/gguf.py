"""Write a model as one GGUF file for llama.cpp and the programs built on it.

What differs from the Hugging Face directory: tensors have GGUF's names; the rows of q and k are reordered, because
llama.cpp rotates neighbouring pairs where Hugging Face rotates halves; a tied head is left out, as the reader takes
the embedding; and the tokenizer is part of the file. Tensors are read from the mapped checkpoint, converted and
written one at a time.

llama.cpp does not read tokenizer.json. It knows rules for splitting text by name (`smollm`: every digit alone, then
GPT-2's pattern); a tokenizer whose rule has no name there would load and give other tokens, so it is refused.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolforge.checkpoint.format import check_vocabulary, check_weights, read_config, read_generation_defaults
from smolforge.checkpoint.gguf import ROPE_FACTORS, gguf_names, permute, permuted_heads, rope_factors
from smolforge.checkpoint.locate import resolve_model
from smolforge.checkpoint.weights import read_weights
from smolforge.config import ModelConfig
from smolforge.errors import BadInput, unknown
from smolforge.export.calibrate import calibrated_weights
from smolforge.export.push import make_parent
from smolforge.files import replacing_file
from smolforge.generation.quantize import BLOCK_BYTES, quantize_blocks
from smolforge.gguf_file import ENDS_OF_TURN, PATTERNS, blocks_of, is_gguf, merges_of_scores
from smolforge.model.architecture import architecture_of
from smolforge.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

logger = logging.getLogger(__name__)

KINDS = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1")
_BLOCK = 32  # weights that share one scale in q8_0, q4_0 and q4_1
_F16_MAX = 65504.0
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Exported:
    """A finished file."""

    path: Path
    bytes: int
    kind: str
    tensors: int


def export_gguf(
    model: str | Path, out: Path, *, kind: str = "f16", name: str | None = None,
    calibration: Mapping[str, float] | None = None,
) -> Exported:  # fmt: skip
    """Write `model` to the GGUF file `out`; an export that fails leaves no file.

    Args:
        model: anything that `checkpoint.locate.resolve_model` takes.
        kind: f32, f16, bf16, q8_0, q4_0 or q4_1 (whose head is q8_0). Norms are always f32. Four bits are chosen by
            text (`calibrate.py`), unless they come from a file that has them already.
        name: the name in the file; that of the directory unless given.
        calibration: sources of that text by their weight; what the model writes itself unless given.

    Raises:
        BadInput: an unknown kind, an architecture or tokenizer that llama.cpp does not have, a directory as `out`.
        RunFailed: no room on the disk.
    """
    if kind not in KINDS:
        raise unknown("kind of GGUF", kind, KINDS, field="quantize")
    import gguf

    directory = resolve_model(model)
    config = read_config(directory)
    llama_cpp_name = architecture_of(config).gguf
    if llama_cpp_name is None:
        problem = f"{directory} is of the architecture {config.architecture!r}, which llama.cpp does not have"
        hint = "Only architectures that llama.cpp has can be exported to GGUF."
        raise BadInput(problem, field="model", hint=hint)
    if (config.architecture == "qwen3" and config.attention_bias) or config.no_rope_layer_interval not in (0, 4):
        raise BadInput(f"llama.cpp's {llama_cpp_name} has no such biases or rotation", field="model")
    tokenizer = Tokenizer.from_pretrained(directory)
    check_vocabulary(config, tokenizer)
    weights = check_weights(config, read_weights(directory), str(directory))
    if kind.startswith("q4") and not _has_blocks(weights, kind.upper()):
        weights = calibrated_weights(directory, kind.upper(), calibration)
    if config.rope_scaling:
        weights[ROPE_FACTORS] = rope_factors(config)
    out = Path(out)
    if out.is_dir():
        raise BadInput(f"{out} is a directory", field="out", hint="Give a file name such as model.gguf.")
    if out.exists() and out.samefile(directory):
        raise BadInput(f"{out} is the model itself", field="out", hint="Give another name.")
    make_parent(out)
    plan = _plan(gguf, config, weights, kind)
    full = "Nothing was changed. Free some room, or export a smaller kind."
    with replacing_file(out, needed=sum(item.bytes for item in plan), hint=full) as temporary:
        writer = gguf.GGUFWriter(temporary, llama_cpp_name)
        _write_header(gguf, writer, config, kind, name or directory.resolve().name.removesuffix(".gguf"))
        write_vocabulary(gguf, writer, directory, tokenizer, config.vocab_size)
        _write_tensors(gguf, writer, config, weights, plan)
    kept = [item.name for item in plan if item.type == "F16" and kind.startswith("q")]
    if kept:
        logger.info("%d tensors stay f16: their rows are not a multiple of %d (first: %s)", len(kept), _BLOCK, kept[0])
    return Exported(out, out.stat().st_size, kind, len(plan))


def _has_blocks(weights: Mapping[str, Tensor], kind: str) -> bool:
    return any(blocks is not None and blocks.kind == kind for blocks in map(blocks_of, weights.values()))


@dataclass(frozen=True)
class _Item:
    """One tensor of the file: its name there and here, its type, and its size."""

    name: str
    source: str
    type: str
    bytes: int


def _plan(gguf: Any, config: ModelConfig, weights: dict[str, Tensor], kind: str) -> list[_Item]:
    names = gguf_names(config)
    head_name = EMBEDDING if config.tie_word_embeddings else HEAD
    plan = []
    for source, tensor in weights.items():
        kind_of_it = "F32" if tensor.ndim == 1 else kind.upper()
        if kind_of_it.startswith("Q4") and source == head_name:
            kind_of_it = "Q8_0"  # every token depends on the head, and it costs little
        if kind_of_it.startswith("Q") and tensor.shape[-1] % _BLOCK:
            kind_of_it = "F16"
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind_of_it]]
        plan.append(_Item(names.get(source, source), source, kind_of_it, tensor.numel() // block * size))
    return plan


def _write_tensors(gguf: Any, writer: Any, config: ModelConfig, weights: dict[str, Tensor], plan: list[_Item]) -> None:
    import numpy as np

    for item in plan:
        kind = gguf.GGMLQuantizationType[item.type]
        shape = tuple(weights[item.source].shape)
        writer.add_tensor_info(item.name, shape, np.dtype(np.float32), item.bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    try:
        for item in plan:
            writer.write_tensor_data(_encoded(gguf, config, item, weights[item.source]))
    finally:
        writer.close()


def _encoded(gguf: Any, config: ModelConfig, item: _Item, tensor: Tensor) -> np.ndarray:
    """A tensor's bytes: its own blocks where they are of the type, else rounded here or by the package."""
    heads = permuted_heads(config, item.source)
    array, blocks = _converted(item, tensor), blocks_of(tensor)
    if blocks is not None and blocks.kind == item.type:
        array = blocks.rows
    elif item.type in BLOCK_BYTES:
        array = quantize_blocks(tensor, item.type)
    else:
        array = gguf.quants.quantize(array, gguf.GGMLQuantizationType[item.type])
    return permute(array, heads) if heads else array


def _converted(item: _Item, tensor: Tensor) -> np.ndarray:
    import numpy as np

    array = tensor.detach().float().numpy()
    if not np.isfinite(array).all():
        raise BadInput(f"tensor {item.source!r} holds values that are not finite", field="model")
    if item.type == "F16" and np.abs(array).max(initial=0.0) > _F16_MAX:
        problem = f"tensor {item.source!r} holds values beyond {_F16_MAX:,.0f}, the largest of f16"
        raise BadInput(problem, field="quantize", hint="Export bf16 or f32.")
    return np.ascontiguousarray(array)


def _write_header(gguf: Any, writer: Any, config: ModelConfig, kind: str, name: str) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def write_vocabulary(gguf: Any, writer: Any, source: Path, tokenizer: Tokenizer, size: int) -> None:
    """Add the tokenizer to the header: every one of `size` ids has a token and a type; the merges keep their order.

    Raises:
        BadInput: llama.cpp has no equal tokenizer; names the part that it lacks.
    """
    file = json.loads(tokenizer.backend.to_str())
    added = file.get("added_tokens") or []
    types = {entry["id"]: "CONTROL" if entry["special"] else "USER_DEFINED" for entry in added}
    tokens = [tokenizer.token_text(i) for i in range(size)]
    names = [types.get(i, "NORMAL" if token else "UNUSED") for i, token in enumerate(tokens)]
    tokens = [token or f"[PAD{i}]" for i, token in enumerate(tokens)]
    if sentencepiece := bool(file["model"].get("byte_fallback")):
        _write_sentencepiece(gguf, writer, file, tokens, names)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(split_rule(file))
        writer.add_add_space_prefix(False)
    writer.add_token_list(tokens)
    writer.add_token_types([int(gguf.TokenType[name]) for name in names])
    with tempfile.TemporaryDirectory() as place:
        if is_gguf(source):  # what gguf reads are the files of a directory
            tokenizer.save(Path(place))
        files = place if is_gguf(source) else source
        special = gguf.SpecialVocab(files, load_merges=not sentencepiece, n_vocab=size)
    special.special_token_ids["eos"] = tokenizer.eos_id
    ends = read_generation_defaults(source).get("eos_token_id", [])
    for token_id in [tokenizer.eos_id, *(ends if isinstance(ends, list) else [ends])]:
        if tokenizer.token_text(token_id) in ENDS_OF_TURN:
            special.special_token_ids.setdefault("eot", token_id)
    special.add_special_token.setdefault("bos", False)
    special.add_to_gguf(writer, quiet=True)


def _write_sentencepiece(gguf: Any, writer: Any, file: dict[str, Any], tokens: list[str], names: list[str]) -> None:
    """The keys of a tokenizer of Llama 2's kind, whose merges llama.cpp finds by scores; `names` become its types."""
    merges = [tuple(merge if isinstance(merge, list) else merge.split(" ", 1)) for merge in file["model"]["merges"]]
    for i, token in enumerate(tokens):
        if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            names[i] = "BYTE"
        elif token == file["model"].get("unk_token"):
            names[i] = "UNKNOWN"
    scores = {"".join(pair): -float(rank) for rank, pair in reversed(list(enumerate(merges, 1)))}
    lowest = -float(len(merges) + 1)  # of characters, which nothing is merged into
    values = [
        0.0 if name in ("CONTROL", "UNKNOWN") else scores.get(t, lowest) for t, name in zip(tokens, names, strict=True)
    ]
    kinds = [int(gguf.TokenType[name]) for name in names]
    normalizer = file.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    spaces = [(step.get("type"), step.get("prepend") or step.get("content")) for step in steps]
    known = spaces in ([("Prepend", "\u2581"), ("Replace", "\u2581")], [("Replace", "\u2581")])
    if not known or file.get("pre_tokenizer") or set(merges_of_scores(tokens, kinds, values)) != set(merges):
        raise BadInput(
            "the tokenizer's merges or spaces are not those of a sentencepiece vocabulary", field="tokenizer",
            hint="Llama 2's kind can be exported: spaces become \u2581, and every pair that makes a token is merged.",
        )  # fmt: skip
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores(values)
    writer.add_add_space_prefix(len(spaces) == 2)


def split_rule(file: dict[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer.json splits text before merging (`tokenizer.ggml.pre`), or BadInput."""
    model, decoder = file["model"], (file.get("decoder") or {}).get("type")
    if model.get("type") != "BPE" or model.get("byte_fallback") or decoder != "ByteLevel":
        hint = "Byte-level BPE and sentencepiece's BPE can be exported to GGUF."
        problem = f"the tokenizer is a {model.get('type')} with the decoder {decoder}"
        raise BadInput(problem, field="tokenizer", hint=hint)
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise BadInput(f"the tokenizer has {key} {model[key]!r}, which llama.cpp does not", field="tokenizer")
    steps = file.get("pre_tokenizer") or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    shapes = [_shape(step) for step in steps]
    normalizer = file.get("normalizer")
    if normalizer is not None and not (normalizer.get("type") == "NFC" and shapes == ["qwen2", "bytes alone"]):
        changed = f"changes text by {normalizer.get('type')} first"
        raise BadInput(f"the tokenizer {changed}, which llama.cpp does not", field="tokenizer")
    if shapes == ["digits", "bytes"]:
        return "smollm"
    if shapes == ["bytes"]:
        return "gpt-2"
    ignores = bool(model.get("ignore_merges"))
    if shapes[0] in PATTERNS and shapes[1:] == ["bytes alone"] and ignores is (shapes[0] == "llama-bpe"):
        return shapes[0] or ""
    kinds = " then ".join(str(step.get("type")) for step in steps)
    problem = f"the tokenizer splits text by {kinds}, for which no rule of llama.cpp is known here"
    hint = "Known: single digits then GPT-2's pattern (SmolLM2's and ours), GPT-2's alone, Llama 3's and Qwen2's."
    raise BadInput(problem, field="tokenizer", hint=hint)


def _shape(step: dict[str, Any]) -> str | None:
    if step.get("type") == "Digits" and step.get("individual_digits"):
        return "digits"
    if step.get("type") == "ByteLevel" and step.get("use_regex", True) and not step.get("add_prefix_space"):
        return "bytes"
    if step.get("type") == "ByteLevel" and not step.get("add_prefix_space"):
        return "bytes alone"
    if step.get("type") == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return next((name for name, pattern in PATTERNS.items() if step["pattern"].get("Regex") == pattern), None)
    return None
