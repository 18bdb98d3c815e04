"""The model of a run: new weights, those of `init`, or those of `init` with an adapter beside them."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import torch

from smolforge.checkpoint import commit, format, locate, weights
from smolforge.checkpoint.adapter import read_adapter
from smolforge.checkpoint.card import optimizer_of
from smolforge.config import RunConfig
from smolforge.distributed import copy_whole
from smolforge.errors import BadInput, CheckpointError
from smolforge.formatting import typed
from smolforge.model.architecture import CausalLM, build_model
from smolforge.model.lora import adapter_state, add_adapter
from smolforge.training.parallel import shard_model
from smolforge.training.plan import Plan

logger = logging.getLogger(__name__)


def build_run_model(config: RunConfig, plan: Plan, newest: Path | None, *, with_init: bool) -> CausalLM:
    """The model with new weights or, `with_init`, those of `init`; else unfilled, for a checkpoint to restore.

    Beside an adapter the model's own weights are those of `init` at all times, in the precision that the run computes
    in: they do not change, so nothing is lost by rounding them once instead of in each step.
    """
    lora = config.lora.r > 0
    options = plan.model_options
    if lora:
        options |= {"dtype": plan.precision.products, "sparse_embedding": False}
    if plan.shards > 1:
        options |= {"shard": partial(shard_model, device=plan.device, precision=plan.precision, shards=plan.shards)}
    model = build_model(
        config.model,
        seed=config.training.seed if newest is None and config.init is None else None,
        dropout=config.training.dropout,
        **options,
    )
    if config.init is not None and (with_init or lora):
        load_weights(model, directory := locate.resolve_model(config.init))
        if config.optimizer.name == "muon" and not lora and (made := optimizer_of(directory) or "adamw") != "muon":
            logger.warning(
                f"optimizer: {made} made these weights, and muon learns worse from those than adamw does "
                "(arXiv:2605.10468); --set optimizer.name=adamw"
            )
        logger.info(f"weights and tokenizer: from {typed(config.init)}")
    count = sum(p.numel() for p in model.parameters())
    logger.info(f"model: {config.model.architecture}, {count:,} parameters, {config.model.num_hidden_layers} layers")
    if lora:
        add_adapter(model, config.lora, seed=config.training.seed)
        own = sum(tensor.numel() for tensor in adapter_state(model).values())
        logger.info(f"lora: rank {config.lora.r}, alpha {config.lora.lora_alpha:g}: {own:,} parameters learn")
    return model


def load_weights(model: CausalLM, directory: Path) -> None:
    """Copy the weights of a model directory into `model`; CheckpointError where they are damaged or do not fit."""
    own = format.read_config(directory)
    shape = model.config.model_copy(update={"vocab_size": min(own.vocab_size, model.config.vocab_size)})
    found = format.check_weights(shape, weights.read_weights(directory), str(directory))
    for name, parameter in model.named_parameters():
        rows = found[name]
        if missing := len(parameter) - len(rows):
            # New tokens begin as the mean of the others: a token that was never trained must not stand out.
            rows = torch.cat((rows, rows.mean(0, keepdim=True).expand(missing, -1)))
        copy_whole(parameter, rows)


def load_adapter(model: CausalLM, directory: Path) -> None:
    """Copy an adapter into that of `model`; CheckpointError where it is damaged or of another shape."""
    found, own = read_adapter(directory).tensors, adapter_state(model)
    if different := sorted(found.keys() ^ own.keys()):
        raise CheckpointError(f"the adapter does not fit the run at {different[0]}", field=str(directory))
    for name, tensor in own.items():
        tensor.copy_(found[name])


def base_digest(config: RunConfig) -> str | None:
    """Hash of the weights that an adapter learns beside; None where every weight learns."""
    if not config.lora.r or config.init is None:
        return None
    files = weights.weight_files(locate.resolve_model(config.init))
    return " ".join(str(commit.describe_file(path)["sha256"]) for path in files)


def check_base(config: RunConfig, saved: str | None, found: str | None) -> None:
    """Refuse to continue an adapter beside other weights than it learned beside; CheckpointError where they changed."""
    if saved != found:
        raise CheckpointError(
            f"{config.init} has other weights than when the run started, and the adapter belongs to those",
            field="init",
            hint="Put them back; if it is a run that was trained on, name the checkpoint of then. --fresh starts over.",
        )


def check_adapter(config: RunConfig, rows: int) -> None:
    """Refuse an adapter for a model with fewer than `rows` rows of the embedding: the new ones would never learn."""
    if config.lora.r and rows < config.model.vocab_size:
        raise BadInput(
            f"{config.init} has no rows for {config.model.vocab_size - rows} special tokens of the chat template, and "
            "an adapter leaves the embedding as it is",
            field="lora.r",
            hint="Tune every weight (without --lora), or start from a model that has these tokens.",
        )
