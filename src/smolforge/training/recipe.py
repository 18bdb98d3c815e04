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

# Muon's peak: MUON_PEAK × N^MUON_POWER, fitted to our sweeps from 1.4M to 106M parameters, in none of which the best
# peak rose with the tokens (docs/recipes.md).
MUON_PEAK, MUON_POWER = 0.35, -0.25
# The norms' weights, which AdamW updates, learn most at a peak of their own: this many / steps, but no more than the
# second (docs/recipes.md).
NORMS, MOST_NORMS = 20, 0.04
# In runs of up to 1,000 steps Muon and AdamW do with a shorter mean of the gradient. Longer ones were not swept: there
# both fade to what the field uses.
SHORT, MOMENTA, BETA1 = 1000, (0.9, 0.95), (0.8, 0.9)
MOST_PEAK = 0.01  # of AdamW: Step Law was not fitted to small models that read much, and gives several times that
# Muon's peak × weight decay × steps: a weight that is never updated would shrink to exp(-2.5) of itself at the peak.
DECAY_OF_RUN = 2.5
MOST_DECAY = 0.01  # of a weight in one step, which short runs come to
# The mean of squared gradients spans as many tokens at any batch as the first does at this one (arXiv:2507.07101), but
# no more steps than the second does.
BETA2, BETA2_TOKENS = (0.95, 0.999), 1 << 19
# Share of the run over which the rate falls to zero (arXiv:2502.15938).
DECAY = 0.7
# Most tokens of a step, which takes seconds then.
MOST = {"cuda": 1 << 19, "cpu": 1 << 13}


# Step Law's batch in tokens: SCALE × D^POWER (Li et al. 2025, arXiv:2503.04715).
SCALE, POWER = 0.573, 0.571


def best_peak(parameters: int, tokens: float) -> float:
    """AdamW's best peak for N parameters and D tokens, by Step Law; at most `MOST_PEAK`."""
    return min(1.78 * parameters**-0.712 * tokens**0.307, MOST_PEAK)


def muon_peak(parameters: int) -> float:
    """Muon's best peak for N parameters."""
    return MUON_PEAK * parameters**MUON_POWER


def decay_of_run(parameters: int, tokens: float, *, muon: bool) -> float:
    """The best peak × weight decay × steps.

    AdamW's is the root of the tokens per parameter: Bergsma et al. 2025 (arXiv:2505.13738) found that power, and our
    sweeps the size.
    """
    return DECAY_OF_RUN if muon else (tokens / parameters) ** 0.5


def norms_factor(peak: float, steps: int) -> float:
    """The rate of the norms' weights over that of the others, whose peak is `peak`; at least 1."""
    return max(round(min(NORMS / steps, MOST_NORMS) / peak, 2), 1.0)


def mean_decay(shortest: float, longest: float, steps: int) -> float:
    """Decay of a running mean: the shortest in runs of up to 1,000 steps, a span that grows with the steps beyond."""
    return round(min(max(1 - (1 - shortest) * SHORT / steps, shortest), longest), 3)


def best_betas(tokens_per_step: int, steps: int) -> tuple[float, float]:
    """AdamW's decay of the mean gradient, by the steps, and of its square, by the batch."""
    least, most = BETA2
    beta2 = min(max(1 - (1 - least) * tokens_per_step / BETA2_TOKENS, least), most)
    return mean_decay(*BETA1, steps), round(beta2, 4)


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
    found: dict[str, Any] = {}
    lines = []
    if "name" not in given:
        found["name"] = "adamw" if config.training.precision == "bf16-pure" else "muon"
        why = "bf16-pure keeps weights in bf16" if found["name"] == "adamw" else "new weights; fewer tokens than adamw"
        lines.append(f"optimizer: {found['name']} ({why})")
    is_muon = found.get("name", config.optimizer.name) == "muon"
    if "lr" not in given:
        found["lr"] = float(f"{muon_peak(parameters) if is_muon else best_peak(parameters, tokens):.2g}")
        rule = f"Step Law, arXiv:2503.04715, N {count(parameters)}, D {count(tokens)}"
        if is_muon:
            rule = f"{MUON_PEAK:g} × N^{MUON_POWER:g}, N {count(parameters)}"
        lines.append(f"learning rate: {found['lr']:g} at its peak ({rule})")
        factor = norms_factor(found["lr"], steps)
        if "groups" not in given and factor > 1:
            found["groups"] = {"norm": {"lr": factor}}
            rule = f"{NORMS} / steps at their peak, at most {MOST_NORMS:g}"
            lines.append(f"norms: {factor:g} times that rate ({rule})")
    if is_muon and "momentum" not in given:
        found["momentum"] = mean_decay(*MOMENTA, steps)
        lines.append(f"momentum: {found['momentum']:g} ({MOMENTA[0]} up to {SHORT:,} steps, more in longer runs)")
    if "betas" not in given:
        found["betas"] = beta1, beta2 = best_betas(config.tokens_per_step, steps)
        lines.append(f"beta1: {beta1:g} ({BETA1[0]} up to {SHORT:,} steps, more in longer runs)")
        rule = f"{BETA2[0]} at {BETA2_TOKENS:,} tokens a step, the same span of tokens at fewer, at most {BETA2[1]}"
        lines.append(f"beta2: {beta2:g} ({rule}; arXiv:2507.07101)")
    if "weight_decay" not in given:
        peak, whole = found.get("lr", config.optimizer.lr), decay_of_run(parameters, tokens, muon=is_muon)
        found["weight_decay"] = float(f"{min(whole / steps, MOST_DECAY) / peak:.2g}")
        rule = f"{whole:.2g} / (peak × steps), at most {MOST_DECAY:g} / peak"
        if not is_muon:
            rule += f"; {whole:.2g} is the root of the tokens per parameter, arXiv:2505.13738"
        lines.append(f"weight decay: {found['weight_decay']:g} ({rule})")
    config = config.with_keys("optimizer", **found)
    if not config.schedule.model_fields_set:
        config = config.with_keys("schedule", name="wsd", decay=DECAY)
        lines.append(f"schedule: down to zero over the last {DECAY:.0%} (arXiv:2502.15938)")
    return config, lines
