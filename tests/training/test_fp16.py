"""fp16 with a gradient scaler, emulated on a CPU: its curves beside those of bf16 and fp32."""

from __future__ import annotations

import pytest
import torch

from smolforge.config import RunConfig
from smolforge.distributed import DistributedContext
from smolforge.model.architecture import build_model
from smolforge.training.optim import build_optimizer
from smolforge.training.plan import Plan
from smolforge.training.precision import Precision
from smolforge.training.step import train_step

CPU, WORDS, SEQUENCES, LENGTH = torch.device("cpu"), 512, 16, 32
PRECISIONS = {
    "fp32": Precision("fp32", torch.float32, None, "highest"),
    "bf16": Precision("bf16", torch.float32, torch.bfloat16, "highest"),
    "fp16": Precision("fp16", torch.float32, torch.float16, "highest", scaler=True),
}


def curve(architecture: str, precision: str, optimizer: str, steps: int) -> list[float]:
    """Losses of a small model on a random first-order Markov chain with eight successors for each token."""
    config = RunConfig.model_validate({
        "model": {
            "architecture": architecture, "vocab_size": WORDS, "hidden_size": 48, "intermediate_size": 96,
            "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1 if architecture == "llama" else 3,
            "max_position_embeddings": LENGTH,
        },
        "data": {"sequence_length": LENGTH}, "optimizer": {"name": optimizer},
        "training": {"tokens_per_step": SEQUENCES * LENGTH, "steps": steps},
    })  # fmt: skip
    plan = Plan(CPU, PRECISIONS[precision], SEQUENCES, SEQUENCES // 2, False, 1)
    model = build_model(config.model, seed=1, **{**plan.model_options, "compile": False})
    built = build_optimizer(model, config.optimizer)
    scaler = torch.amp.GradScaler("cpu") if plan.precision.scaler else None
    generator = torch.Generator().manual_seed(2)
    successors = torch.randint(WORDS, (WORDS, 8), generator=generator)
    found = []
    for _ in range(steps):
        tokens = torch.randint(WORDS, (SEQUENCES, 1), generator=generator)
        choices = torch.randint(8, (SEQUENCES, LENGTH), generator=generator)
        for place in range(LENGTH):
            tokens = torch.cat((tokens, successors[tokens[:, -1], choices[:, place]][:, None]), 1)
        nats, _, skipped = train_step(
            model, built, plan, config, tokens, None, lr=1e-2, ranks=DistributedContext(), scaler=scaler
        )
        assert not skipped
        found.append(float(nats) / tokens[:, 1:].numel())
    return found


def distance(ours: list[float], theirs: list[float]) -> float:
    """Mean difference over the last quarter."""
    last = len(ours) // 4
    return sum(abs(a - b) for a, b in zip(ours[-last:], theirs[-last:], strict=True)) / last


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "recreation"])
def test_fp16_is_as_near_to_fp32_as_bf16(architecture: str) -> None:
    curves = {name: curve(architecture, name, "adamw", 200) for name in PRECISIONS}
    far = {name: distance(curves[name], curves["fp32"]) for name in ("bf16", "fp16")}
    assert curves["fp32"][-1] < curves["fp32"][0] - 2, "the curve falls"
    assert far["fp16"] < 1.5 * far["bf16"] + 0.005, (far, curves["fp16"][::20])


@pytest.mark.parametrize("architecture", ["llama", "recreation"])
def test_the_first_steps_in_fp16_follow_fp32(architecture: str) -> None:
    ours, theirs = (curve(architecture, name, "adamw", 8) for name in ("fp16", "fp32"))
    assert distance(ours, theirs) < 0.01, (ours, theirs)
