"""CUDA graphs: what a function starts on a GPU, recorded once and started again as a whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

WARM_UP = 2  # calls before a function is recorded: libraries choose kernels and allocate workspaces in the first


def run_aside(function: Callable[..., Any], inputs: Sequence[Tensor | None]) -> Any:
    """The result of a function before it is recorded: on a stream of its own, as capturing needs it."""
    side = torch.cuda.Stream()
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
        # Other threads may use the device meanwhile.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._result = function(*self._inputs)

    def __call__(self, *inputs: Tensor | None) -> Any:
        """The function's result for inputs on the host or the device; the next call writes to the same memory."""
        for mine, given in zip(self._inputs, inputs, strict=True):
            if mine is not None and given is not None:
                mine.copy_(given, non_blocking=True)
        self._graph.replay()
        return self._result
