"""One update of the weights, which a non-finite gradient skips on the device.

The decision never comes to the host: the fused optimizers of torch take a device flag (`found_inf`) and leave weights,
moments and their step counts as they are where it is set. Whoever logs reads the flag later.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from smolforge.distributed import DistributedContext
from smolforge.training.optim import set_rate


class Updater:
    """Sums gradients over ranks, clips, and updates.

    Args:
        clip: largest global norm of the gradient, 0 for none.
        scaler: gradient scaler of fp16 runs, None elsewhere.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        clip: float,
        ranks: DistributedContext,
        scaler: torch.amp.GradScaler | None = None,  # type: ignore[name-defined]
    ) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer, self.clip, self.ranks, self.scaler = optimizer, clip, ranks, scaler

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch."""
        (self.scaler.scale(loss) if self.scaler else loss).backward()

    def step(self, lr: float, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Update with the gradients gathered so far, and clear them.

        Args:
            loss: () sum of the step's losses on this rank; made the sum over all ranks in place.

        Returns:
            Norm of the gradient before clipping (), and whether the update was skipped (), both on the device.
        """
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        self.ranks.sum_([*gradients, loss])
        set_rate(self.optimizer, lr)
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.clip:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip, norm)
        finite = torch.isfinite(loss)
        if self.scaler:
            # The scaler looks for overflow itself; only a loss that is not finite is news.
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            finite = finite & torch.isfinite(norm)
            self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, ~finite
