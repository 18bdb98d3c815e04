"""One training step on CUDA tensors that do not exist, in a process with fake_cuda.cpp preloaded.

    LD_PRELOAD=fake_cuda.so python rehearsal.py '[{"card": "T4", "preset": "pocket", "overrides": []}]'

The real plan, model and `train_step` run under FakeTensorMode: no number is computed, but every operation is seen with
devices, shapes and precisions. A CPU build of torch lacks two things of a CUDA build, which are put in their place here:
which attention kernel scaled_dot_product_attention takes (the rules of ATen's sdp_utils.cpp), and the fused RMSNorm.
Prints one JSON object for each step.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[1]))
from cards import CARDS, insert_cards

CUDA = torch.device("cuda", 0)


class FakeCuda(FakeTensorMode):
    """FakeTensorMode that does not ask CUDA to start."""

    avoid_device_init = property(lambda self: True)


@torch.library.custom_op("rehearsal::fused_rms_norm", mutates_args=())
def fused_rms_norm(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Only its shapes are used."""
    raise NotImplementedError


fused_rms_norm.register_fake(
    lambda x, weight: (torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
)
fused_rms_norm.register_autograd(
    lambda ctx, gradient, _: (torch.empty_like(ctx.saved_tensors[0]), torch.empty_like(ctx.saved_tensors[1])),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, output[1]),
)


class CudaFunctions(TorchFunctionMode):
    """What a CUDA build of torch does differently; counts the attention kernels in `kernels`."""

    def __init__(self, capability: tuple[int, int]) -> None:
        super().__init__()
        self.capability = capability
        self.kernels: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.rms_norm and args[0].device.type == "cuda":
            return self._rms_norm(args[0], (kwargs or {})["weight"])
        if func is F.scaled_dot_product_attention and args[0].device.type == "cuda":
            return self._attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cuda"):  # rms_norm is on CUDA's list of operations in fp32
            x, weight = x.float(), weight.float()
        return fused_rms_norm(x, weight)[0]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False,
                enable_gqa: bool = False, scale: float | None = None) -> Tensor:  # fmt: skip
        half, grouped = q.dtype in (torch.float16, torch.bfloat16), q.shape[1] != k.shape[1]
        if self.capability >= (8, 0) and half and attn_mask is None:
            self.kernels["flash"] += 1
            flash: Any = torch.ops.aten._scaled_dot_product_flash_attention
            return flash(q, k, v, 0.0, is_causal, scale=scale)[0]
        if not grouped:
            self.kernels["efficient"] += 1
            efficient: Any = torch.ops.aten._scaled_dot_product_efficient_attention
            bias = attn_mask
            if bias is not None and bias.dtype != q.dtype:  # made anew, and kept, in each layer
                bias = torch.empty(bias.shape, dtype=q.dtype, device=q.device)
            bias = bias if bias is None else bias.expand(*q.shape[:3], k.shape[2])
            return efficient(q, k, v, bias, torch.is_grad_enabled(), 0.0, is_causal, scale=scale)[0]
        self.kernels["math"] += 1
        return F.scaled_dot_product_attention(q, k, v, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)


class Watch(TorchDispatchMode):
    """Counts operations that a GPU would run, and notes each that makes the host wait."""

    FREE = ("aten.empty", "aten.detach", "aten.lift_fresh", "aten._unsafe_view", "aten._reshape_alias", "prim.")

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.waits: Counter[str] = Counter()
        self.to_host: Counter[str] = Counter()
        self.pinned: list[Tensor] = []
        self.orthogonalized: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, str(func)
        if "_local_scalar_dense" in name:
            if args[0].device.type == "cuda":
                self.waits[f"{name} {_where()}"] += 1
            return 1 if not args[0].is_floating_point() else 1.0
        if "_pin_memory" in name:
            self.pinned.append(torch.empty_like(args[0]))
            return self.pinned[-1]
        if "aten.baddbmm" in name:
            self.orthogonalized.add(str(args[1].dtype))
        pinned = kwargs.pop("pin_memory", None)
        out = func(*args, **kwargs)
        if pinned:
            self.pinned.append(out)
        before = {t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        after = {t.device.type for t in tree_leaves(out) if isinstance(t, Tensor)}
        if "cuda" in before | after and not func.is_view and not name.startswith(self.FREE):
            self.operations += 1
        moved = "copy" in name and before | after == {"cpu", "cuda"}
        queued = kwargs.get("non_blocking") or (name.startswith("aten.copy_") and len(args) > 2 and args[2])
        host = next((t for t in (*args[:2], out) if isinstance(t, Tensor) and t.device.type == "cpu"), None)
        waits = not queued or host is None or not any(_same_memory(host, pinned) for pinned in self.pinned)
        if moved and waits:
            self.waits[f"{name} {_where()}"] += 1
        if moved and "cpu" in after:
            self.to_host[f"{name} {_where()}"] += 1
        return out


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


def _where() -> str:
    frames = [frame for frame in traceback.extract_stack() if "/smolforge/" in frame.filename]
    return f"{frames[-1].filename.rpartition('/smolforge/')[2]}:{frames[-1].lineno}" if frames else "?"


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Bytes that autograd keeps for the backward pass, each storage once, the model's parameters left out."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.known = {p.untyped_storage()._cdata for p in model.parameters()}
        self.kept: dict[int, Any] = {}
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.kept[storage._cdata] = storage  # held, so that its address is not used again
        return tensor

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.kept.values())


def _move(model: torch.nn.Module) -> None:
    """Give a model on the meta device parameters on the fake GPU."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=CUDA)
                module._parameters[name] = torch.nn.Parameter(empty)


def rehearse(card: str, preset: str, overrides: list[str]) -> dict[str, Any]:
    """One step of a plan; what was seen."""
    from smolforge.config import build_config
    from smolforge.distributed import DistributedContext
    from smolforge.model import documents as packed
    from smolforge.model.architecture import build_model
    from smolforge.training.metrics import StepMetrics
    from smolforge.training.optim import build_optimizer
    from smolforge.training.plan import make_plan, planned_memory
    from smolforge.training.recipe import resolve_batch
    from smolforge.training.step import train_step

    insert_cards([CARDS[card]])
    # On the host, of numbers, which fake tensors do not have.
    packed.document_borders = lambda ids: torch.empty(8 * len(ids) + 1, dtype=torch.int32)
    config = resolve_batch(build_config(preset, ["training.compile=off", *overrides]), CUDA)
    plan = make_plan(config, CUDA, 1)
    length, micro = config.data.sequence_length, plan.micro_batch
    hidden_types: set[str] = set()
    functions, watch = CudaFunctions(CARDS[card].capability), Watch()
    model = build_model(config.model, seed=None, **{**plan.model_options, "device": "meta"})
    with FakeCuda(allow_non_fake_inputs=False), functions:
        _move(model)
        optimizer = build_optimizer(model, config.optimizer, update=plan.update)
        scaler = torch.amp.GradScaler("cuda") if plan.precision.scaler else None
        model.decoder.register_forward_hook(lambda module, inputs, output: hidden_types.add(str(output.dtype)))
        tokens = torch.empty(micro, length + 1, dtype=torch.int32, device=CUDA).long()
        documents = torch.zeros(micro, length + 1, dtype=torch.int32) if config.data.mask_documents else None
        with watch:
            saved = Saved(model)
            with saved:
                figures = train_step(
                    model, optimizer, plan, config, tokens, documents,
                    lr=1e-3, ranks=DistributedContext(), scaler=scaler,
                )  # fmt: skip
            StepMetrics.queue(None, 1, 1e-3, config.tokens_per_step, figures)
        state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        elsewhere = [str(t.device) for t in (*model.parameters(), *state, *figures) if t.device != CUDA]
    inside = model.hidden_matrices() if plan.precision.autocast else ()
    casts = sum(2 * p.numel() for name, p in model.named_parameters() if name in inside)  # kept to the step's end
    estimate = planned_memory(config, plan)
    return {
        "precision": plan.precision.name, "attention": plan.attention, "micro_batch": micro,
        "sequences": plan.sequences, "hidden": sorted(hidden_types), "kernels": dict(functions.kernels),
        "operations": watch.operations, "waits": dict(watch.waits), "to_host": dict(watch.to_host),
        "elsewhere": elsewhere, "saved": saved.bytes - casts, "activations": estimate.activations,
        "memory": dataclasses.asdict(estimate), "total": estimate.total, "recompute": plan.recompute, "loss": plan.loss, "tokens": micro * length, "layers": config.model.num_hidden_layers,
        "tensors": len(list(model.parameters())), "orthogonalized": sorted(watch.orthogonalized),
        "reasons": plan.reasons,
    }  # fmt: skip


def decode(card: str, preset: str, rows: int, prompt: int = 0) -> dict[str, Any]:
    """What a CUDA graph records of one decoded token for `rows` sequences, or of so many tokens of a prompt."""
    from smolforge.config import build_config
    from smolforge.devices import half_precision
    from smolforge.generation.runners import cuda, select_runner
    from smolforge.model.architecture import build_model

    insert_cards([CARDS[card]])
    config = build_config(preset).model
    functions, watch = CudaFunctions(CARDS[card].capability), Watch()
    model = build_model(config, dtype=half_precision(CUDA), device="meta", seed=None)
    with FakeCuda(allow_non_fake_inputs=False), functions, torch.no_grad():
        _move(model)
        runner, decisions = select_runner(model)
        assert isinstance(runner, cuda.CudaRunner)
        runner._add_slots(rows)
        inputs = torch.empty(10, rows, dtype=torch.float64, device=CUDA)
        chunk = torch.empty(2, prompt, dtype=torch.float64, device=CUDA)
        with watch, cuda.evaluating(runner.module):
            result = runner._read_step(1024, chunk) if prompt else runner._step(256, False, inputs)
    return {
        "kernels": dict(functions.kernels), "operations": watch.operations, "waits": dict(watch.waits),
        "to_host": dict(watch.to_host), "result": list(result.shape), "cache": str(runner.memory.dtype),
        "layers": config.num_hidden_layers, "decisions": decisions,
    }  # fmt: skip


def main() -> None:
    """Rehearse each wanted step."""
    for wanted in json.loads(sys.argv[1]):
        try:
            found = decode(**wanted) if "rows" in wanted else rehearse(**wanted)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {str(error)[:300]}", "trace": traceback.format_exc()[-1500:]}
        print(json.dumps({"wanted": wanted, **found}), flush=True)


if __name__ == "__main__":
    main()
