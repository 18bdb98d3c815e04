"""An exponential average of the weights during training (Polyak & Juditsky 1992; EMA).

While the learning rate is high, the average predicts held-out text better than the weights do, which move around it. It
begins as the plain mean of all weights so far, so the new weights that a run starts from do not count in it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from smolforge.errors import CheckpointError
from smolforge.training.optim import steps_of

logger = logging.getLogger(__name__)


class AveragedWeights:
    """The average of the parameters of `model` that learn, in fp32 on their device.

    Args:
        horizon: steps that it reaches back, or a share of the run's `total` steps where below 1; its decay is
            1 - 1 / horizon.
    """

    def __init__(self, model: nn.Module, horizon: float, total: int) -> None:
        self.model, self.horizon = model, max(steps_of(horizon, total), 1)
        self.weights = {
            name: torch.zeros_like(parameter, dtype=torch.float32)
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        self.count = 0
        """Steps that it has seen."""

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after a step."""
        self.count += 1
        share = max(1 / self.horizon, 1 / self.count)
        for name, average in self.weights.items():
            average.lerp_(self.model.get_parameter(name).float(), share)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model with the average as its weights."""
        own = {name: self.model.get_parameter(name).data for name in self.weights}
        try:
            for name, average in self.weights.items():
                self.model.get_parameter(name).data = average.to(own[name].dtype)
            yield
        finally:
            for name, weight in own.items():
                self.model.get_parameter(name).data = weight

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"count": self.count, "weights": dict(self.weights)}

    def load(self, state: dict[str, Any] | None) -> None:
        """Continue from what `state` returned; None in a run that had no average, which begins here."""
        self.count = 0
        if state is None:
            logger.info("ema: the average of the weights begins with the next step")
            return
        if state["weights"].keys() != self.weights.keys():
            name = sorted(state["weights"].keys() ^ self.weights.keys())[0]
            raise CheckpointError(f"the average of the weights does not fit the model at {name}", field="training/")
        self.count = state["count"]
        for name, average in self.weights.items():
            average.copy_(state["weights"][name])
