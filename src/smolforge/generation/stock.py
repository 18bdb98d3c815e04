"""The fast path on torch's own kernels, where no compiler can build the native step.

A step is one call into TorchScript: it needs no compiler, and calls a kernel in a third of the time that Python
takes, which between products as short as these is a third of the step. Where a torch has it no more, the same code
runs in Python. The residual stream and its norms are fp32, the cache bf16 unless the weights are fp32.

The query heads that share a key head are rows of one attention, over the cache cut to its length: that is eight
times faster for one token than masking, or than `enable_gqa`.

Shapes: M rows of all pieces, D hidden, H query heads, K key/value heads, d head_dim, V vocabulary.
"""

import contextlib
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smolforge.config import ModelConfig
from smolforge.generation.arena import Arena
from smolforge.generation.fused import attend_piece, joined_weights
from smolforge.generation.kv_cache import TensorCache
from smolforge.generation.products import Int8Rounding, one_row, product
from smolforge.generation.quantize import Int8, Precision, Weight, quantize
from smolforge.generation.sequence import ScheduledChunk
from smolforge.model.llama import LlamaRMSNorm, rotary_angles


class StockRunner:
    """Runs pieces through fused torch operations.

    Args:
        module: a Llama of `model/llama.py` on the CPU.
        precision: of the weights.
    """

    batch_invariant = False  # the kernels choose their blocking by the number of rows

    def __init__(self, module: Any, precision: Precision) -> None:
        self.config: ModelConfig = module.config
        self._dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        llama = _Llama(module, precision).eval()
        packed = [module for module in llama.modules() if isinstance(module, Int8Rounding)]  # by fbgemm: no buffers
        self.weight_bytes = sum(held.nbytes for held in (*llama.buffers(), *packed))
        self._llama, how = _scripted(llama)
        by = " by fbgemm" if precision == "int8" and isinstance(llama.head, Int8Rounding) else ""
        self.name = f"torch's kernels{how}, {precision}{by}, {torch.get_num_threads()} threads"

    def cache_bytes(self, capacity: int) -> int:
        """Bytes of a cache for `capacity` positions."""
        return TensorCache.bytes_for(self.config, capacity, self._dtype)

    def new_cache(self, capacity: int) -> TensorCache:
        """An empty cache."""
        return TensorCache(self.config, capacity, self._dtype, torch.device("cpu"))

    def forward(self, chunks: Sequence[ScheduledChunk]) -> Tensor:
        """Run all rows of all chunks together; attention goes piece by piece."""
        wanted, rows = [], 0
        for piece in chunks:
            rows += len(piece.tokens)
            wanted += range(rows - piece.logits, rows)
        caches = [p.cache.memory for p in chunks]  # type: ignore[attr-defined]
        starts, ends = [p.start for p in chunks], [p.start + len(p.tokens) for p in chunks]
        masks = [piece_mask(start, end) for start, end in zip(starts, ends, strict=True)]
        ids = torch.tensor([token for piece in chunks for token in piece.tokens])
        # The simple executor: the other one studies every new number of rows for two calls before it is as fast.
        simple = torch.jit.optimized_execution(False)  # pyright: ignore[reportPrivateImportUsage]
        with torch.inference_mode(), simple, one_row() if rows == 1 else contextlib.nullcontext():
            return self._llama(ids, caches, starts, ends, masks, torch.tensor(wanted, dtype=torch.long))


class _Llama(nn.Module):
    """The weights of a Llama as they are now, packed, and a step over them."""

    turns: Tensor

    def __init__(self, module: Any, precision: Precision) -> None:
        super().__init__()
        config: ModelConfig = module.config
        arena = Arena()
        self.layers = nn.ModuleList(_Layer(layer, config, precision, arena) for layer in module.model.layers)
        table = quantize(module.model.embed_tokens.weight.detach(), precision, head=True)
        tied = config.tie_word_embeddings
        head = table if tied else quantize(module.output_weight.detach(), precision, head=True)
        self.head = product(head, config.hidden_size, arena)
        shared = tied and isinstance(table, Tensor)  # the rows of a packed head cannot be read
        self.embed = _Embedding(self.head.get_buffer("weight") if shared else table)
        cos, sin = rotary_angles(torch.arange(config.max_position_embeddings), config.head_dim, config.rope_theta)
        half = config.head_dim // 2
        self.register_buffer("turns", torch.complex(cos[:, :half], sin[:, :half]))
        self.norm = _Norm(module.model.norm)
        self.vocab_size = config.vocab_size

    def forward(
        self, ids: Tensor, caches: list[Tensor], starts: list[int], ends: list[int], masks: list[Tensor | None],
        wanted: Tensor,
    ) -> Tensor:  # fmt: skip
        """Extend the caches and return logits.

        Args:
            ids: (M,) tokens of all pieces.
            caches: the memory of each piece's cache, (layers, 2 K, capacity, d).
            starts: the position of each piece's first row; it ends before the position in `ends`.
            masks: as `attend_piece` wants them.
            wanted: the rows whose logits are returned.

        Returns:
            fp32 logits (number of wanted rows, V).
        """
        positions = torch.cat([torch.arange(starts[i], ends[i]) for i in range(len(starts))])
        turn = self.turns[positions].unsqueeze(1)
        x = self.embed(ids)
        for layer, run in enumerate(self.layers):
            run(x, layer, turn, caches, starts, ends, masks)
        if len(wanted) < len(ids):
            x = x[wanted]
        return self.head(self.norm(x)).float() if len(wanted) else x.new_empty(0, self.vocab_size)


class _Layer(nn.Module):
    """One block, which changes the residual stream in place."""

    def __init__(self, layer: Any, config: ModelConfig, precision: Precision, arena: Arena) -> None:
        super().__init__()
        qkv, *others = joined_weights(layer)
        paired = _paired(qkv, config)
        products = [product(quantize(w, precision), w.shape[1], arena) for w in (paired, *others)]
        self.qkv, self.o, self.gate_up, self.down = products
        self.norm1, self.norm2 = _Norm(layer.input_layernorm), _Norm(layer.post_attention_layernorm)
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.dim = config.head_dim

    def forward(
        self, x: Tensor, layer: int, turn: Tensor, caches: list[Tensor], starts: list[int], ends: list[int],
        masks: list[Tensor | None],
    ) -> None:  # fmt: skip
        # A slice costs as much as a small kernel: `narrow` is one, an index with colons one for each of them.
        count, turning = x.shape[0], self.heads + self.kv_heads
        qkv = self.qkv(self.norm1(x)).float().view(count, -1, self.dim)
        torch.view_as_complex(qkv.narrow(1, 0, turning).unflatten(2, (-1, 2))).mul_(turn)
        qkv = qkv.to(caches[0].dtype)
        q, kv = qkv.narrow(1, 0, self.heads), qkv.narrow(1, self.heads, 2 * self.kv_heads).transpose(0, 1)
        mixed: list[Tensor] = []
        row = 0
        for i in range(len(starts)):
            start, end = starts[i], ends[i]
            rows = end - start
            cache = caches[i][layer]
            cache.narrow(1, start, rows).copy_(kv if rows == count else kv.narrow(1, row, rows))
            known = cache.narrow(1, 0, end).unsqueeze(0)
            keys, values = known.narrow(1, 0, self.kv_heads), known.narrow(1, self.kv_heads, self.kv_heads)
            mixed.append(attend_piece(q if rows == count else q.narrow(0, row, rows), keys, values, masks[i]))
            row += rows
        x += self.o(mixed[0] if len(mixed) == 1 else torch.cat(mixed))
        joint = self.gate_up(self.norm2(x))
        inner = joint.shape[1] // 2
        x += self.down(F.silu(joint.narrow(1, 0, inner), inplace=True).mul_(joint.narrow(1, inner, inner)))


class _Embedding(nn.Module):
    """Rows of a table, in fp32."""

    values: Tensor
    scales: Tensor

    def __init__(self, table: Weight) -> None:
        super().__init__()
        assert isinstance(table, Tensor | Int8)  # int4 leaves the embedding at int8
        self.packed = isinstance(table, Int8)
        self.register_buffer("values", table.values if isinstance(table, Int8) else table)
        self.register_buffer("scales", table.scales if isinstance(table, Int8) else torch.ones(()))

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.values[ids].float()
        return rows * self.scales[ids, None] if self.packed else rows


class _Norm(nn.Module):
    """The root-mean-square norm (M, D) of model/llama.py, in the fewest calls: each costs a row a microsecond."""

    weight: Tensor
    eps: Tensor

    def __init__(self, norm: LlamaRMSNorm) -> None:
        super().__init__()
        self.register_buffer("weight", norm.weight.detach().float())
        self.register_buffer("eps", torch.full((1, 1, 1), norm.eps))

    def forward(self, x: Tensor) -> Tensor:
        squares = torch.baddbmm(self.eps, x.unsqueeze(1), x.unsqueeze(2), alpha=1.0 / x.shape[1])  # the mean, and eps
        return (x * squares.squeeze(1).rsqrt_()).mul_(self.weight)


def _paired(qkv: Tensor, config: ModelConfig) -> Tensor:
    """Rows of query and key in an order that puts the two numbers that turn together side by side, as complex ones.

    Query and key are ordered alike, so their products stay the same.
    """
    turning = (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    pairs = qkv[:turning].unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2)
    return torch.cat((pairs.flatten(0, 2), qkv[turning:]))


def piece_mask(start: int, end: int) -> Tensor | None:
    """What `attend_piece` wants for rows start .. end - 1."""
    if end - start == 1 or start == 0:
        return None
    return torch.ones(end - start, end, dtype=torch.bool).tril(start)


def _scripted(llama: _Llama) -> tuple[Any, str]:
    """The module compiled by TorchScript, and that in words; as it is where this torch cannot."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated in favour of what needs a compiler
        try:
            return torch.jit.script(llama), " in TorchScript"
        except Exception:  # whatever a torch without it raises: the same code runs in Python
            return llama, ""
