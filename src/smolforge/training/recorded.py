"""Passes recorded as CUDA graphs.

Forward and backward pass of SmolLM2-135M start 5,000 kernels, which takes Python 100 ms. A fast GPU computes a small
micro-batch in a tenth of that (docs/performance.md), and would wait.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from smolforge.cuda_graph import RecordedCalls


class RecordedPasses:
    """Calls a function that adds to the gradients of a model, as `RecordedCalls` does.

    The gradients stay where they are: they are set to zero between steps, not to None.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._gradients: list[Tensor | None] = []  # that the graphs add to
        self.calls = RecordedCalls()

    def __call__(self, function: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
        """What `function(*inputs)` returns, until the next call; functions of equal shapes compute the same."""
        if any(p.grad is not mine for p, mine in zip(self._parameters, self._gradients, strict=False)):
            self.calls.clear()
        result = self.calls(function, inputs, tuple(None if tensor is None else tensor.shape for tensor in inputs))
        self._gradients = [parameter.grad for parameter in self._parameters]
        return result
