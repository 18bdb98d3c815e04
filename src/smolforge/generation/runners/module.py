"""The plain runner: any model, with its live weights, on any device, one sequence at a time.

It is correct by construction and uses every change of the weights, so training samples with it. It also writes where
there is no native code, and reads prompts on a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smolforge.config import ModelConfig
from smolforge.generation.kv_cache import TensorCache
from smolforge.generation.sequence import ScheduledChunk


class ModuleRunner:
    """Runs a live model of `smolforge.model` as it is."""

    batch_invariant = False  # rows are run alone, but a prompt's rows depend on how it was cut
    weight_bytes = 0

    def __init__(self, module: Any) -> None:
        self.module = module
        self.config: ModelConfig = module.config
        weight = next(module.parameters())
        self.name = f"plain PyTorch, {str(weight.dtype).removeprefix('torch.')} on {weight.device.type}"

    @property
    def _place(self) -> tuple[torch.dtype, torch.device]:
        weight = next(self.module.parameters())
        return weight.dtype, weight.device

    def cache_bytes(self, capacity: int) -> int:
        """Bytes of a cache for `capacity` positions."""
        return TensorCache.bytes_for(self.config, capacity, self._place[0])

    def new_cache(self, capacity: int) -> TensorCache:
        """An empty cache on the device of the weights."""
        return TensorCache(self.config, capacity, *self._place)

    def forward(self, chunks: Sequence[ScheduledChunk]) -> Tensor:
        """Run the chunks one by one."""
        device = self._place[1]
        rows = []
        with torch.no_grad(), evaluating(self.module):
            for chunk in chunks:
                cache: Any = chunk.cache
                cache.length = chunk.start
                end = chunk.start + len(chunk.tokens)
                ids = torch.tensor([chunk.tokens], device=device)
                hidden = self.module.decoder(ids, positions=torch.arange(chunk.start, end, device=device), cache=cache)
                if chunk.logits:
                    rows.append(self.module.head(hidden[0, -chunk.logits :]).float().cpu())
        return torch.cat(rows) if rows else torch.empty(0, self.config.vocab_size)


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode during a step; the module is left as it was."""
    training = module.training
    if training:
        module.eval()
    try:
        yield
    finally:
        if training:
            module.train()
