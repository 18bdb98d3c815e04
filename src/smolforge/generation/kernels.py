"""Which kernels a device gets: Triton's where they run and are right, torch's own everywhere else.

Triton compiles for the device it finds, so whether its kernels are right is tried on that device, in the shapes of
the model, before anything is written with them. It takes seconds the first time, and Triton keeps what it compiled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch

from smolforge.config import ModelConfig
from smolforge.generation.fused import Rotary
from smolforge.generation.paged_attention import PagedKernels
from smolforge.generation.pages import PAGE
from smolforge.generation.quantize import Precision, to_int8

TOLERANCE = 0.02  # relative; bf16 roundings in another order make a few thousandths


def choose_kernels(config: ModelConfig, precision: Precision, device: torch.device) -> tuple[PagedKernels, str]:
    """The kernels for a device, and why. Triton's must first agree with the plain ones, here and now."""
    if device.type != "cuda":
        return PagedKernels(), f"torch's own; Triton's are for CUDA, not {device.type}"
    if precision == "fp32":
        return PagedKernels(), "torch's own; Triton's are for bf16 activations"
    try:
        from smolforge.generation.triton_kernels import TritonKernels

        kernels = TritonKernels()
        error = disagreement(kernels, config, torch.bfloat16, device)
    except Exception as problem:  # a compiler, a driver, a GPU without bf16: whatever it is, the plain way remains
        first = str(problem).strip().partition("\n")[0]
        return PagedKernels(), f"torch's own; Triton's do not run here: {type(problem).__name__}: {first}"
    if not error < TOLERANCE:
        return (
            PagedKernels(),
            f"torch's own; Triton's were off by {error:.1%} on this device, which is a bug: report it",
        )
    return kernels, "Triton's, which agree with torch's on this device"


def disagreement(
    kernels: PagedKernels,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    batches: Sequence[int] = (1, 5, 64),
) -> float:
    """Greatest relative difference from the plain kernels, over every operation, in the shapes of a model.

    Args:
        batches: rows; their number decides the blocks, and among how many programs a sequence is divided.
    """
    generator = torch.Generator(device).manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator, device=device).to(dtype)  # noqa: E731
    c, width, inner, pages = config, config.hidden_size, config.intermediate_size, 4
    joint = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    packed = [to_int8(draw(*shape)) for shape in ((joint, width), (width, inner), (c.vocab_size, width))]
    rotary, worst = Rotary(c, dtype, device), 0.0
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for rows in batches:
            x, delta, weight, deep = draw(rows, width), draw(rows, width), draw(width), draw(rows, inner)
            qkv, gate_up = draw(rows, joint), draw(rows, 2 * inner)
            memory = draw((1 + rows * pages) * PAGE, 2, c.num_key_value_heads, c.head_dim)
            last = min(pages * PAGE, c.max_position_embeddings)
            token_and_position = torch.randint(last, (rows, 2), generator=generator, device=device)
            tables = torch.arange(1, 1 + rows * pages, device=device).view(rows, pages)
            inputs = torch.cat((token_and_position, tables), 1)
            results = []
            for one in (kernels, PagedKernels()):
                mine = memory.clone()
                products = [one.linear(p)(deep if p.values.shape[1] == inner else x) for p in packed]
                results.append([
                    *products, *one.add_norm(x, delta, weight, c.rms_norm_eps), one.swiglu(gate_up),
                    one.add_norm(x, None, weight, c.rms_norm_eps)[1],
                    one.over_pages(rotary, [mine], inputs)(0, qkv), mine,
                ])  # fmt: skip
            for ours, theirs in zip(*results, strict=True):
                difference = ((ours - theirs).float().norm() / theirs.float().norm()).item()
                worst = max(worst, difference if difference == difference else float("inf"))
    return worst
