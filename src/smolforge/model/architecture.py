"""What every architecture shares: the language model around its blocks, and the record by which the rest finds it.

A new architecture is one file in this folder: it defines its blocks, a `Decoder` and a `CausalLM`, and calls `register`
with one `Architecture`, which says all that differs outside of this package; see `llama.py`.

Shapes: B sequences, T positions, S keys (S >= T with a cache), D hidden, H query heads, K key/value heads, d head_dim,
V vocabulary.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from smolforge import model as package
from smolforge.config import ModelConfig
from smolforge.distributed import copy_whole, local_rows
from smolforge.errors import first_problem, unknown
from smolforge.model import hf_config
from smolforge.model.attention import Attend
from smolforge.model.documents import Documents
from smolforge.model.dropout import Dropout
from smolforge.model.loss import choose_loss, evaluation_loss, without_ignored


class KeyValueCache(Protocol):
    """What attention asks of a cache: store the new keys and values, return all that may be seen."""

    mask: Tensor | None  # as of `attention.Attend`; None where each token sees all before it

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v: (B, K, T, d) after rotation → all keys and values so far, (B, K, S, d)."""
        ...


@dataclass(frozen=True)
class ComputeOptions:
    """How a model computes. Only dropout changes what it computes, in training; no choice changes its state dict.

    Attributes:
        attention: a key of `attention.ATTENTION`, or a function as described there.
        loss: a key of `loss.LOSSES`.
        recompute: whether the backward pass computes each layer's activations again (Chen et al. 2016,
            arXiv:1604.06174).
        sparse_embedding: whether the embedding's gradient holds only the rows that were looked up, in a tied model,
            where the head's gradient, to which it is added, covers all.
        dropout: what blocks call with the output of each branch; see `dropout.py`.
    """

    attention: str | Attend = "sdpa"
    loss: str = "chunked"
    recompute: bool = False
    sparse_embedding: bool = False
    dropout: Dropout = field(default_factory=Dropout)


class Decoder(nn.Module):
    """Tokens to the last hidden states. A subclass has `embed_tokens`, `layers` and `norm`, and says how to rotate."""

    embed_tokens: nn.Embedding
    layers: nn.ModuleList
    norm: nn.Module

    def __init__(self, options: ComputeOptions) -> None:
        super().__init__()
        self.recompute, self.attention = options.recompute, options.attention

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, (..., T, width), of positions (..., T)."""
        raise NotImplementedError

    def forward(
        self, input_ids: Tensor, positions: Tensor | None = None, document_ids: Tensor | Documents | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:  # fmt: skip
        """Hidden states after the last norm, (B, T, D).

        Args:
            input_ids: (B, T).
            positions: (B, T) or (T,); unless given counted from the start of each document.
            document_ids: (B, T), best on the host, or made of them; where given, attention stops at document borders.
            cache: keys and values of earlier positions.
        """
        x = self.embed_tokens(input_ids)
        device = x.device.type
        if torch.is_autocast_enabled(device):
            # Autocast leaves embeddings in fp32, which would keep the whole residual stream there.
            x = x.to(torch.get_autocast_dtype(device))
        mask = None if cache is None else cache.mask
        if document_ids is not None:
            documents = document_ids
            if isinstance(documents, Tensor):
                documents = Documents.of(self.attention, documents, x.device, x.dtype)
            positions, mask = documents.positions if positions is None else positions, documents.mask
        if positions is None:
            positions = torch.arange(input_ids.shape[1], device=x.device)
        # (T, d) or (B, T, d) → (1 or B, 1, T, d): one angle for all heads.
        cos, sin = (angle.reshape(-1, 1, *angle.shape[-2:]) for angle in self.rotation(positions))
        for layer in self.layers:
            x = self._run(layer, x, cos, sin, mask, cache)
        return self.norm(x)

    def _run(self, layer: nn.Module, *args: Any) -> Tensor:
        if not torch.is_grad_enabled():
            # Not the compiled layer: evaluation and samples come in many shapes, and each would be compiled.
            return layer._call_impl(*args)  # type: ignore[return-value]
        if not self.recompute:
            return layer(*args)
        # Dropout follows from keys, so no state of a generator would have to be restored.
        out = checkpoint(layer, *args, use_reentrant=False, preserve_rng_state=False)
        assert isinstance(out, Tensor)
        return out


class TiedHead(nn.Module):
    """Stands where an untied model has its `lm_head`; it has no parameters, for the head is the embedding itself."""

    def __init__(self, config: ModelConfig, embedding: str) -> None:
        super().__init__()
        self.shape, self.embedding = (config.hidden_size, config.vocab_size), embedding

    def extra_repr(self) -> str:
        return f"in_features={self.shape[0]}, out_features={self.shape[1]}, bias=False, weight={self.embedding}"


class CausalLM(nn.Module):
    """A decoder with its head. When tied there is one tensor, under the embedding's name.

    A subclass says which decoder it has, and the name of it in the state dict.
    """

    decoder_class: ClassVar[Callable[[ModelConfig, ComputeOptions], Decoder]]
    decoder_name: ClassVar[str]
    lm_head: nn.Module
    # Projections that write into the residual stream, by the end of their names: they start smaller, see `initialise`.
    residual_projections: ClassVar[tuple[str, ...]] = ("o_proj.weight", "down_proj.weight")

    def __init__(self, config: ModelConfig, options: ComputeOptions) -> None:
        super().__init__()
        self.config, self.options = config, options
        self._loss = choose_loss(options.loss)
        self.add_module(self.decoder_name, type(self).decoder_class(config, options))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            names = (name for name, p in self.decoder.named_parameters() if p is self.decoder.embed_tokens.weight)
            self.lm_head = TiedHead(config, next(names))

    @property
    def decoder(self) -> Decoder:
        """Everything below the head."""
        return getattr(self, self.decoder_name)

    @property
    def output_weight(self) -> Tensor:
        """The matrix of the head, (V, D)."""
        return self.lm_head.weight if isinstance(self.lm_head, nn.Linear) else self.decoder.embed_tokens.weight

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., D)."""
        return F.linear(hidden, self.output_weight)

    def forward(self, input_ids: Tensor, **options: Any) -> Tensor:
        """Logits (B, T, V); arguments as of `Decoder.forward`."""
        return self.head(self.decoder(input_ids, **options))

    def loss(
        self, inputs: Tensor, targets: Tensor, *, document_ids: Tensor | Documents | None = None, scale: float = 1.0,
        z_weight: float = 0.0,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The loss to differentiate and the loss to report, without ever storing the logits as a whole.

        Args:
            inputs: (B, T) token ids.
            targets: (B, T) ids of the next tokens, `loss.IGNORE` where a position does not count.
            document_ids: (B, T), best on the host, or made of them; where given, attention stops at document borders
                and positions restart there.
            scale: 1 / tokens of the global batch, so that gradients of micro-batches and ranks add up to the mean.
            z_weight: weight of the z-loss.

        Returns:
            `scale` times the sum of cross-entropies and z-losses, (); the sum of cross-entropies in nats, no gradient.
        """
        hidden, targets = self.decoder(inputs, document_ids=document_ids).flatten(0, 1), targets.flatten()
        if hidden.device.type == "cpu":  # elsewhere a shape that depends on the data makes the host wait
            hidden, targets = without_ignored(hidden, targets)
        compute = self._loss if torch.is_grad_enabled() else evaluation_loss
        return compute(hidden, self.output_weight, targets, scale=scale, z_weight=z_weight)

    def hidden_matrices(self) -> set[str]:
        """Names of the matrices that map hidden states to hidden states: all but embedding and head."""
        inside = {id(parameter) for parameter in self.decoder.layers.parameters()}
        return {name for name, p in self.named_parameters() if id(p) in inside and p.dim() >= 2}

    def compile_training(self) -> None:
        """Compile the block that all layers share and the loss of a chunk, for the one shape that training has.

        The whole model would take a minute instead of seconds and, on a CPU, would not run faster.
        """
        for layer in self.decoder.layers:
            layer.compile(dynamic=False)
        self._loss = choose_loss(self.options.loss, compiled=True)

    def uncompile(self) -> None:
        """Undo `compile_training`, where the machine cannot compile."""
        for layer in self.decoder.layers:
            layer._compiled_call_impl = None
        self._loss = choose_loss(self.options.loss)


@dataclass(frozen=True)
class Architecture:
    """What the rest of smolforge needs to know of an architecture and cannot read from its module tree."""

    name: str
    label: str  # for people, before the word "model"
    model_type: str  # of config.json; transformers' own only where transformers computes the same
    class_name: str  # the only entry of `architectures` in config.json
    build: Callable[[ModelConfig, ComputeOptions], CausalLM]
    # Raises BadInput, naming the key, for a configuration that it cannot have.
    check: Callable[[ModelConfig], None] = lambda config: None
    # config.json of a model, without the type of its weights and its special tokens.
    to_hf: Callable[[ModelConfig], dict[str, Any]] = hf_config.llama_keys
    # The fields of a ModelConfig from config.json; raises BadInput, naming the key, for what it cannot have.
    from_hf: Callable[[dict[str, Any]], dict[str, Any]] = hf_config.llama_fields
    in_transformers: bool = False  # transformers and vLLM load its checkpoints
    gguf: str | None = None  # llama.cpp's name for it, None where llama.cpp does not have it
    fast_decoding: bool = False  # the decoding kernels compute exactly it; another decodes with its own module
    note: str = ""  # a paragraph of Markdown for the model card


_REGISTRY: dict[str, Architecture] = {}


def register(architecture: Architecture) -> None:
    """Make an architecture known; its file calls this when it is imported."""
    _REGISTRY[architecture.name] = architecture


def architectures() -> dict[str, Architecture]:
    """All architectures by name: those of the files in this folder, and those registered elsewhere."""
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return _REGISTRY


def architecture_of(config: ModelConfig) -> Architecture:
    """The architecture of a configuration; raises BadInput where it is unknown or cannot have this shape."""
    found = architectures().get(config.architecture)
    if found is None:
        raise unknown("architecture", config.architecture, architectures(), field="model.architecture")
    found.check(config)
    return found


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """config.json of a model, without the type of its weights and its special tokens."""
    architecture = architecture_of(config)
    names = {"architectures": [architecture.class_name], "model_type": architecture.model_type}
    return {**architecture.to_hf(config), **names}


def config_from_hf(values: dict[str, Any]) -> ModelConfig:
    """The configuration that a config.json describes; raises BadInput, naming the key, where smolforge has no such."""
    known = {architecture.model_type: architecture for architecture in architectures().values()}
    model_type, classes = values.get("model_type"), values.get("architectures")
    if not isinstance(model_type, str) or model_type not in known:
        raise hf_config.unsupported("model_type", model_type, f"Supported: {', '.join(known)}.")
    found = known[model_type]
    if classes is not None and classes != [found.class_name]:
        raise hf_config.unsupported("architectures", classes, f"Supported: {found.class_name}.")
    try:
        config = ModelConfig(architecture=found.name, **found.from_hf(values))
    except ValidationError as error:
        raise first_problem(error) from None
    found.check(config)
    return config


class _WithoutInitialisation(TorchFunctionMode):
    """Modules without torch's own first weights: drawing them on the meta device imports torch.compile, for 2 s."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


@torch.no_grad()
def initialise(model: CausalLM, seed: int) -> None:
    """Fill all parameters in place; equal seeds give equal weights whatever was drawn before.

    Matrices and the embedding are normal with `initializer_range`; the projections that write into the residual stream
    are scaled by 1 / sqrt(2 L), so that its variance does not grow with depth (Radford et al. 2019, GPT-2).
    """
    generator = torch.Generator().manual_seed(seed)
    std, layers = model.config.initializer_range, model.config.num_hidden_layers
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            local_rows(parameter)[0].fill_(0.0 if name.endswith("bias") else 1.0)  # else the weight of a norm
            continue
        scale = std / (2 * layers) ** 0.5 if name.endswith(model.residual_projections) else std
        # Drawn on the CPU, so that a seed means the same weights on every device.
        copy_whole(parameter, torch.randn(parameter.shape, generator=generator) * scale)


def build_model(
    config: ModelConfig,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int | None = 0,
    compile: bool = False,
    dropout: float = 0.0,
    shard: Callable[[CausalLM], None] | None = None,
    **options: Any,
) -> CausalLM:
    """The model of `config`, with new weights of `seed`, or with memory not yet filled where `seed` is None.

    `device="meta"` with `seed=None` takes no memory. `compile` is whether to call `compile_training`, `dropout` is the
    rate, and `options` are the other fields of `ComputeOptions`. `shard` divides the parameters among ranks while they
    have no memory yet.

    Raises:
        BadInput: there is no such architecture, attention or loss, or the architecture cannot have this shape.
    """
    architecture = architecture_of(config)
    with torch.device("meta"), _WithoutInitialisation():
        model = architecture.build(config, ComputeOptions(**options, dropout=Dropout(dropout)))
    model = model.to(dtype)
    if shard is not None:
        shard(model)
    if str(device) != "meta":
        model = model.to_empty(device=device)
    if seed is not None:
        initialise(model, seed)
    if compile:
        model.compile_training()
    return model
