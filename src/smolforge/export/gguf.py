"""A model as one GGUF file, which llama.cpp and everything built on it runs.

What differs from the Hugging Face directory: tensors have GGUF's names; the rows of q and k are reordered, because
llama.cpp rotates neighbouring pairs where Hugging Face rotates halves; a tied head is left out, as the reader takes
the embedding; and the tokenizer is written into the file, with the name of its splitting rule (`smollm`: every digit
alone, then GPT-2's pattern). Tensors are read from the mapped checkpoint, converted and written one at a time.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolforge.checkpoint.format import check_vocabulary, check_weights, read_config
from smolforge.checkpoint.locate import resolve_model
from smolforge.checkpoint.weights import read_weights
from smolforge.config import ModelConfig
from smolforge.errors import BadInput, RunFailed, unknown
from smolforge.export.gguf_vocabulary import Vocabulary
from smolforge.files import NO_ROOM, no_room, sync_directory
from smolforge.model.architecture import architecture_of
from smolforge.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

# By name: the type of the matrices, and that of the head, which decides about every token and costs little.
KINDS = {
    "f32": ("F32", "F32"),
    "f16": ("F16", "F16"),
    "bf16": ("BF16", "BF16"),
    "q8_0": ("Q8_0", "Q8_0"),
    "q4_0": ("Q4_0", "Q8_0"),
}
_FILE_TYPES = {
    "f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0",
}  # fmt: skip
_BLOCK = 32  # weights that share one scale in q8_0 and q4_0
_F16_MAX = 65504.0
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Exported:
    """A finished file: where it is, its size, its kind, and the tensors that could not be quantized."""

    path: Path
    bytes: int
    kind: str
    tensors: int
    kept_f16: list[str]


def export_gguf(
    model: str | Path,
    out: Path,
    *,
    kind: str = "f16",
    name: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Exported:
    """Write `model` to the GGUF file `out`, whole or not at all.

    Args:
        model: anything that `checkpoint.locate.resolve_model` takes.
        kind: f32, f16, bf16, q8_0, or q4_0 (whose head is q8_0). Norms are always f32.
        name: what the file says it is; the name of the directory unless given.

    Raises:
        BadInput: an unknown kind, an architecture or tokenizer that llama.cpp does not have, a directory as `out`.
        RunFailed: no room on the disk.
    """
    if kind not in KINDS:
        raise unknown("kind of GGUF", kind, KINDS, field="quantize")
    gguf = _library()
    directory = resolve_model(model)
    config = read_config(directory)
    llama_cpp_name = architecture_of(config).gguf
    if llama_cpp_name is None:
        raise BadInput(
            f"{directory} is of the architecture {config.architecture!r}, which llama.cpp does not have",
            field="model",
            hint="Only Llama models can be exported to GGUF.",
        )
    tokenizer = Tokenizer.from_pretrained(directory)
    check_vocabulary(config, tokenizer)
    vocabulary = Vocabulary.of(tokenizer, config.vocab_size)
    weights = check_weights(config, read_weights(directory), str(directory))
    out = Path(out)
    if out.is_dir():
        raise BadInput(f"{out} is a directory", field="out", hint="Give a file name such as model.gguf.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"cannot make {out.parent}: {error.strerror}", field="out") from None
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    plan = _plan(gguf, config, weights, kind)
    try:
        writer = gguf.GGUFWriter(temporary, llama_cpp_name)
        _write_header(gguf, writer, config, kind, name or directory.resolve().name)
        vocabulary.write(gguf, writer)
        _write_tensors(gguf, writer, config, weights, plan)
        _finish(temporary, out)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        failure = no_room(error, out, sum(item.bytes for item in plan))
        if isinstance(failure, RunFailed) and error.errno in NO_ROOM:
            failure.hint = "Nothing was changed. Free some room, or export a smaller kind."
        raise failure from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    kept = [item.name for item in plan if item.type == "F16" and kind.startswith("q")]
    if kept:
        say(f"{len(kept)} tensors stay f16: their rows are no multiple of {_BLOCK} (first: {kept[0]})")
    return Exported(out, out.stat().st_size, kind, len(plan), kept)


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise BadInput(
            "the package gguf is not installed", field="to", hint="Install it with: pip install 'smolforge[gguf]'"
        ) from None
    return gguf


def _finish(temporary: Path, out: Path) -> None:
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(out)
    sync_directory(out.parent)


@dataclass(frozen=True)
class _Item:
    """One tensor of the file: its name there and here, its type, and its size."""

    name: str
    source: str
    shape: tuple[int, ...]
    type: str
    bytes: int


def _plan(gguf: Any, config: ModelConfig, weights: dict[str, Tensor], kind: str) -> list[_Item]:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    matrix, head = KINDS[kind]
    head_name = EMBEDDING if config.tie_word_embeddings else HEAD
    plan = []
    for source, tensor in weights.items():
        name = names.get_name(source, try_suffixes=(".weight",))
        assert name is not None, source
        kind_of_it = "F32" if tensor.ndim == 1 else head if source == head_name else matrix
        if kind_of_it.startswith("Q") and tensor.shape[-1] % _BLOCK:
            kind_of_it = "F16"
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind_of_it]]
        plan.append(_Item(name, source, tuple(tensor.shape), kind_of_it, tensor.numel() // block * size))
    return plan


def _write_tensors(gguf: Any, writer: Any, config: ModelConfig, weights: dict[str, Tensor], plan: list[_Item]) -> None:
    import numpy as np

    for item in plan:
        kind = gguf.GGMLQuantizationType[item.type]
        writer.add_tensor_info(item.name, item.shape, np.dtype(np.float32), item.bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    try:
        for item in plan:
            array = _converted(config, item, weights[item.source])
            writer.write_tensor_data(gguf.quants.quantize(array, gguf.GGMLQuantizationType[item.type]))
    finally:
        writer.close()


def _converted(config: ModelConfig, item: _Item, tensor: Tensor) -> np.ndarray:
    import numpy as np

    array = tensor.float().numpy()
    if item.source.endswith("q_proj.weight"):
        array = permute(array, config.num_attention_heads)
    elif item.source.endswith("k_proj.weight"):
        array = permute(array, config.num_key_value_heads)
    if not np.isfinite(array).all():
        raise BadInput(f"tensor {item.source!r} holds values that are not finite", field="model")
    if item.type == "F16" and np.abs(array).max(initial=0.0) > _F16_MAX:
        raise BadInput(
            f"tensor {item.source!r} holds values beyond {_F16_MAX:,.0f}, the largest of f16",
            field="quantize",
            hint="Export bf16 or f32.",
        )
    return np.ascontiguousarray(array)


def permute(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a q or k projection from halves to neighbouring pairs: in each head, row i and row i + d/2 come together.

    Args:
        array: (heads * d, width), half-rotation layout.
    """
    rows, width = array.shape
    return array.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def _write_header(gguf: Any, writer: Any, config: ModelConfig, kind: str, name: str) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[kind]])
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
