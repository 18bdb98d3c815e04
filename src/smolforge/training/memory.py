"""How much memory a step needs, estimated from shapes alone: the same machine and configuration plan the same again."""

from __future__ import annotations

from smolforge.config import RunConfig
from smolforge.model.summary import activations_per_token, summarise
from smolforge.training.precision import Precision

PROCESS = 500_000_000  # bytes of Python and torch before there is a model: an allowance, not a measurement
LOSS_CHUNK = 1024  # tokens whose logits exist at a time


def estimate(config: RunConfig, precision: Precision, micro_batch: int, *, recompute: bool) -> int:
    """Peak bytes of one rank's training step; a plan, not a promise.

    Args:
        micro_batch: sequences in one forward pass.
        recompute: whether only the inputs of layers are kept.
    """
    model = config.model
    stored, used = precision.weights.itemsize, (precision.autocast or precision.weights).itemsize
    # Weights, gradients and two moments; under autocast a narrow copy of the weights as well.
    state = summarise(model, config.data.sequence_length).parameters * (4 * stored + (used if used != stored else 0))
    tokens = micro_batch * config.data.sequence_length
    layer = tokens * activations_per_token(model) * used
    entry = tokens * model.hidden_size * used
    layers = model.num_hidden_layers
    activations = layers * entry + layer if recompute else layers * layer
    # Logits of a chunk, their wide copy and their gradient; `full` holds those of all tokens.
    rows = tokens if config.training.loss == "full" else min(tokens, LOSS_CHUNK)
    head = rows * model.vocab_size * (2 * used + 8)
    return PROCESS + state + activations + head
