"""A model in numbers: what it is made of, what a token costs, what memory it takes.

Everything follows from the shapes of the module tree; no weight is allocated. The conventions by which bytes and FLOPs
are counted stand beside the numbers: what really happened is in a run's metrics.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from smolforge.config import ModelConfig
from smolforge.formatting import size
from smolforge.model.architecture import architecture_of, build_model
from smolforge.model.loss import CHUNK

FLOPS_CONVENTION = (
    "6 per weight of a matrix product, the head included and the embedding's look-up not, plus 12 L H d T for "
    "attention over all T positions, the masked half counted too (PaLM, Chowdhery et al. 2022, arXiv:2204.02311, "
    "appendix B); a third of it in the forward pass"
)
TRAINING_CONVENTION = (
    "one sequence in a step; state: weights, gradients, the moments of AdamW, and under autocast a 16-bit copy of the "
    "matrices; activations: what backward needs without recomputation and with fused norms (eager norms on a CPU keep "
    "about a sixth more); head: the logits and gradients of one chunk; saving: the copy that an asynchronous save "
    "writes from"
)
SERVING_CONVENTION = (
    "int8: one fp32 scale per row; int4: one bf16 scale per 32 weights of a row, embedding and head in int8; norms in "
    "fp32; the cache holds keys and values of all layers"
)
# By precision: the type of weights, gradients and moments, and the type of matrix products and activations.
TRAINING_TYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.float32, torch.bfloat16),
    "fp16": (torch.float32, torch.float16),
    "bf16-pure": (torch.bfloat16, torch.bfloat16),
}
# Python and torch before there is a model: an allowance, not a measurement.
PROCESS_BYTES = 500_000_000
_CACHE_BYTES = {"fp32": 4, "bf16": 2}
_GROUPS: tuple[str, ...] = ("embedding", "attention", "mlp", "norm", "head")
_SERVED: tuple[str, ...] = ("fp32", "bf16", "int8", "int4")
_INT4_GROUP = 32


@dataclass(frozen=True)
class Weight:
    """One tensor of a model: its shape, and the group of `summarise` that it belongs to."""

    shape: tuple[int, ...]
    group: str

    @property
    def count(self) -> int:
        """Number of its elements."""
        return torch.Size(self.shape).numel()

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) > 1


def weights_of(config: ModelConfig) -> dict[str, Weight]:
    """The tensors of a model by name, read from its module tree without taking memory."""
    return _weights_of(config.model_dump_json())


@functools.lru_cache(maxsize=64)
def _weights_of(serialized: str) -> dict[str, Weight]:
    model = build_model(ModelConfig.model_validate_json(serialized), device="meta", seed=None)
    inside = model.hidden_matrices()

    def group(name: str, parameter: nn.Parameter) -> str:
        if parameter.dim() < 2:
            return "norm"
        if name in inside:
            return "mlp" if ".mlp." in name else "attention"
        return "embedding" if parameter is model.decoder.embed_tokens.weight else "head"

    return {name: Weight(tuple(p.shape), group(name, p)) for name, p in model.named_parameters()}


def count_parameters(config: ModelConfig) -> int:
    """Number of parameters; a tied head adds none."""
    return sum(weight.count for weight in weights_of(config).values())


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a training step at its peak, part by part.

    Attributes:
        casts: copies of the matrices in 16 bits, under autocast.
        activations: what the forward pass keeps for the backward pass.
        head: logits and gradients of the tokens whose logits exist at a time.
        saving: the copy of weights and moments that an asynchronous save writes from.
        process: Python and torch themselves.
    """

    weights: int
    gradients: int
    moments: int
    casts: int
    activations: int
    head: int
    saving: int
    process: int = PROCESS_BYTES

    @property
    def state(self) -> int:
        """What does not depend on the number of tokens."""
        return self.weights + self.gradients + self.moments + self.casts

    @property
    def total(self) -> int:
        """All of it."""
        return self.state + self.activations + self.head + self.saving + self.process


def estimate_memory(
    config: ModelConfig,
    *,
    sequences: int,
    length: int,
    stored: torch.dtype = torch.float32,
    computed: torch.dtype | None = None,
    optimizer: str = "adamw",
    recompute: bool = False,
    loss: str = "chunked",
    save_copy: bool = False,
) -> MemoryEstimate:
    """The memory of one training step, from shapes alone: the same machine plans the same again.

    Measured on a CPU (SmolLM2-135M with 12 layers, 1,024 and 2,048 tokens, all types, losses and recomputation), the
    peak of the process was 0.90 to 1.17 times `total`; tests/model/test_memory.py measures it again.

    Args:
        sequences: sequences of one micro-batch.
        length: tokens of a sequence.
        stored: type of weights, gradients and moments.
        computed: type of matrix products and activations; `stored` unless given.
        optimizer: adamw (two moments), muon (one for the layers' matrices), or adamw8bit (two of one byte).
        recompute: whether only the inputs of layers are kept, and one layer's activations at a time.
        loss: a key of `loss.LOSSES`.
        save_copy: whether checkpoints are saved asynchronously from a copy in this memory.
    """
    weights = weights_of(config)
    width, inner = stored.itemsize, (computed or stored).itemsize
    count = sum(weight.count for weight in weights.values())
    matrices = sum(weight.count for weight in weights.values() if weight.is_matrix)
    hidden = sum(weight.count for weight in weights.values() if weight.group in ("attention", "mlp"))
    moments = {"muon": (2 * count - hidden) * width, "adamw8bit": 2 * count}.get(optimizer, 2 * count * width)
    tokens, layers = sequences * length, config.num_hidden_layers
    layer = tokens * activations_per_token(config) * inner
    entries = tokens * config.hidden_size * inner
    rows = tokens if loss in ("full", "linear") else min(tokens, CHUNK)
    # The logits take their gradients' place; torch's own operations need them twice more, in fp32.
    per_logit = inner if loss == "native" else inner + 8
    table = config.vocab_size * config.hidden_size * inner if inner != width else 0  # its gradient before it is widened
    return MemoryEstimate(
        weights=count * width,
        gradients=count * width,
        moments=moments,
        casts=matrices * inner if inner != width else 0,
        activations=layers * entries + layer if recompute else layers * layer,
        head=rows * config.vocab_size * per_logit + table + 2 * entries,
        saving=count * width + moments if save_copy else 0,
    )


def activations_per_token(config: ModelConfig) -> int:
    """Numbers that autograd keeps for each token and layer, counted in the forward pass of `llama.py`.

    Inputs and outputs of both norms (4 D), queries and the output of attention (2 H d), keys and values as attention
    sees them (2 K d), and of the MLP gate, silu(gate), up and their product (4 I).
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    return 4 * config.hidden_size + 2 * (heads + kv_heads) * config.head_dim + 4 * config.intermediate_size


def flops_per_token(config: ModelConfig, sequence_length: int) -> dict[str, int]:
    """FLOPs of one token in a sequence of `sequence_length`, under `FLOPS_CONVENTION`."""
    matrices = sum(weight.count for weight in weights_of(config).values() if weight.group in ("attention", "mlp"))
    weights = 6 * (matrices + config.vocab_size * config.hidden_size)
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * sequence_length
    training = weights + attention
    return {"training": training, "weights": weights, "attention": attention, "forward": training // 3}


@dataclass(frozen=True)
class Summary:
    """The numbers of one model.

    Attributes:
        parameters: each stored weight once; a tied head adds none.
        tensors: in the state dict.
        groups: parameters of embedding, attention, mlp, norm and head; they add up to `parameters`.
        sequence_length: positions T that the numbers per token and per sequence are for.
        flops_per_token: `training` (forward and backward), its parts `weights` and `attention`, and `forward`.
        training_memory: the parts of a `MemoryEstimate` of one sequence by precision, and the sum `state` of those
            that do not depend on the tokens.
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
    weights = weights_of(config)
    architecture = architecture_of(config)
    groups: dict[str, int] = dict.fromkeys(_GROUPS, 0)
    for weight in weights.values():
        groups[weight.group] += weight.count
    return Summary(
        model=architecture.class_name,
        architecture=architecture.name,
        parameters=sum(groups.values()),
        tensors=len(weights),
        groups=groups,
        sequence_length=sequence_length,
        flops_per_token=flops_per_token(config, sequence_length),
        training_memory={name: _training_memory(config, name, sequence_length) for name in TRAINING_TYPES},
        serving_memory=_serving_memory(config),
        conventions={
            "flops_per_token": FLOPS_CONVENTION,
            "training_memory": TRAINING_CONVENTION,
            "serving_memory": SERVING_CONVENTION,
        },
    )


def _training_memory(config: ModelConfig, precision: str, length: int) -> dict[str, int]:
    stored, computed = TRAINING_TYPES[precision]
    parts = estimate_memory(config, sequences=1, length=length, stored=stored, computed=computed, save_copy=True)
    return {**dataclasses.asdict(parts), "state": parts.state}


def _serving_memory(config: ModelConfig) -> dict[str, dict[str, int]]:
    totals: dict[str, int] = dict.fromkeys(_SERVED, 0)
    for weight in weights_of(config).values():
        for precision in totals:
            totals[precision] += _stored_bytes(weight, precision)
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return {"weights": totals, "cache_per_token": {name: width * numbers for name, width in _CACHE_BYTES.items()}}


def _stored_bytes(weight: Weight, precision: str) -> int:
    if not weight.is_matrix or precision == "fp32":
        return 4 * weight.count
    if precision == "bf16":
        return 2 * weight.count
    rows, columns = weight.shape
    if precision == "int8" or weight.group in ("embedding", "head"):
        return rows * (columns + 4)
    groups = -(-columns // _INT4_GROUP)
    return rows * groups * (_INT4_GROUP // 2 + 2)


def _flops(count: float) -> str:
    return f"{count / 1e9:.2f} GFLOP" if count >= 1e8 else f"{count / 1e6:.2f} MFLOP"
