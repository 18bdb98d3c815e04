"""How the ranks of a run share it: a copy on each, or shards by PyTorch's FSDP2 (`torch.distributed.fsdp.fully_shard`).

    ddp    every rank has the whole model; gradients are summed
    fsdp   every rank has some rows of each parameter, of its gradient and moments; a layer is whole while it computes
    hsdp   fsdp within a machine and copies among machines, between which only gradients travel

A sharded parameter is a DTensor; optimizers update the rows that a rank has (`distributed.local_rows`). A forward pass
of a sharded model is a collective: all ranks compute equally many. Samples and checkpoints need whole tensors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from smolforge.checkpoint.background import map_leaves
from smolforge.config import RunConfig
from smolforge.distributed import DistributedContext, is_sharded
from smolforge.errors import BadInput
from smolforge.model.architecture import CausalLM, build_model
from smolforge.training.precision import Precision


def choose_parallel(
    config: RunConfig, precision: Precision, world: int, local: int, needed: Callable[[int], int], budget: float | None
) -> tuple[str, int, str]:
    """The strategy, the number of shards that it cuts the state into, and the reason.

    Args:
        local: ranks of each machine, 1 where machines have different numbers of them.
        needed: bytes of a rank's step with one sequence, by the number of shards.
        budget: bytes that a rank may take; None where no limit is known.

    Raises:
        BadInput: the run cannot be shared as asked.
    """
    asked = config.training.parallel
    if world == 1:
        return "single", 1, ""
    within = local if 1 < local < world and world % local == 0 else 0
    missing = _unshardable(config, precision)
    if asked in ("fsdp", "hsdp") and missing:
        raise BadInput(f"{asked} does not shard {missing}", field="training.parallel", hint="Use ddp.")
    if asked == "hsdp" and not within:
        problem = f"hsdp needs several machines of equally many processes, and {world} run with {local} on each"
        raise BadInput(problem, field="training.parallel", hint="Use fsdp.")
    if asked != "auto":
        return asked, {"ddp": 1, "fsdp": world, "hsdp": within}[asked], "as asked"
    if budget is None:
        return "ddp", 1, "no limit of memory is known"
    of_budget = f"of {budget / 1e9:.2f} GB"
    if needed(1) <= budget:
        return "ddp", 1, f"one sequence takes about {needed(1) / 1e9:.2f} {of_budget}"
    if missing:
        return "ddp", 1, f"{missing} is not sharded"
    name, shards = ("hsdp", within) if within and needed(within) <= budget else ("fsdp", world)
    copies, sharded = needed(1) / 1e9, needed(shards) / 1e9
    return name, shards, f"one sequence takes about {sharded:.2f} {of_budget}, and {copies:.2f} with a copy on each"


def _unshardable(config: RunConfig, precision: Precision) -> str | None:
    if config.lora.r:
        return "an adapter"
    if config.data.format == "preferences":
        return "learning from pairs of answers"
    if config.training.ema:
        return "an average of the weights"
    if config.optimizer.name == "adamw8bit":
        return "moments in 8 bits"
    return "gradients that are scaled (fp16)" if precision.scaler else None


def shard_model(model: CausalLM, device: torch.device, precision: Precision, shards: int) -> None:
    """Cut the parameters into shards, layer by layer, as long as they have no memory; gradients are summed in fp32."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    # On CPUs torch tells that gloo has no all-to-all and what it does instead.
    logging.getLogger("torch.distributed.tensor._collective_utils").setLevel(logging.ERROR)
    copies = dist.get_world_size() // shards
    shape, names = ((shards,), ("shard",)) if copies == 1 else ((copies, shards), ("copy", "shard"))
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    policy = MixedPrecisionPolicy(precision.autocast, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*model.decoder.layers, model):
        # The rest of the model is cut again after each forward pass too: validation must leave shards behind.
        sharded: Any = fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        # The loss is scaled by the tokens of the global batch, so gradients are summed, not averaged.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "loss")


@torch.no_grad()
def whole_model(model: CausalLM, ranks: DistributedContext, dtype: torch.dtype) -> CausalLM:
    """The model itself, or of a sharded one a whole copy on rank 0. Called by all ranks together.

    The other ranks get a model without memory.
    """
    first = next(model.parameters())
    if not is_sharded(first):
        return model
    place = first.device if ranks.is_main else "meta"
    copy = build_model(model.config, dtype=dtype, device=place, seed=None, attention=model.options.attention)
    for target, source in zip(copy.parameters(), model.parameters(), strict=True):
        target.copy_(_whole(source))
    return copy


def share_out(tree: Any, ranks: DistributedContext) -> Any:
    """A copy of `tree` on the hosts, in which each sharded tensor is whole on one rank. Called by all ranks together.

    The others have a tensor without memory (meta) in its place. Each rank gets about as many bytes. What is not sharded
    is on rank 0.
    """
    loads = [0] * ranks.world_size

    def place(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        owner = loads.index(min(loads)) if is_sharded(value) else 0
        loads[owner] += value.numel() * value.element_size() if is_sharded(value) else 0
        whole = _whole(value)
        return whole.to("cpu", copy=True) if ranks.rank == owner else torch.empty_like(whole, device="meta")

    with torch.no_grad():
        return map_leaves(place, tree)


def _whole(tensor: Any) -> Tensor:
    return tensor.detach().full_tensor() if is_sharded(tensor) else tensor.detach()
