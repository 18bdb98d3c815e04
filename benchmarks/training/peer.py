"""One contestant of the comparison of training: builds its model, takes some steps, and reports.

    python peer.py NAME SEQUENCES LENGTH STEPS PRECISION THREADS

NAME is smolforge, seed, or transformers or litgpt with -eager or -compiled (transformers-default is eager with
torch's default settings: what most users run). PRECISION is fp32, bf16 (autocast) or bf16-pure. The answer is one
JSON line. litgpt runs where it can be imported; only `smolforge` and `seed` need smolforge.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "50000")  # as smolforge train sets it; torch's peers profit from it too
if sys.argv[1:] and sys.argv[1].startswith("smolforge"):
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # compiled transformers is slower with it: 258 for 303 tokens/s

import torch
import torch.nn.functional as F

VOCAB = 49152
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def transformers(compiled: bool) -> tuple[torch.nn.Module, Loss]:
    """transformers' Llama, with its own loss."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True,
            rope_theta=1e5, use_cache=False,
        )
    )  # fmt: skip
    run = torch.compile(model) if compiled else model
    return model, lambda x, y: run(input_ids=x, labels=y, shift_labels=y).loss


def litgpt(compiled: bool, length: int) -> tuple[torch.nn.Module, Loss]:
    """LitGPT's GPT and its loss, as its pretraining script uses them."""
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    model = GPT(Config.from_name("SmolLM2-135M"))
    model.max_seq_length = length
    model.lm_head.weight = model.transformer.wte.weight
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    run = torch.compile(model) if compiled else model
    return model, lambda x, y: chunked_cross_entropy(run(x), y, chunk_size=0)


def seed() -> tuple[torch.nn.Module, Loss]:
    """The seed's step: the plain model, all logits at once."""
    from smolforge.config import ModelConfig
    from smolforge.model.architecture import build_model

    model = build_model(ModelConfig(), seed=0)
    return model, lambda x, y: F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def smolforge(sequences: int, length: int, steps: int, precision: str, more: Sequence[str]) -> dict:
    """What `smolforge bench train` measures."""
    from smolforge.training import bench

    # fp32 of the same kind as the peers have: through oneDNN on a CPU
    chosen = [f"training.precision={'fp32-high' if precision == 'fp32' else precision}", *more]
    result = bench.measure(micro_batch=sequences, length=length, steps=steps, overrides=chosen)
    keys = (
        "tokens_per_second",
        "share_of_matmul_limit",
        "matmul_flops_per_second",
        "first_step_seconds",
        "share_by_part",
    )
    return {key: result[key] for key in keys}


def peer(name: str, sequences: int, length: int, steps: int, precision: str) -> dict:
    """Steps of one of the others: forward, backward, AdamW."""
    who, _, how = name.partition("-")
    model, loss_of = {
        "transformers": lambda: transformers(how == "compiled"),
        "litgpt": lambda: litgpt(how == "compiled", length),
        "seed": seed,
    }[who]()
    if precision == "bf16-pure":
        model.bfloat16()
    if how != "default":
        torch.set_float32_matmul_precision("medium")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), fused=who != "seed")
    context = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
    tokens = torch.randint(VOCAB, (sequences, length + 1), generator=torch.Generator().manual_seed(1))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    seconds = []
    for _ in range(steps + 2):
        start = time.perf_counter()
        with context:
            loss = loss_of(inputs, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        seconds.append(time.perf_counter() - start)
    rate = sequences * length / statistics.median(seconds[2:])
    return {"tokens_per_second": rate, "first_step_seconds": seconds[0]}


def main() -> None:
    """Run one contestant."""
    name, sequences, length, steps, precision, threads, *more = sys.argv[1:]
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    sizes = int(sequences), int(length), int(steps)
    if name.startswith("smolforge"):
        result = smolforge(*sizes, precision, [f"training.threads={threads}", *more])
    else:
        result = peer(name, *sizes, precision)
    result["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(result))


if __name__ == "__main__":
    main()
