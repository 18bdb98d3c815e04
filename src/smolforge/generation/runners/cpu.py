"""The CPU runner: weights packed once, and a whole step run by one call of the native library.

`kernels/decode.cpp` describes the layout of weights and caches. The packed weights lie on pages of 2 MiB, one matrix
behind the other, since looking up the addresses of small pages takes a good part of the time of reading (docs/log.md).

int8: one scale per output row, symmetric, rounding to nearest. int4: the blocks of a GGUF file where a matrix has some
of four bits, else a scale and a minimum per 32 weights of a row, searched for the least squared error (quantize.py).
The head and the embeddings stay int8, since every token passes through them and no other layer can correct them.
"file": the blocks of a GGUF file, number for number, with inputs of 15 bits where int4 has 8. Norms are fp32.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from smolforge.config import ModelConfig
from smolforge.generation.kv_cache import KVCache
from smolforge.generation.sequence import ScheduledChunk
from smolforge.gguf_file import Blocks, blocks_of
from smolforge.kernels import NativeUnavailable, library
from smolforge.limits import cpu_quota
from smolforge.model.architecture import architecture_of
from smolforge.model.llama import rotary_angles

Precision = Literal["fp32", "bf16", "int8", "int4", "file"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "int8", "int4")  # to ask for
UNIT, GROUP = 32, 64  # as in layout.h
F32, BF16, I8, I4, B8, B4 = range(6)
_BITS = {F32: 32, BF16: 16, I8: 8, I4: 4, B8: 8, B4: 4}
LARGE_PAGE = 2 << 20  # bytes, on x86-64, and on ARM with small pages of 4 KiB
ARENA_CHUNK = 32 << 20
SMALL_CACHE = 8 << 20  # bytes; to clear memory that was used before is quicker than new pages


class _Matrix(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_int32), ("n", ctypes.c_int32), ("k", ctypes.c_int32),
        ("data", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("bias", ctypes.c_void_p),
    ]  # fmt: skip


class _Layer(ctypes.Structure):
    _fields_ = [
        ("qkv", _Matrix), ("o", _Matrix), ("gate_up", _Matrix), ("down", _Matrix),
        *((name, ctypes.c_void_p) for name in ("norm1", "norm2", "q_norm", "k_norm")), ("rotates", ctypes.c_int32),
    ]  # fmt: skip


class _Shape(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in
          ("layers", "width", "heads", "kv_heads", "head_dim", "inner", "vocab", "cache_kind")),
        ("eps", ctypes.c_float),
    ]  # fmt: skip


class CpuCache:
    """Keys and values of one sequence in the packed layout: (layers, K, capacity / 32, d * 32) and values alike."""

    def __init__(self, config: ModelConfig, capacity: int, dtype: torch.dtype) -> None:
        heads = config.num_hidden_layers, config.num_key_value_heads
        self.capacity = _up(capacity, UNIT)
        columns = _up(config.head_dim, UNIT)
        keys = heads[0] * heads[1] * self.capacity * config.head_dim
        size = keys + heads[0] * heads[1] * self.capacity * columns
        # Zeros: rows that were never written are multiplied by 0, which must not meet an infinity. Small pages: a short
        # text writes to the beginning of each head's part, and a large page there would hold much that is not used.
        nbytes = size * dtype.itemsize
        small = nbytes <= SMALL_CACHE
        self.memory = torch.zeros(size, dtype=dtype) if small else _mapped(nbytes, large=False)[:nbytes].view(dtype)
        self.keys = self.memory[:keys].view(*heads, self.capacity // UNIT, config.head_dim * UNIT)
        self.values = self.memory[keys:].view(*heads, columns // UNIT, self.capacity // 2, 2 * UNIT)
        self.used = 0

    def copy_prefix(self, other: KVCache, length: int) -> None:
        """Take over the first `length` positions of another cache; whole units, the surplus is overwritten later."""
        assert isinstance(other, CpuCache)
        units, pairs = -(-length // UNIT), -(-length // 2)
        self.keys[:, :, :units] = other.keys[:, :, :units]
        self.values[..., :pairs, :] = other.values[..., :pairs, :]


class CpuRunner:
    """Runs chunks through the native step.

    Args:
        module: a Llama of `model/llama.py` on the CPU; its weights are packed and not kept.
        precision: of the weights. Keys and values are fp32 with "fp32" and "file", bf16 otherwise. "file" takes the
            matrices that have blocks of a GGUF file (`gguf_file.Blocks`) as they are, and the others as int8.
        threads: of one step; torch's own number unless given.

    Raises:
        NativeUnavailable: no compiler, or a shape that the native step does not have.
    """

    batch_invariant = True

    def __init__(self, module: Any, precision: Precision, *, threads: int | None = None) -> None:
        config: ModelConfig = module.config
        if not architecture_of(config).fast_decoding:
            raise NativeUnavailable(f"the native step runs Llama, not {config.architecture!r}")
        self._library: Any = library()
        self._library.smolforge_open.restype = ctypes.c_void_p
        usual = torch.get_num_threads()
        self.config, self.threads = config, threads or min(usual, cpu_quota() or usual)
        threads_of = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        self.name = f"native C++, {precision}, {threads_of}"
        self._dtype = torch.float32 if precision in ("fp32", "file") else torch.bfloat16
        self._held: list[Tensor] = []  # what the library points into
        self._arena = Arena()
        self._handle = None
        layers = (_Layer * config.num_hidden_layers)(*(self._layer(layer, precision) for layer in module.model.layers))
        table = module.model.embed_tokens
        head = self._matrix([table if config.tie_word_embeddings else module.lm_head], precision, head=True)
        embedding = head if config.tie_word_embeddings else self._matrix([table], precision, head=True)
        positions = torch.arange(config.max_position_embeddings)
        cos, sin = (
            self._hold(angle[:, : config.head_dim // 2].contiguous())
            for angle in rotary_angles(positions, config.head_dim, config.rope_theta, config.rope_scaling)
        )
        norm = self._vector(module.model.norm.weight)
        self.weight_bytes = sum(tensor.nbytes for tensor in self._held)
        shape = _Shape(
            config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.num_key_value_heads,
            config.head_dim, config.intermediate_size, config.vocab_size, F32 if self._dtype == torch.float32 else BF16,
            config.rms_norm_eps,
        )  # fmt: skip
        self._handle = ctypes.c_void_p(
            self._library.smolforge_open(
                ctypes.byref(shape), layers, ctypes.byref(embedding), ctypes.byref(head), norm,
                ctypes.c_void_p(cos.data_ptr()), ctypes.c_void_p(sin.data_ptr()), self.threads,
            )
        )  # fmt: skip

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.smolforge_close(self._handle)
            self._handle = None

    def cache_bytes(self, capacity: int) -> int:
        """Bytes of a cache for `capacity` positions."""
        c = self.config
        rows = c.num_hidden_layers * c.num_key_value_heads * _up(capacity, UNIT)
        return rows * (c.head_dim + _up(c.head_dim, UNIT)) * self._dtype.itemsize

    def new_cache(self, capacity: int) -> CpuCache:
        """An empty cache."""
        return CpuCache(self.config, capacity, self._dtype)

    def forward(self, chunks: Sequence[ScheduledChunk]) -> Tensor:
        """Run all chunks in one step of the library."""
        tokens, positions, caches, capacities, wanted = (list[int]() for _ in range(5))
        for chunk in chunks:
            count, cache = len(chunk.tokens), chunk.cache
            assert isinstance(cache, CpuCache) and chunk.start + count <= cache.capacity, "a chunk outgrew its cache"
            tokens += chunk.tokens
            positions += range(chunk.start, chunk.start + count)
            caches += [cache.memory.data_ptr()] * count
            capacities += [cache.capacity] * count
            wanted += range(len(tokens) - chunk.logits, len(tokens))
        logits = torch.empty(len(wanted), self.config.vocab_size)
        self._library.smolforge_step(
            self._handle, len(tokens), _ints(tokens), _ints(positions), (ctypes.c_void_p * len(caches))(*caches),
            _ints(capacities), len(wanted), _ints(wanted), ctypes.c_void_p(logits.data_ptr()),
        )  # fmt: skip
        return logits

    def _layer(self, layer: Any, precision: Precision) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        matrices = (
            self._matrix([attention.q_proj, attention.k_proj, attention.v_proj], precision),
            self._matrix([attention.o_proj], precision),
            # 16 gates and their 16 ups share a unit, so that SwiGLU is taken where the product leaves it.
            self._matrix([mlp.gate_proj, mlp.up_proj], precision, interleave=16),
            self._matrix([mlp.down_proj], precision),
        )
        own = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        norms = layer.input_layernorm, layer.post_attention_layernorm, *own
        vectors = (self._vector(norm.weight) if norm is not None else None for norm in norms)
        return _Layer(*matrices, *vectors, int(getattr(attention, "rotates", True)))

    def _matrix(self, modules: list[Any], precision: Precision, *, head: bool = False, interleave: int = 0) -> _Matrix:
        """Pack the matrices of modules as one: below each other, or by turns so many rows of each."""
        weights = [module.weight for module in modules]
        kind = {"fp32": F32, "bf16": BF16, "int4": I8 if head else I4}.get(precision, I8)
        taken = ("Q4_0", "Q4_1") if kind == I4 else ("Q8_0", "Q4_0", "Q4_1") if precision == "file" else ()
        blocks = _common_blocks(weights, taken)
        if blocks:
            rows = [_rows(b.rows.ctypes.data, b.rows.strides[0], len(b.rows), interleave) for b in blocks]
            kind = kind if kind == I4 else B8 if blocks[0].kind == "Q8_0" else B4
        else:
            for w in weights:
                if w.dtype not in (torch.float32, torch.bfloat16) or not w.is_contiguous():
                    raise NativeUnavailable(f"the native step packs contiguous fp32 or bf16 weights, not {w.dtype}")
            rows = [_rows(w.data_ptr(), w.stride(0) * w.itemsize, len(w), interleave) for w in weights]
        order = _by_turns(rows, interleave)
        n, k = len(order), weights[0].shape[1]
        units, padded = _up(n, UNIT) // UNIT, _up(k, GROUP)
        data = self._hold(self._arena.allocate(units * UNIT * padded * _BITS[kind] // 8))
        scale_bytes = {I8: 4, B8: padded // 16, I4: padded // 8, B4: padded // 8}.get(kind, 0)  # of a row
        scales = self._hold(self._arena.allocate(units * UNIT * scale_bytes))
        addresses = (ctypes.c_void_p * (units * UNIT))(*order)
        to = ctypes.c_void_p(data.data_ptr()), ctypes.c_void_p(scales.data_ptr()), self.threads
        if blocks:
            minima = int(blocks[0].kind == "Q4_1")
            self._library.smolforge_pack_blocks(_BITS[kind], minima, units, k, padded, addresses, *to)
        else:
            is_bf16 = int(weights[0].dtype == torch.bfloat16)
            self._library.smolforge_pack(kind, units, k, padded, addresses, is_bf16, *to)
        bias = None
        if getattr(modules[0], "bias", None) is not None:
            parts = [F.pad(m.bias.detach().float(), (0, -len(m.bias) % (interleave or 1))).tolist() for m in modules]
            bias = self._vector(torch.tensor(_by_turns(parts, interleave)))
        return _Matrix(kind, n, k, data.data_ptr(), scales.data_ptr(), bias)

    def _vector(self, weight: Tensor) -> ctypes.c_void_p:
        vector = weight.detach().float()
        padded = F.pad(vector, (0, -len(vector) % GROUP)).clone()
        return ctypes.c_void_p(self._hold(padded).data_ptr())

    def _hold(self, tensor: Tensor) -> Tensor:
        self._held.append(tensor)
        return tensor


def _common_blocks(weights: list[Any], kinds: tuple[str, ...]) -> list[Blocks]:
    """The blocks of GGUF that all these weights have, where they are of one of these kinds; else none."""
    found = [blocks_of(weight) for weight in weights]
    same = {each.kind if each else "" for each in found}
    return [each for each in found if each] if len(same) == 1 and same <= {*kinds} else []


def _rows(start: int, stride: int, count: int, multiple: int = 0) -> list[int | None]:
    """Addresses of the rows of a matrix, with nothing (None) up to a multiple."""
    return [start + i * stride for i in range(count)] + [None] * (-count % (multiple or 1))


def _by_turns(parts: list[list[Any]], turn: int) -> list[Any]:
    """`turn` entries of each part and again, or all of each where it is 0."""
    starts = range(0, len(parts[0]), turn) if turn else range(1)
    return [entry for i in starts for part in parts for entry in part[i : i + turn or None]]


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


def _ints(values: Sequence[int]) -> Any:
    return (ctypes.c_int32 * len(values))(*values)


class Arena:
    """Hands out pieces of large mappings, aligned to cache lines; all live as long as any piece of theirs."""

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def allocate(self, nbytes: int) -> Tensor:
        """Zeroed memory, (nbytes,) uint8."""
        if nbytes > self._free.numel():
            self._free = _mapped(max(ARENA_CHUNK, nbytes), large=True)
        piece, self._free = self._free[:nbytes], self._free[-(-nbytes // 64) * 64 :]
        return piece


def _mapped(nbytes: int, *, large: bool) -> Tensor:
    """At least so many bytes of zeros, from the border of a large page on; a page gets memory when it is written."""
    nbytes = -(-nbytes // LARGE_PAGE) * LARGE_PAGE
    # Private: Python's own default is shared, which Linux keeps on small pages. Windows has no such flags.
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANON} if hasattr(mmap, "MAP_ANON") else {}
    mapping = mmap.mmap(-1, nbytes + LARGE_PAGE, **private)
    advice = getattr(mmap, "MADV_HUGEPAGE" if large else "MADV_NOHUGEPAGE", None)
    if advice is not None:
        with contextlib.suppress(OSError):  # a wish, which a kernel without large pages does not know
            mapping.madvise(advice)
    whole = torch.frombuffer(mapping, dtype=torch.uint8)
    start = -whole.data_ptr() % LARGE_PAGE
    return whole[start : start + nbytes]
