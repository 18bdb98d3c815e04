"""What is decided and opened before there is a model: plan, length of the run, data, tokenizer, held-out text."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from smolforge.checkpoint import format
from smolforge.config import RunConfig
from smolforge.data import Corpus
from smolforge.data.holdout import none_chosen
from smolforge.distributed import DistributedContext
from smolforge.errors import DataError
from smolforge.evaluation import EvalSlice, tokenize_eval_set
from smolforge.run import Run
from smolforge.tokenizer import Tokenizer
from smolforge.training import finetuning
from smolforge.training.data_size import resolve_epochs
from smolforge.training.optim import check_optimizer
from smolforge.training.plan import Plan, make_plan
from smolforge.training.recipe import resolve_batch, resolve_recipe
from smolforge.training.run_data import open_corpus
from smolforge.training.small_corpus import resolve_small_corpus

if TYPE_CHECKING:
    from smolforge.training.setup import TrainRequest

logger = logging.getLogger(__name__)


@dataclass
class Prepared:
    """What is decided and opened before there is a model."""

    config: RunConfig
    plan: Plan
    corpus: Corpus
    tokenizer: Tokenizer
    eval_set: EvalSlice | None


def prepare(
    request: TrainRequest, run: Run, config: RunConfig, newest: Path | None, ranks: DistributedContext,
    device: torch.device,
) -> Prepared:  # fmt: skip
    """Decide the plan and the length, and open data, tokenizer and held-out text."""
    check_optimizer(config.optimizer.name)
    in_epochs = config.training.steps is None and config.training.epochs is not None
    batched = resolve_batch(config, device)
    # What this machine cannot do is refused before data is opened, on which the run's length may depend.
    make_plan(resolve_recipe(batched)[0], device, ranks.world_size, local=ranks.local_size)
    config = config if in_epochs and config.data.format == "text" else batched
    epochs = 0.0  # through text, by a run that begins
    corpus = open_corpus(run, config, newest, ranks, request.index, accept_changes=request.accept_changed_data)
    tokenizer = _open_tokenizer(config, corpus, run, newest, ranks, request.tokenizer)
    if newest is None or in_epochs:
        if config.data.format == "text":
            config, epochs = resolve_epochs(config, corpus, tokenizer, ranks, device)
        else:
            config = finetuning.resolve_chat(config, corpus, tokenizer, ranks)
    derived, recipe = resolve_recipe(config)
    config, small = resolve_small_corpus(config, derived, epochs, alone=ranks.world_size == 1)
    plan = make_plan(config, device, ranks.world_size, local=ranks.local_size)
    plan.reasons.extend([*recipe, *small])
    return Prepared(config, plan, corpus, tokenizer, _open_eval_set(config, corpus, tokenizer))


def train_tokenizer(config: RunConfig, corpus: Corpus, directory: Path) -> None:
    """Train the tokenizer that a configuration asks for on the first texts of its corpus, and save it."""
    assert not isinstance(config.tokenizer, str)
    wanted, longest = config.tokenizer.train, config.model.max_position_embeddings
    logger.info(f"tokenizer: training {wanted.vocab_size:,} tokens on {wanted.documents:,} documents")
    texts = islice(corpus.texts(held_out=False), wanted.documents)
    Tokenizer.train(texts, wanted.vocab_size).save(directory, max_length=longest)


def _open_tokenizer(
    config: RunConfig, corpus: Corpus, run: Run, newest: Path | None, ranks: DistributedContext, made: str | None
) -> Tokenizer:
    """The run's tokenizer: the checkpoint's, a named one, the one trained earlier, or one trained now."""
    source = newest or config.tokenizer
    if not isinstance(source, (Path, str)):
        source = run.path / "tokenizer"
        if ranks.is_main and not (source / "tokenizer.json").is_file():
            if made:
                shutil.copytree(made, source, dirs_exist_ok=True)
            else:
                train_tokenizer(config, corpus, source)
        ranks.barrier()
    tokenizer = Tokenizer.from_pretrained(source)
    if config.data.format != "text":
        tokenizer = finetuning.with_chat_template(tokenizer)
    format.check_vocabulary(config.model, tokenizer)
    return tokenizer


def _open_eval_set(config: RunConfig, corpus: Corpus, tokenizer: Tokenizer) -> EvalSlice | None:
    if not config.data.holdout or config.data.format == "preferences":
        return None
    if config.data.format == "chat":
        return finetuning.answers_eval_set(config, corpus, tokenizer)
    try:
        return tokenize_eval_set(corpus.texts(held_out=True), tokenizer, config.evaluation.tokens)
    except DataError:
        documents = sum(1 for _ in corpus.documents())
        raise none_chosen(f"{documents:,} documents", "train") from None
