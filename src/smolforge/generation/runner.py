"""What runs the model: pieces of sequences in, logits out. The engine cannot tell which runner it has.

`ModuleRunner` is the plain one: any module with the forward pass of `model/llama.py`, with its live weights, on
any device, one sequence at a time. It is right by construction and sees every change of the weights, so
training samples with it. The fast ones are `native.py`, `stock.py` (fused, on torch's own kernels) and, on a GPU,
`static.py` (CUDA graphs).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from smolforge.config import ModelConfig
from smolforge.generation.cache import Cache, TensorCache
from smolforge.generation.scheduler import Piece


class Runner(Protocol):
    """Runs pieces and owns the layout of weights and caches.

    Attributes:
        name: what runs, in words, for people.
        config: the shape of the model.
        batch_invariant: a row's logits are bitwise the same whatever else is in the batch, however its prompt
            was cut, and whether a row of the cache was read in a prompt or written.
        weight_bytes: bytes of the weights that this runner holds beyond those of the module it was made from.
    """

    name: str
    config: ModelConfig
    batch_invariant: bool
    weight_bytes: int

    def cache_bytes(self, capacity: int) -> int:
        """Bytes of a cache for `capacity` positions."""
        ...

    def new_cache(self, capacity: int) -> Cache:
        """An empty cache."""
        ...

    def forward(self, pieces: Sequence[Piece]) -> Tensor:
        """Run the pieces, extend their caches, and return fp32 CPU logits (sum of piece.logits, V) in order."""
        ...


class ModuleRunner:
    """Runs a live module as it is; see the head of this file."""

    batch_invariant = False  # rows are run alone, but a prompt's rows depend on how it was cut
    weight_bytes = 0

    def __init__(self, module: Any) -> None:
        self.module = module
        self.config: ModelConfig = module.config
        weight = next(module.parameters())
        self.name = f"module, {str(weight.dtype).removeprefix('torch.')} on {weight.device.type}"

    @property
    def _place(self) -> tuple[torch.dtype, torch.device]:
        weight = next(self.module.parameters())
        return weight.dtype, weight.device

    def cache_bytes(self, capacity: int) -> int:
        """Bytes of a cache for `capacity` positions."""
        return TensorCache.bytes_for(self.config, capacity, self._place[0])

    def new_cache(self, capacity: int) -> TensorCache:
        """An empty cache beside the weights."""
        return TensorCache(self.config, capacity, *self._place)

    def forward(self, pieces: Sequence[Piece]) -> Tensor:
        """Run the pieces one by one."""
        device = self._place[1]
        rows = []
        with torch.no_grad(), _evaluating(self.module):
            for piece in pieces:
                cache: Any = piece.cache
                cache.length = piece.start
                end = piece.start + len(piece.tokens)
                ids = torch.tensor([piece.tokens], device=device)
                hidden = self.module.model(ids, positions=torch.arange(piece.start, end, device=device), cache=cache)
                if piece.logits:
                    rows.append(self.module.head(hidden[0, -piece.logits :]).float().cpu())
        return torch.cat(rows) if rows else torch.empty(0, self.config.vocab_size)


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for the time of a step; training finds its module as it left it."""
    training = module.training
    if training:
        module.eval()
    try:
        yield
    finally:
        if training:
            module.train()
