"""Muon: the momentum of each hidden matrix, orthogonalized, is its update (Jordan et al. 2024, kellerjordan.github.io/
posts/muon). All directions of a matrix learn at one speed, so it needs fewer steps than AdamW.

Muon is for matrices that map hidden states to hidden states; AdamW updates embeddings, the head and vectors. Updates
are scaled to the size of AdamW's (Liu et al. 2025, arXiv:2502.16982, section 2.2), so one learning rate and decay serve
both.

Unlike torch.optim.Muon this one computes in fp32 on a CPU unless the model is trained in bf16 there, supports
`found_inf`, and updates the rest of the parameters too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from smolforge.config import OptimizerConfig
from smolforge.devices import half_precision
from smolforge.distributed import is_sharded, local_rows
from smolforge.errors import BadInput
from smolforge.model.architecture import CausalLM
from smolforge.training.optim import parameter_groups, register, skipped

# (a, b, c) of each iteration x → a x + b (x xᵀ) x + c (x xᵀ)² x. Each polynomial is the best of its degree at bringing
# the singular values that the ones before it left close to 1, starting from values between 0.01 and 1 (the minimax of
# Amsel et al. 2025, arXiv:2505.16932, solved as a linear program). Three of them equal five iterations of Jordan's.
_ITERATIONS = ((8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526))
# Root mean square of AdamW's updates at a learning rate of 1, as Liu et al. measured it.
_SIZE = 0.2


def orthogonalize(matrices: Tensor, precision: torch.dtype = torch.float32) -> Tensor:
    """Approximately U Vᵀ of each matrix's singular value decomposition.

    Singular values from 0.01 of the Frobenius norm on come between 0.7 and 1.3.

    Args:
        matrices: (N, rows, columns), not zero throughout.
        precision: of the iterations.

    Returns:
        (N, rows, columns) in `precision`.
    """
    x = matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    # In fp32: fp16 does not hold a small gradient.
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(precision)
    for a, b, c in _ITERATIONS:
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def even_neurons(updates: Tensor) -> Tensor:
    """Updates whose neurons all move equally far: the longer side's rows or columns get one length, in sum the same.

    Those of an MLP that is wider than the hidden states differ after `orthogonalize`, since only the shorter side can
    be orthogonal. NorMuon (Li et al. 2025, arXiv:2510.05491) divides by a running mean of these lengths instead, which
    needs state and gained no more (docs/recipes.md).

    Args:
        updates: (N, rows, columns).

    Returns:
        (N, rows, columns), of the type of `updates`.
    """
    side = -1 if updates.shape[-2] >= updates.shape[-1] else -2
    lengths = torch.linalg.vector_norm(updates, dim=side, keepdim=True, dtype=torch.float32)
    even = lengths.square().mean((-2, -1), keepdim=True).sqrt()
    # A neuron without a gradient stays where it is, and fp16 holds the factor.
    return updates * (even / lengths.clamp_min(1e-7).maximum(0.01 * even)).to(updates.dtype)


def _direction(matrices: Tensor, precision: torch.dtype) -> Tensor:
    return even_neurons(orthogonalize(matrices, precision))


def _precision(device: torch.device, products: torch.dtype) -> torch.dtype:
    """Of the iterations: that of the model's matrix products on a CPU; 16 bits elsewhere, where fp32 is slow."""
    return products if device.type == "cpu" else half_precision(device)


def _rows(tensors: list[Tensor]) -> list[Tensor]:
    return [local_rows(tensor)[0] for tensor in tensors]


def _directions(rows: Tensor, like: Any, precision: torch.dtype) -> Tensor:
    """The directions of updates of matrices that may be sharded: each rank does some of them whole.

    Args:
        rows: (N, rows of this rank, columns); all rows unless sharded.
        like: a parameter of the shape of one matrix, sharded as all of them are.
        precision: as of `orthogonalize`.

    Returns:
        As `rows`, in `precision`.
    """
    if not is_sharded(like):
        return _direction(rows, precision)
    from torch.distributed.tensor import DTensor, Shard

    mesh, (height, width) = like.device_mesh, like.shape
    by_rows, by_matrix = ([Shard(dim) if p.is_shard() else p for p in like.placements] for dim in (1, 0))
    whole: dict[str, Any] = {"shape": (len(rows), height, width), "stride": (height * width, width, 1)}
    given = DTensor.from_local(rows.contiguous(), mesh, by_rows, run_check=False, **whole)
    mine = given.redistribute(placements=by_matrix).to_local()
    done = DTensor.from_local(_direction(mine, precision).contiguous(), mesh, by_matrix, run_check=False, **whole)
    return done.redistribute(placements=by_rows).to_local()


@register("muon")
def build_muon(
    model: nn.Module, config: OptimizerConfig, *, update: str, products: torch.dtype
) -> torch.optim.Optimizer:
    """Muon over the layers' matrices, AdamW over the rest."""
    if any(p.dtype == torch.bfloat16 for p in model.parameters() if p.requires_grad):
        raise BadInput(
            "muon keeps its weights in fp32",
            field="optimizer.name",
            hint="Use adamw, or training.precision=bf16, which computes in bf16 over fp32 weights.",
        )
    assert isinstance(model, CausalLM)
    groups = parameter_groups(model, config, orthogonal=model.hidden_matrices())
    options: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    return Muon(groups, momentum=config.momentum, products=products, **options)


class Muon(torch.optim.AdamW):
    """Muon over the groups marked `orthogonal`, fused AdamW over the others.

    Args:
        params: parameter groups of `parameter_groups`.
        momentum: decay of the running mean of the gradient, of `orthogonal` groups.
        products: the precision of the model's matrix products.
        options: lr, betas and eps, as of torch's AdamW.

    Attributes:
        found_inf: (), not 0 where the next update is to be skipped; None for never.
    """

    found_inf: Tensor | None = None

    def __init__(
        self, params: list[dict[str, Any]], *, momentum: float, products: torch.dtype = torch.float32, **options: Any
    ) -> None:
        super().__init__(params, fused=True, **options)
        self.momentum, self.products = momentum, products

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        assert closure is None, "gradients are computed before"
        everything = self.param_groups
        try:
            self.param_groups = [group for group in everything if not group["orthogonal"]]
            super().step()
        finally:
            self.param_groups = everything
        for group in everything:
            if group["orthogonal"]:
                self._step_matrices(group)
        return None

    def _step_matrices(self, group: dict[str, Any]) -> None:
        alike: dict[tuple[torch.Size, torch.device], list[Tensor]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                alike[parameter.shape, parameter.device].append(parameter)
        for (shape, device), parameters in alike.items():
            skip = skipped(self.found_inf, device)
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["momentum"] = torch.zeros_like(parameter)
            momenta = _rows([self.state[parameter]["momentum"] for parameter in parameters])
            weights = _rows(parameters)
            # Matrices of one shape go through all of it together: a few large operations instead of many small.
            gradients = torch.stack(_rows([p.grad for p in parameters if p.grad is not None]))
            old = torch.stack(momenta)
            means = torch.lerp(gradients, old, self.momentum)
            torch._foreach_copy_(momenta, torch.where(skip, old, means).unbind())  # pyright: ignore[reportPrivateImportUsage]
            looks_ahead = torch.lerp(gradients, means, self.momentum)  # Nesterov's
            del gradients, old, means  # each is as large as all these matrices
            precision = _precision(device, self.products)
            updates = _directions(looks_ahead, parameters[0], precision)
            updates = updates.mul(group["lr"] * _SIZE * max(shape) ** 0.5)
            old = torch.stack(weights)
            new = (old * (1 - group["lr"] * group["weight_decay"])).sub_(updates)
            torch._foreach_copy_(weights, torch.where(skip, old, new).unbind())  # pyright: ignore[reportPrivateImportUsage]
