"""The fast path on a GPU: all tokens that are decoded run as one batch of a fixed shape, replayed as a CUDA graph.

Decoding a token on a GPU is limited by starting its kernels, not by running them, unless the whole step is one
recorded graph (`graphs.py`); and a graph wants shapes that never change. So the single tokens of a step are filled
up to a batch of 1, 2, 4 ... 64 rows, and their pages (`pages.py`) to a power of two; each pair of sizes is recorded
once, when it first comes. Rows that only fill up read and write page 0, which belongs to no sequence. Prompts have
any shape and many rows: their kernels are long enough to be started one by one.

Without CUDA the same functions run eagerly, which is how the tests see them.

Shapes: B rows of a batch, P pages in a table, S = P * PAGE keys, T tokens of a prompt, H query heads, K key/value
heads, G = H / K, d head_dim.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from smolforge.config import ModelConfig
from smolforge.generation.fused import FusedLlama, attend_piece
from smolforge.generation.graphs import Graphs
from smolforge.generation.kernels import choose_kernels
from smolforge.generation.paged_attention import PagedKernels, attend_earlier, earlier_mask, gathered
from smolforge.generation.pages import PAGE, PagedCache, PagePool
from smolforge.generation.quantize import Precision
from smolforge.generation.sequence import ScheduledChunk

MOST_ROWS = 64  # of one batch; more single tokens run as several
FEWEST_PAGES = 4  # in a table: shorter texts share the recording of this size


class StaticRunner:
    """Runs the single tokens of a step together, padded to a fixed shape, and prompts beside them.

    The logits are brought to the CPU, as the engine wants them: 12 MB a step for 64 sequences of SmolLM2's vocabulary.

    Args:
        module: a Llama of `model/llama.py`, on the device.
        precision: fp32, bf16 or int8. Keys and values are fp32 with fp32 weights, bf16 otherwise.
        graphs: replay CUDA graphs where there is CUDA.
        kernels: what computes; chosen for the device unless given.

    Attributes:
        decisions: what was chosen and why, one sentence each.
    """

    batch_invariant = False  # a batch's size chooses the kernels, and a prompt's are others than a token's

    def __init__(
        self, module: Any, precision: Precision, *, graphs: bool = True, kernels: PagedKernels | None = None
    ) -> None:
        assert precision != "int4", "only a CPU has products for int4"
        config: ModelConfig = module.config
        self.config = config
        device = self._device = module.model.norm.weight.device
        self.decisions: list[str] = []
        if kernels is None:
            kernels, reason = choose_kernels(config, precision, device)
            self.decisions.append(f"kernels: {reason}")
        self._kernels = kernels
        self._fused = FusedLlama(module, precision, kernels)
        self.weight_bytes = self._fused.weight_bytes
        on_cuda = device.type == "cuda"
        self._pool = PagePool(
            config.num_hidden_layers, config.num_key_value_heads, config.head_dim, self._fused.dtype, device
        )  # fmt: skip
        self._graphs = Graphs(device) if on_cuda and graphs else None
        self._recorded_generation = 0
        way = "CUDA graphs" if self._graphs else "static shapes, no graphs"
        where = torch.cuda.get_device_name(device) if on_cuda else device.type
        self.name = f"{way}, {precision}, {kernels.name} kernels, {where}"

    def cache_bytes(self, capacity: int) -> int:
        """Bytes of a cache for `capacity` positions, in whole pages."""
        return self._pool.pages_for(capacity) * self._pool.page_bytes

    def new_cache(self, capacity: int) -> PagedCache:
        """An empty cache."""
        return self._pool.lease(capacity)

    @torch.no_grad()
    def forward(self, chunks: Sequence[ScheduledChunk]) -> Tensor:
        """Run the prompts' chunks, then the single tokens in batches; logits in the order of the chunks."""
        singles = [i for i, piece in enumerate(chunks) if len(piece.tokens) == 1]
        prompts = [i for i, piece in enumerate(chunks) if len(piece.tokens) > 1]
        results: dict[int, Tensor] = {}
        with torch.cuda.device(self._device) if self._device.type == "cuda" else contextlib.nullcontext():
            if prompts:
                logits = self._run_prompts([chunks[i] for i in prompts])
                results.update(zip(prompts, logits.split([chunks[i].logits for i in prompts]), strict=True))
            for at in range(0, len(singles), MOST_ROWS):
                chunk = singles[at : at + MOST_ROWS]
                logits = self._run_singles([chunks[i] for i in chunk])
                if len(chunk) == len(chunks) and all(piece.logits for piece in chunks):
                    return logits  # without a copy: it is large
                results.update((i, logits[row : row + chunks[i].logits]) for row, i in enumerate(chunk))
        return torch.cat([results[i] for i in range(len(chunks))]) if results else self._no_logits()

    def _run_singles(self, pieces: Sequence[ScheduledChunk]) -> Tensor:
        """Logits (rows, V) of the next token of each sequence."""
        longest = max(piece.start for piece in pieces) // PAGE + 1
        shape = _power_of_two(len(pieces)), 2 + max(_power_of_two(longest), FEWEST_PAGES)
        host = torch.zeros(shape, dtype=torch.int64, pin_memory=self._device.type == "cuda")
        rows = host.numpy()
        for row, piece in zip(rows, pieces, strict=False):
            assert piece.start < _cache(piece).capacity, "a piece outgrew its cache"
            table = _cache(piece).table[: piece.start // PAGE + 1]
            row[0], row[1], row[2 : 2 + len(table)] = piece.tokens[0], piece.start, table
        if self._graphs is None:
            logits = self._decode(host.to(self._device))
        else:
            if self._recorded_generation != self._pool.generation:
                self._graphs.clear()  # the pages have moved
                self._recorded_generation = self._pool.generation
            logits = self._graphs.run(self._decode, host)
        return self._to_host(logits[: len(pieces)])

    def _decode(self, inputs: Tensor) -> Tensor:
        """One token of each of B sequences: (B, 2 + P) of token, position and page table → logits (B, V)."""
        attend = self._kernels.over_pages(self._fused.rotary, self._pool.layers, inputs)
        return self._fused.logits(self._fused.hidden(inputs[:, 0], attend))

    def _run_prompts(self, pieces: Sequence[ScheduledChunk]) -> Tensor:
        """Logits of the pieces' last rows, as many as each wants; attention goes piece by piece."""
        device, spans, wanted, count = self._device, [], [], 0
        ids: list[int] = []
        positions: list[int] = []
        rows: list[Tensor] = []
        for piece in pieces:
            end = piece.start + len(piece.tokens)
            assert end <= _cache(piece).capacity, "a piece outgrew its cache"
            table = _cache(piece).table[: -(-end // PAGE)]
            rows.append(self._pool.rows(table)[piece.start : end])
            size = len(piece.tokens)
            mask = earlier_mask(piece.start, size, self._fused.dtype, device) if piece.start else None
            spans.append((count, count + size, torch.from_numpy(table).to(device), mask))
            count += size
            ids += piece.tokens
            positions += range(piece.start, end)
            wanted += range(count - piece.logits, count)
        to = torch.cat(rows)
        turn = self._fused.rotary.at(torch.tensor(positions, device=device))

        def attend(layer: int, qkv: Tensor) -> Tensor:
            q, k, v = turn(qkv)
            memory = self._pool.layers[layer]
            memory.index_copy_(0, to, torch.stack((k, v), 1))
            return torch.cat([
                attend_piece(q[a:b], k[a:b].transpose(0, 1)[None], v[a:b].transpose(0, 1)[None], None)
                if mask is None else attend_earlier(q[a:b], gathered(memory, table), mask)
                for a, b, table, mask in spans
            ])  # fmt: skip

        hidden = self._fused.hidden(torch.tensor(ids, device=device), attend)
        if not wanted:
            return self._no_logits()
        return self._to_host(self._fused.logits(hidden if len(wanted) == count else hidden[wanted]))

    def _to_host(self, logits: Tensor) -> Tensor:
        if logits.device.type == "cpu":
            return logits
        # A copy to pinned memory needs no second one on the way; torch keeps such blocks, so taking one is cheap.
        host = torch.empty(logits.shape, pin_memory=True)
        host.copy_(logits, non_blocking=True)
        torch.cuda.current_stream(self._device).synchronize()
        return host

    def _no_logits(self) -> Tensor:
        return torch.empty(0, self.config.vocab_size)


def _cache(piece: ScheduledChunk) -> PagedCache:
    assert isinstance(piece.cache, PagedCache)
    return piece.cache


def _power_of_two(n: int) -> int:
    """The least power of two that is not less than n."""
    return 1 << (n - 1).bit_length()
