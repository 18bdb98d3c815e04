"""Passes recorded as CUDA graphs.

Forward and backward pass of SmolLM2-135M start 5,000 kernels, which takes Python 100 ms. A fast GPU computes a small
micro-batch in a tenth of that (docs/performance.md), and would wait.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from smolforge.cuda_graph import WARM_UP, CudaGraph, run_aside
from smolforge.errors import in_one_line

logger = logging.getLogger(__name__)


class RecordedPasses:
    """Calls a function that adds to the gradients of a model, from its third call of a shape on as a CUDA graph.

    The gradients stay where they are: they are set to zero between steps, not to None.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._gradients: list[Tensor | None] = []  # that the graphs add to
        self._graphs: dict[tuple[Any, ...], CudaGraph] = {}
        self._calls: Counter[tuple[Any, ...]] = Counter()
        self._pool: Any = None
        self.fails = False

    def __call__(self, function: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
        """What `function(*inputs)` returns, until the next call; functions of equal shapes compute the same."""
        gradients = [parameter.grad for parameter in self._parameters]
        if any(mine is not theirs for mine, theirs in zip(self._gradients, gradients, strict=False)):
            self._graphs.clear()
            self._calls.clear()
        shape = tuple(None if tensor is None else tensor.shape for tensor in inputs)
        self._calls[shape] += 1
        if self.fails or self._calls[shape] <= WARM_UP:
            result = run_aside(function, inputs)
            self._gradients = [parameter.grad for parameter in self._parameters]
            return result
        if shape not in self._graphs:
            try:
                self._pool = self._pool or torch.cuda.graph_pool_handle()
                self._graphs[shape] = CudaGraph(function, inputs, self._pool)
            except RuntimeError as error:  # nothing was computed
                self.fails = True
                logger.warning(f"graph: off, it fails on this machine ({in_one_line(error)})")
                return function(*inputs)
        return self._graphs[shape](*inputs)
