"""Attention over pages in torch's own operations: right on any device, and what Triton's kernels are held to.

Shapes: as in static.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from smolforge.generation.fused import Attend, Kernels, Rotary
from smolforge.generation.pages import PAGE


class PagedKernels(Kernels):
    """The plain kernels, and decoding over pages."""

    name = "torch's"

    def over_pages(self, rotary: Rotary, memories: list[Tensor], inputs: Tensor) -> Attend:
        """Attention of one token of each of B sequences, which also writes its keys and values.

        Args:
            memories: `PagePool.layers`.
            inputs: (B, 2 + P) int64: token, position and page table.
        """
        batch, kv_heads = len(inputs), rotary.config.num_key_value_heads
        at, tables = inputs[:, 1:2], inputs[:, 2:]
        pages = tables.reshape(-1)
        rows = (tables.gather(1, at // PAGE) * PAGE + at % PAGE)[:, 0]  # where the new keys and values go
        seen = torch.arange(tables.shape[1] * PAGE, device=inputs.device) <= at
        # Added to the scores; SDPA would make it of booleans anew in every layer.
        mask = torch.zeros(seen.shape, dtype=rotary.cos.dtype, device=inputs.device).masked_fill(~seen, -torch.inf)
        mask = mask[:, None, None]  # (B, 1, 1, S)
        turn = rotary.at(inputs[:, 1])

        def attend(layer: int, qkv: Tensor) -> Tensor:
            q, k, v = turn(qkv)
            memories[layer].index_copy_(0, rows, torch.stack((k, v), 1))
            # The query heads that share a key head are rows: (B, K, G, d), see stock.py.
            q = q.unflatten(1, (kv_heads, -1))
            known = gathered(memories[layer], pages).unflatten(0, (batch, -1))  # (B, S, 2, K, d)
            keys, values = known.permute(2, 0, 3, 1, 4)  # (B, K, S, d)
            return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask).reshape(batch, -1)

        return attend


def gathered(memory: Tensor, pages: Tensor) -> Tensor:
    """The positions of some pages, one after another: (number of pages * PAGE, 2, K, d)."""
    return memory.unflatten(0, (-1, PAGE)).index_select(0, pages).flatten(0, 1)


def earlier_mask(start: int, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What is added to the scores (T, S) of rows start .. start + count - 1 over their pages."""
    # Up to the end of the last page: kernels want masks whose rows are aligned.
    keys = -(-(start + count) // PAGE) * PAGE
    return torch.full((count, keys), -torch.inf, dtype=dtype, device=device).triu_(start + 1)


def attend_earlier(q: Tensor, known: Tensor, mask: Tensor) -> Tensor:
    """Rows of a prompt over its earlier pieces and themselves: q (T, H, d), known (S, 2, K, d) → (T, H d).

    Keys are repeated for their group: with a mask, `enable_gqa` leaves a GPU only the slowest kernel.
    """
    keys, values = known.repeat_interleave(q.shape[1] // known.shape[2], 2).permute(1, 2, 0, 3)[:, None]  # (1, H, S, d)
    y = F.scaled_dot_product_attention(q.transpose(0, 1)[None], keys, values, attn_mask=mask)
    return y[0].transpose(0, 1).flatten(1)
