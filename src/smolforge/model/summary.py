"""A model in numbers: what it is made of, what a token costs, what memory it takes.

Everything follows from the shapes of the module tree; no weight is allocated. `CONVENTIONS` says how it is counted.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field

import torch
from torch import nn

from smolforge.config import ModelConfig
from smolforge.formatting import size
from smolforge.model.architecture import architecture_of, build_model
from smolforge.model.attention import VARLEN_HAS_GROUPS
from smolforge.model.loss import CHUNK

CONVENTIONS = {
    "flops_per_token": "6 per weight of a matrix product, the head included and the embedding's look-up not, plus "
    "12 L H d T for attention over all T positions, the masked half counted too (PaLM, Chowdhery et al. 2022, "
    "arXiv:2204.02311, appendix B); a third of it in the forward pass",
    "training_memory": "one sequence in a step; state: weights, gradients, the moments of AdamW, and under autocast a "
    "16-bit copy of the matrices; activations: what backward needs without recomputation and with fused norms (eager "
    "norms on a CPU keep about a sixth more); head: the logits and gradients of one chunk; saving: the copy that an "
    "asynchronous save writes from",
    "serving_memory": "int8: one fp32 scale per row; int4: a 16-bit scale and minimum per 32 weights of a row, "
    "embedding and head in int8; norms in fp32; the cache holds keys and values of all layers",
}
# By precision: the type of weights, gradients and moments, and the type of matrix products and activations.
TRAINING_TYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.float32, torch.bfloat16),
    "fp16": (torch.float32, torch.float16),
    "bf16-pure": (torch.bfloat16, torch.bfloat16),
}
GROUPS = ("embedding", "attention", "mlp", "norm", "head")


@functools.lru_cache(maxsize=64)
def _shapes(serialized: str) -> list[tuple[str, torch.Size]]:
    """The group, of `GROUPS`, and the shape of each tensor of a model, without taking memory."""
    model = build_model(ModelConfig.model_validate_json(serialized), device="meta", seed=None)
    inside = model.hidden_matrices()

    def group(name: str, parameter: nn.Parameter) -> str:
        if parameter.dim() < 2:
            return "norm"
        if name in inside:
            return "mlp" if ".mlp." in name else "attention"
        return "embedding" if parameter is model.decoder.embed_tokens.weight else "head"

    return [(group(name, parameter), parameter.shape) for name, parameter in model.named_parameters()]


def count_groups(config: ModelConfig) -> dict[str, int]:
    """Number of parameters in each of `GROUPS`; a tied head has none."""
    counts: dict[str, int] = dict.fromkeys(GROUPS, 0)
    for group, shape in _shapes(config.model_dump_json()):
        counts[group] += shape.numel()
    return counts


def count_parameters(config: ModelConfig) -> int:
    """Number of parameters; a tied head adds none."""
    return sum(count_groups(config).values())


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a training step at its peak, part by part; see `CONVENTIONS`."""

    weights: int
    gradients: int
    moments: int
    casts: int
    activations: int
    head: int
    saving: int
    average: int = 0
    exchange: int = 0
    process: int = 500_000_000  # Python and torch before there is a model: an allowance, not a measurement

    @property
    def state(self) -> int:
        """What does not depend on the number of tokens."""
        return self.weights + self.gradients + self.moments + self.casts + self.average

    @property
    def total(self) -> int:
        """All of it."""
        return self.state + self.activations + self.head + self.saving + self.exchange + self.process


def estimate_memory(
    config: ModelConfig, *, sequences: int, length: int, stored: torch.dtype = torch.float32,
    computed: torch.dtype | None = None, optimizer: str = "adamw", recompute: bool = False, loss: str = "chunked",
    chunk: int = CHUNK, attention: str | None = None, masked: bool = False, save_copy: bool = False, adapter: int = 0,
    dropout: bool = False, average: bool = False, shards: int = 1, copies: bool = False,
    accumulated: bool = False, compiled: bool = False,
) -> MemoryEstimate:  # fmt: skip
    """The memory of one training step, from shapes alone: the same machine plans the same again.

    On a CPU the peak of the process was 0.90 to 1.17 times `total`; tests/model/test_estimate_memory.py measures it.

    Args:
        sequences: of one micro-batch, each of `length` tokens.
        stored: type of weights, gradients and moments.
        computed: type of matrix products and activations; `stored` unless given.
        optimizer: adamw (two moments), muon (one for the layers' matrices), or adamw8bit (two of one byte).
        recompute: whether only the inputs of layers are kept, and one layer's activations at a time.
        loss: a key of `loss.LOSSES`.
        chunk: tokens whose logits exist at a time.
        attention: a key of `attention.ATTENTION`, where it is known; expanded keeps more.
        masked: whether attention stops at document borders.
        save_copy: whether checkpoints are saved asynchronously from a copy in this memory.
        adapter: parameters of an adapter, in fp32, where only these learn.
        dropout: whether there is, which keeps a byte for each entry that a branch adds.
        average: whether an average of the weights that learn is kept, in fp32.
        shards: ranks that the state is cut among (FSDP2); then layers are whole only while they compute.
        copies: whether other ranks have the same model (DDP), whose sums of gradients are kept.
        accumulated: whether a step of shards has several micro-batches.
        compiled: whether inductor computes cheap activations again, as on a GPU.
    """
    groups = count_groups(config)
    width, inner = stored.itemsize, (computed or stored).itemsize
    state = _state_bytes(groups, width, inner, optimizer, adapter, shards)
    tokens, layers = sequences * length, config.num_hidden_layers
    entries = _layer_entries(config, attention, copies=adapter > 0 and inner == 2, compiled=compiled)
    layer = tokens * (entries * inner + 2 * config.hidden_size * dropout)
    averaged = 4 * (adapter or sum(groups.values())) * average
    mask = sequences * length**2 * inner if attention == "expanded" and masked else 0  # the only one that keeps it
    stream = tokens * config.hidden_size * inner
    rows = tokens if loss in ("full", "linear") else min(tokens, chunk)
    # The logits take their gradients' place; torch's own operations need them twice more, in fp32.
    per_logit = inner if loss == "native" else inner + 8
    table = config.vocab_size * config.hidden_size * (inner if shards == 1 else 4)  # cast; its gradient's sum in fp32
    activations = mask + (layers * stream + layer if recompute else layers * layer)
    head = rows * config.vocab_size * per_logit + table * (inner != width and not adapter) + 2 * stream
    exchange = 0
    if shards > 1:
        exchange = _gathered_bytes(groups, layers, inner, activations + head, state["gradients"], accumulated)
    elif copies and not adapter:
        exchange = _bytes_beside_buckets(config, width, activations + head)
    return MemoryEstimate(
        **state,
        activations=activations, head=head, average=averaged,
        saving=(state["gradients"] + state["moments"] + averaged) * save_copy,
        exchange=exchange,
    )  # fmt: skip


def _layer_entries(config: ModelConfig, attention: str | None, *, copies: bool, compiled: bool) -> int:
    """What autograd keeps for each token and layer of `llama.py`.

    Inputs and outputs of both norms, queries and the output of attention, keys and values, and of the MLP gate,
    silu(gate), up and their product; `copies`: of each norm three, since eager norms compute in fp32; `compiled`: the
    output of a norm and silu(gate) less, so that an H100 held 0.98 of what is planned (docs/performance.md).
    """
    heads = config.num_attention_heads
    repeats = attention == "expanded" or (attention == "varlen" and not VARLEN_HAS_GROUPS)
    heads += heads if repeats else config.num_key_value_heads
    kept = 4 * config.hidden_size + 2 * heads * config.head_dim + 4 * config.intermediate_size
    kept -= (config.hidden_size + config.intermediate_size) * compiled
    return kept + (12 * config.hidden_size if copies else 0)


def _state_bytes(
    groups: dict[str, int], width: int, inner: int, optimizer: str, adapter: int, shards: int
) -> dict[str, int]:
    """Bytes of weights, gradients, moments and casts, of numbers of `width` bytes stored and `inner` computed."""
    count, hidden = sum(groups.values()), groups["attention"] + groups["mlp"]
    if adapter:  # the model itself is stored in the precision that it computes in
        return {"weights": count * inner + 4 * adapter, "gradients": 4 * adapter, "moments": 8 * adapter, "casts": 0}
    moments = {"muon": (2 * count - hidden) * width, "adamw8bit": 2 * count}.get(optimizer, 2 * count * width)
    # Shards are cast before they are gathered.
    casts = (count - groups["norm"]) * inner if inner != width and shards == 1 else 0
    parts = {"weights": count * width, "gradients": count * width, "moments": moments, "casts": casts}
    return {name: -(-size // shards) for name, size in parts.items()}


def _gathered_bytes(
    groups: dict[str, int], layers: int, inner: int, freed: int, gradients: int, accumulated: bool
) -> int:
    """Bytes of what FSDP2 holds whole for a while.

    After the loss these are embedding and head with their gradients, two layers, the gradients of one, and what is
    summed of it, while there are no shards of `gradients` yet but those of earlier micro-batches. At the end of the
    backward pass, what is summed of embedding and head comes in the place of `freed` bytes of activations and logits,
    and its shard beside that of the earlier ones.

    Args:
        inner: bytes of a number that is computed with; gradients are summed in fp32.
    """
    layer, rest = (groups["attention"] + groups["mlp"]) // layers, groups["embedding"] + groups["head"]
    missing, shard = (0, gradients * rest // sum(groups.values())) if accumulated else (gradients, 0)
    return max(2 * rest * inner + (3 * inner + 4) * layer - missing, (2 * inner + 4) * rest + shard - freed, 0)


def _bytes_beside_buckets(config: ModelConfig, width: int, freed: int) -> int:
    """Bytes of the head's gradient, which is made in the forward pass while DDP's buckets hold all gradients.

    It is summed in fp32. At the end of the backward pass the embedding's comes in the place of `freed` bytes of
    activations and logits; it is added to that of a tied head.
    """
    table = config.vocab_size * config.hidden_size
    made = table * (width if width == 4 else width + 4)
    return max(made, table * width * (1 + config.tie_word_embeddings) - freed)


def flops_per_token(config: ModelConfig, sequence_length: int) -> dict[str, int]:
    """FLOPs of one token in a sequence of `sequence_length`; see `CONVENTIONS`."""
    groups = count_groups(config)
    weights = 6 * (groups["attention"] + groups["mlp"] + config.vocab_size * config.hidden_size)
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * sequence_length
    training = weights + attention
    return {"training": training, "weights": weights, "attention": attention, "forward": training // 3}


@dataclass(frozen=True)
class Summary:
    """The numbers of one model.

    Attributes:
        groups: parameters of embedding, attention, mlp, norm and head; they add up to `parameters`.
        sequence_length: positions T that the numbers per token and per sequence are for.
        flops_per_token: `training` (forward and backward), its parts `weights` and `attention`, and `forward`.
        training_memory: by precision the parts of a `MemoryEstimate` of one sequence, and its `state`.
        serving_memory: `weights` in bytes by precision, `cache_per_token` in bytes by precision of the cache.
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
    conventions: dict[str, str] = field(default_factory=lambda: dict(CONVENTIONS))

    def lines(self) -> list[str]:
        """The numbers for people, one line each."""
        flops, cache = self.flops_per_token["training"], self.serving_memory["cache_per_token"]["bf16"]
        groups = ", ".join(f"{group} {count:,}" for group, count in self.groups.items())
        served = ", ".join(f"{name} {size(count)}" for name, count in self.serving_memory["weights"].items())
        trained = ", ".join(
            f"{name} {size(memory['state'])} + {size(memory['activations'])} a sequence"
            for name, memory in self.training_memory.items()
        )
        per_token = f"{flops / 1e9:.2f} GFLOP" if flops >= 1e8 else f"{flops / 1e6:.2f} MFLOP"
        return [
            f"Tensors: {self.tensors:,}",
            f"Parameters: {groups}",
            f"Training: {per_token} per token at {self.sequence_length:,} positions",
            f"Memory to train: {trained}",
            f"Memory to serve: {served}; cache {size(cache)} a token in bf16",
        ]


def tree(model: nn.Module) -> str:
    """The modules as torch prints them, equal layers once, and the line `Total model parameters: N`."""
    return f"{model}\n\nTotal model parameters: {sum(p.numel() for p in model.parameters()):,}"


def summarise(config: ModelConfig, sequence_length: int = 2048) -> Summary:
    """The numbers of the model of `config` for sequences of `sequence_length` positions."""
    architecture, groups = architecture_of(config), count_groups(config)
    shapes = _shapes(config.model_dump_json())
    training = {}
    for name, (stored, computed) in TRAINING_TYPES.items():
        parts = estimate_memory(
            config, sequences=1, length=sequence_length, stored=stored, computed=computed, save_copy=True
        )
        training[name] = {**dataclasses.asdict(parts), "state": parts.state}
    served = {name: sum(_stored_bytes(*each, name) for each in shapes) for name in ("fp32", "bf16", "int8", "int4")}
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return Summary(
        model=architecture.class_name,
        architecture=architecture.name,
        parameters=sum(groups.values()),
        tensors=len(shapes),
        groups=groups,
        sequence_length=sequence_length,
        flops_per_token=flops_per_token(config, sequence_length),
        training_memory=training,
        serving_memory={"weights": served, "cache_per_token": {"fp32": 4 * cached, "bf16": 2 * cached}},
    )


def _stored_bytes(group: str, shape: torch.Size, precision: str) -> int:
    if group == "norm" or precision == "fp32":
        return 4 * shape.numel()
    if precision == "bf16":
        return 2 * shape.numel()
    rows, columns = shape
    if precision == "int8" or group in ("embedding", "head"):
        return rows * (columns + 4)
    return rows * -(-columns // 32) * (32 // 2 + 4)
