"""CUDA graphs: a step is recorded once for each shape of its input, and replayed by one call.

A decoded token is hundreds of tiny kernels; starting them one by one from Python takes longer than they run.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 2  # runs before recording: libraries choose their kernels and take their workspaces in the first


class Graphs:
    """Recordings of one function of one tensor, on a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._recorded: dict[torch.Size, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        # One pool for the intermediates of all graphs, which never run at once; a result is read before the next
        # graph runs.
        self._pool = torch.cuda.graph_pool_handle()

    def __len__(self) -> int:
        return len(self._recorded)

    def clear(self) -> None:
        """Forget all recordings, as when the memory they read has moved."""
        torch.cuda.synchronize(self._device)
        self._recorded.clear()
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, function: Callable[[Tensor], Tensor], host: Tensor) -> Tensor:
        """function(host) on the device; the result is valid until the next call.

        Args:
            function: the same at every call. It reads its input and memory that stays where it is, and nothing in it
                may wait for the device or depend on values.
            host: a pinned CPU tensor.
        """
        if host.shape not in self._recorded:
            self._recorded[host.shape] = self._record(function, host)
        graph, given, result = self._recorded[host.shape]
        given.copy_(host, non_blocking=True)
        graph.replay()
        return result

    def _record(
        self, function: Callable[[Tensor], Tensor], host: Tensor
    ) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        with torch.cuda.device(self._device):
            # Zeros: what warms up must not write where a sequence's keys lie (pages.py keeps row 0 for this).
            given = torch.zeros(host.shape, dtype=host.dtype, device=self._device)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    function(given)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the device while this one records, as where a server and a trainer share it.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = function(given)
        return graph, given, result
