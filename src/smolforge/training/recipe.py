"""The recipe of new weights: optimizer, peak, batch and decay, from the model's size and the length of the run.

What the configuration gives stays as it is. The rest follows from N, the parameters without embeddings, and D, the
tokens that the run reads, and is told with its rule. A run's configuration keeps the values, so a resumed run decides
nothing again.
"""

from __future__ import annotations

from typing import Any

import torch

from smolforge.config import RunConfig
from smolforge.formatting import count
from smolforge.model.summary import count_groups

# Muon's peak relative to Step Law's for AdamW: the updates of both have one size (arXiv:2502.16982, section 2.2), and
# orthogonal ones bear more of it (docs/recipes.md).
MUON_FACTOR = 3.0
# Peak × weight decay × steps: a weight that is never updated would shrink to exp(-2.5) of itself at the peak.
DECAY_OF_RUN = 2.5
MOST_DECAY = 0.01  # of a weight in one step, which short runs come to
# The mean of squared gradients spans as many tokens at any batch as 0.95 does at this one (arXiv:2507.07101).
BETA2, BETA2_TOKENS = 0.95, 1 << 19
SPAN = 0.1  # of the run, that mean's longest
# Share of the run over which the rate falls to zero (arXiv:2502.15938).
DECAY = 0.7
# Most tokens of a step, which takes seconds then.
MOST = {"cuda": 1 << 19, "cpu": 1 << 13}


# Step Law's batch in tokens: SCALE × D^POWER (Li et al. 2025, arXiv:2503.04715).
SCALE, POWER = 0.573, 0.571


def best_peak(parameters: int, tokens: float) -> float:
    """AdamW's best peak for N parameters and D tokens, by Step Law."""
    return 1.78 * parameters**-0.712 * tokens**0.307


def adapter_peak(width: int) -> float:
    """AdamW's peak for an adapter of a model of this width.

    15 times the peak of tuning every weight, 5e-5 (2000 / width)^0.781: the factor that Schulman et al. 2025 ("LoRA
    without regret", thinkingmachines.ai) saw in short runs, and their fit for Llama; at most the highest that we have
    measured (docs/finetuning.md).
    """
    return min(15 * 5e-5 * (2000 / width) ** 0.781, 2e-3)


def best_batch(tokens: float) -> float:
    """The best batch in tokens for D tokens, by Step Law."""
    return SCALE * tokens**POWER


def count_body(config: RunConfig) -> int:
    """N: the parameters of the layers, without embedding and head."""
    groups = count_groups(config.model)
    return sum(groups.values()) - groups["embedding"] - groups["head"]


def resolve_batch(config: RunConfig, device: torch.device) -> RunConfig:
    """Fill in the global batch where the configuration leaves it open; it is fixed with the run."""
    training, length = config.training, config.data.sequence_length
    if training.tokens_per_step is not None:
        return config
    most = MOST["cuda" if device.type == "cuda" else "cpu"]
    if training.tokens is not None:
        wanted = best_batch(training.tokens)
    elif training.steps is not None:
        wanted = best_batch(training.steps) ** (1 / (1 - POWER))  # the B with B = best_batch(steps × B)
    else:
        wanted = most
    sequences = max(round(min(wanted, most) / length), 1)
    even = 1 << max(sequences.bit_length() - 3, 0)  # so that micro-batches and processes can share them
    sequences = round(sequences / even) * even
    return config.with_keys("training", tokens_per_step=sequences * length)


def resolve_recipe(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """`config` with the values that it leaves open, and a line for people for each of them.

    Weights that others trained (`init`) and chat data keep the configuration's defaults, but for an adapter's peak.
    """
    given = config.optimizer.model_fields_set
    if config.init is not None or config.data.format != "text":
        if not config.lora.r or "lr" in given:
            return config, []
        lr = float(f"{adapter_peak(config.model.hidden_size):.2g}")
        line = f"learning rate: {lr:g} at its peak (an adapter: 7.5e-4 × (2000 / width)^0.781)"
        return config.with_keys("optimizer", lr=lr), [line]
    steps = config.total_steps
    parameters, tokens = count_body(config), steps * config.tokens_per_step
    of = f"N {count(parameters)}, D {count(tokens)}"
    found: dict[str, Any] = {}
    lines = []
    if "name" not in given:
        found["name"] = "adamw" if config.training.precision == "bf16-pure" else "muon"
        why = "bf16-pure keeps weights in bf16" if found["name"] == "adamw" else "new weights; fewer tokens than adamw"
        lines.append(f"optimizer: {found['name']} ({why})")
    is_muon = found.get("name", config.optimizer.name) == "muon"
    if "lr" not in given:
        found["lr"] = float(f"{best_peak(parameters, tokens) * (MUON_FACTOR if is_muon else 1):.2g}")
        times = f"{MUON_FACTOR:g} × " if is_muon else ""
        lines.append(f"learning rate: {found['lr']:g} at its peak ({times}Step Law, arXiv:2503.04715, {of})")
    if "betas" not in given:
        share = (1 - BETA2) * config.tokens_per_step / BETA2_TOKENS
        beta2 = round(1 - min(max(share, 1 / (SPAN * steps)), 1 - BETA2), 4)
        found["betas"] = (0.9, beta2)
        lines.append(
            f"beta2: {beta2:g} (spans the same tokens at any batch, arXiv:2507.07101, at most {SPAN:.0%} of the run)"
        )
    if "weight_decay" not in given:
        peak = found.get("lr", config.optimizer.lr)
        found["weight_decay"] = float(f"{min(DECAY_OF_RUN / steps, MOST_DECAY) / peak:.2g}")
        lines.append(
            f"weight decay: {found['weight_decay']:g} "
            f"({DECAY_OF_RUN:g} / (peak × steps), at most {MOST_DECAY:g} / peak)"
        )
    config = config.with_keys("optimizer", **found)
    if not config.schedule.model_fields_set:
        config = config.with_keys("schedule", name="wsd", decay=DECAY)
        lines.append(f"schedule: down to zero over the last {DECAY:.0%} (arXiv:2502.15938)")
    return config, lines
