"""CUDA graphs: what a function starts on a GPU, recorded once and started again as a whole."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from smolforge.errors import in_one_line

logger = logging.getLogger(__name__)

WARM_UP = 2  # calls before a function is recorded: libraries choose kernels and allocate workspaces in the first


@functools.cache
def _side_stream(device: int) -> torch.cuda.Stream:
    # One for all: cuBLAS keeps memory for each stream that it has worked on.
    return torch.cuda.Stream(device)


def run_aside(function: Callable[..., Any], inputs: Sequence[Tensor | None]) -> Any:
    """The result of a function before it is recorded: on a stream of its own, as capturing needs it."""
    side = _side_stream(torch.cuda.current_device())
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        result = function(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    return result


class CudaGraph:
    """A function of tensors on the current CUDA device, recorded; it has been called `WARM_UP` times before.

    Args:
        function: makes the host wait for nothing. What it reads and writes besides its inputs stays in its place.
        inputs: tensors on the device, of the shapes that all calls have; None where all calls have None.
        pool: memory that the graph shares with others, none of which reads what another made.

    Raises:
        RuntimeError: the function does what cannot be recorded.
    """

    def __init__(self, function: Callable[..., Any], inputs: Sequence[Tensor | None], pool: Any = None) -> None:
        self._inputs = [None if tensor is None else tensor.clone() for tensor in inputs]
        self._graph = torch.cuda.CUDAGraph()
        # cuBLAS would give a graph the memory that it made for another one, which may not live as long.
        torch._C._cuda_clearCublasWorkspaces()
        try:
            # Other threads may use the device meanwhile.
            with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
                self._result = function(*self._inputs)
        finally:
            torch._C._cuda_clearCublasWorkspaces()

    def __call__(self, *inputs: Tensor | None) -> Any:
        """The function's result for inputs on the host or the device; the next call writes to the same memory."""
        for mine, given in zip(self._inputs, inputs, strict=True):
            if mine is not None and given is not None:
                mine.copy_(given, non_blocking=True)
        self._graph.replay()
        return self._result


class RecordedCalls:
    """Calls functions, from the third call of a shape on as CUDA graphs; where that fails, as they are.

    The graphs share memory: a result is read before the next call.

    Attributes:
        fails: whether something could not be recorded.
    """

    def __init__(self) -> None:
        self._graphs: dict[Hashable, CudaGraph] = {}
        self._calls: Counter[Hashable] = Counter()
        self._pool: Any = None
        self.fails = False

    def __call__(self, function: Callable[..., Any], inputs: Sequence[Tensor | None], shape: Hashable) -> Any:
        """What `function(*inputs)` returns, as of `CudaGraph`; functions of one shape compute the same."""
        if self.fails:
            return function(*inputs)
        self._calls[shape] += 1
        if self._calls[shape] <= WARM_UP:
            return run_aside(function, inputs)
        if shape not in self._graphs:
            try:
                self._pool = self._pool or torch.cuda.graph_pool_handle()
                self._graphs[shape] = CudaGraph(function, inputs, self._pool)
            except RuntimeError as error:  # nothing was computed
                self.fails = True
                logger.warning(f"graph: off, it fails on this machine ({in_one_line(error)})")
                return function(*inputs)
        return self._graphs[shape](*inputs)

    def __len__(self) -> int:
        """How many graphs there are."""
        return len(self._graphs)

    def clear(self) -> None:
        """Forget all graphs, because what they read or write has moved."""
        self._graphs.clear()
        self._calls.clear()
        self._pool = None  # torch takes it back with the last graph
