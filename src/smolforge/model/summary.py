"""A model in numbers: what it is made of, what a token costs, what memory it takes.

Everything follows from the shapes; no weight is allocated. Numbers of bytes and FLOPs are reckoned under conventions
that stand beside them: what really happened is in a run's metrics.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from smolforge.config import ModelConfig
from smolforge.model.architecture import build_model

FLOPS_CONVENTION = (
    "6 per weight of a matrix product, the head included and the embedding's look-up not, plus 12 L H d T for "
    "attention over all T positions, the masked half counted too (PaLM, Chowdhery et al. 2022, arXiv:2204.02311, "
    "appendix B); a third of it in the forward pass"
)
TRAINING_CONVENTION = (
    "state: weights, gradients, two AdamW moments, and under autocast a 16-bit copy of the matrices; activations: what "
    "backward needs of one sequence without recomputation and with fused norms (eager norms on a CPU keep about a "
    "sixth more); not counted: the loss's chunk of logits"
)
SERVING_CONVENTION = (
    "int8: one fp32 scale per row; int4: one bf16 scale per 32 weights of a row, embedding and head in int8; norms in "
    "fp32; the cache holds keys and values of all layers"
)
# Bytes of one weight, gradient, pair of moments, and one activation. Under autocast (bf16, fp16) weights stay in fp32
# and the matrices are also kept in 16 bits for the backward pass, which `training_memory` adds.
_TRAINING_BYTES = {"fp32": (4, 4, 8, 4), "bf16": (4, 4, 8, 2), "fp16": (4, 4, 8, 2), "bf16-pure": (2, 2, 4, 2)}
_CACHE_BYTES = {"fp32": 4, "bf16": 2}
_GROUPS: tuple[str, ...] = ("embedding", "attention", "mlp", "norm", "head")
_SERVED: tuple[str, ...] = ("fp32", "bf16", "int8", "int4")
_INT4_GROUP = 32


@dataclass(frozen=True)
class Summary:
    """The numbers of one model.

    Attributes:
        parameters: each stored weight once; a tied head adds none.
        tensors: in the state dict.
        groups: parameters of embedding, attention, mlp, norm and head; they add up to `parameters`.
        sequence_length: positions T that the numbers per token and per sequence are for.
        flops_per_token: `training` (forward and backward), its parts `weights` and `attention`, and `forward`.
        training_memory: bytes by precision: `weights`, `gradients`, `moments`, `casts` (16-bit copies under autocast),
            their sum `state`, and `activations` of one sequence.
        serving_memory: `weights` in bytes by precision, `cache_per_token` in bytes by precision of the cache.
        conventions: how flops_per_token, training_memory and serving_memory are counted.
    """

    model: str
    architecture: str
    parameters: int
    tensors: int
    groups: dict[str, int]
    sequence_length: int
    flops_per_token: dict[str, int]
    training_memory: dict[str, dict[str, int]]
    serving_memory: dict[str, dict[str, int]]
    conventions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """What `smolforge summary --json` prints."""
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        """The numbers for people, one line each."""
        flops, cache = self.flops_per_token, self.serving_memory["cache_per_token"]
        training = ", ".join(
            f"{name} {size(memory['state'])} + {size(memory['activations'])} a sequence"
            for name, memory in self.training_memory.items()
        )
        return [
            f"Tensors: {self.tensors:,}",
            "Parameters: " + ", ".join(f"{group} {count:,}" for group, count in self.groups.items()),
            f"Training: {_flops(flops['training'])} per token at {self.sequence_length:,} positions",
            f"Memory to train: {training}",
            "Memory to serve: "
            + ", ".join(f"{name} {size(count)}" for name, count in self.serving_memory["weights"].items())
            + f"; cache {size(cache['bf16'])} a token in bf16",
        ]


def tree(model: nn.Module) -> str:
    """The modules as torch prints them, equal layers once, and the line `Total model parameters: N`."""
    return f"{model}\n\nTotal model parameters: {sum(p.numel() for p in model.parameters()):,}"


def summarise(config: ModelConfig, sequence_length: int = 2048) -> Summary:
    """The numbers of the model of `config` for sequences of `sequence_length` positions."""
    model = build_model(config, device="meta", seed=None)
    weights: dict[str, Tensor] = dict(model.named_parameters())
    groups: dict[str, int] = dict.fromkeys(_GROUPS, 0)
    for name, weight in weights.items():
        groups[_group(name, weight)] += weight.numel()
    return Summary(
        model=type(model).__name__,
        architecture=config.architecture,
        parameters=sum(groups.values()),
        tensors=len(model.state_dict()),
        groups=groups,
        sequence_length=sequence_length,
        flops_per_token=flops_per_token(config, sequence_length),
        training_memory=_training_memory(config, weights, sequence_length),
        serving_memory=_serving_memory(config, weights),
        conventions={
            "flops_per_token": FLOPS_CONVENTION,
            "training_memory": TRAINING_CONVENTION,
            "serving_memory": SERVING_CONVENTION,
        },
    )


def flops_per_token(config: ModelConfig, sequence_length: int) -> dict[str, int]:
    """FLOPs of one token in a sequence of `sequence_length`, under `FLOPS_CONVENTION`."""
    model = build_model(config, device="meta", seed=None)
    hidden = model.hidden_matrices()
    matrices = sum(weight.numel() for name, weight in model.named_parameters() if name in hidden)
    weights = 6 * (matrices + model.output_weight.numel())
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * sequence_length
    training = weights + attention
    return {"training": training, "weights": weights, "attention": attention, "forward": training // 3}


def size(count: float) -> str:
    """Bytes for people, in powers of 1024: 23.0 KiB, 1.5 GiB."""
    power = 0
    while count >= 1024 and power < 4:
        count, power = count / 1024, power + 1
    return f"{count:.{min(power, 1)}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def _flops(count: float) -> str:
    return f"{count / 1e9:.2f} GFLOP" if count >= 1e8 else f"{count / 1e6:.2f} MFLOP"


def _group(name: str, weight: Tensor) -> str:
    if weight.dim() < 2:
        return "norm"
    if name == "lm_head.weight":
        return "head"
    return "mlp" if ".mlp." in name else "attention" if "attn." in name else "embedding"


def activations_per_token(config: ModelConfig) -> int:
    """Numbers that autograd keeps for each token and layer, counted in the forward pass of `llama.py`.

    Inputs and outputs of both norms (4 D), queries and the output of attention (2 H d), keys and values as attention
    sees them (2 K d), and of the MLP gate, silu(gate), up and their product (4 I).
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    return 4 * config.hidden_size + 2 * (heads + kv_heads) * config.head_dim + 4 * config.intermediate_size


def _training_memory(config: ModelConfig, weights: dict[str, Tensor], length: int) -> dict[str, dict[str, int]]:
    count = sum(weight.numel() for weight in weights.values())
    matrices = sum(weight.numel() for weight in weights.values() if weight.dim() > 1)
    kept = activations_per_token(config) * config.num_hidden_layers * length
    table = {}
    for precision, (weight, gradient, moments, activation) in _TRAINING_BYTES.items():
        parts = {
            "weights": weight * count,
            "gradients": gradient * count,
            "moments": moments * count,
            "casts": 2 * matrices if precision in ("bf16", "fp16") else 0,
        }
        table[precision] = {**parts, "state": sum(parts.values()), "activations": activation * kept}
    return table


def _serving_memory(config: ModelConfig, weights: dict[str, Tensor]) -> dict[str, dict[str, int]]:
    totals: dict[str, int] = dict.fromkeys(_SERVED, 0)
    for name, weight in weights.items():
        for precision in totals:
            totals[precision] += _stored_bytes(weight, precision, head=_group(name, weight) in ("embedding", "head"))
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return {"weights": totals, "cache_per_token": {name: width * numbers for name, width in _CACHE_BYTES.items()}}


def _stored_bytes(weight: Tensor, precision: str, *, head: bool) -> int:
    if weight.dim() < 2 or precision == "fp32":
        return 4 * weight.numel()
    if precision == "bf16":
        return 2 * weight.numel()
    rows, columns = weight.shape
    if precision == "int8" or head:
        return rows * (columns + 4)
    groups = -(-columns // _INT4_GROUP)
    return rows * groups * (_INT4_GROUP // 2 + 2)
