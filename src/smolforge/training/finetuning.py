"""What a run on chat data needs besides: its length in epochs, what is learned, held-out answers, and ChatML.

Everything is decided before the first step and kept in the run's configuration, so a resumed run does not look at its
data again.
"""

from __future__ import annotations

import json
import logging
import math

import numpy as np
import torch
from torch import Tensor

from smolforge.chat_template import CHATML, CHATML_TOKENS, ChatTemplate
from smolforge.config import ModelConfig, RunConfig
from smolforge.data import Batch, Corpus
from smolforge.data.conversations import ChatEncoder, encoded, held_out_windows, show_learned, survey
from smolforge.data.holdout import none_chosen
from smolforge.devices import to_device
from smolforge.distributed import DistributedContext
from smolforge.errors import BadInput
from smolforge.evaluation.loss import AnswerSlice
from smolforge.formatting import plural
from smolforge.model.loss import IGNORE
from smolforge.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

QUESTIONS = 3  # held-out questions that are answered through time
SHOWN = 1200  # characters of the example
FEW_STEPS = 20  # below which a longer run is advised


def with_chat_template(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer, with ChatML and its special tokens where it has no chat template.

    Its end-of-text token becomes the one that ends the assistant's turn, since that is where generating has to stop.
    """
    if tokenizer.chat_template is None:
        tokenizer.backend.add_special_tokens(list(CHATML_TOKENS))
        config = {**tokenizer.config, "chat_template": CHATML, "eos_token": CHATML_TOKENS[1]}
        return Tokenizer(tokenizer.backend, config)
    probe = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    try:
        ids, answers = ChatTemplate(tokenizer).encode_answers(probe)
    except BadInput:
        return tokenizer  # the first conversation tells what is wrong
    end = next(i for i, answer in zip(reversed(ids), reversed(answers), strict=True) if answer)
    if end == tokenizer.eos_id:
        return tokenizer
    kept = {"bos_token": tokenizer.token_text(tokenizer.bos_id)}
    return Tokenizer(tokenizer.backend, {**kept, **tokenizer.config, "eos_token": tokenizer.token_text(end)})


def with_room(model: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The shape of a model with a row of the embedding for every token."""
    if tokenizer.vocab_size <= model.vocab_size:
        return model
    logger.info(f"embedding: {tokenizer.vocab_size - model.vocab_size} rows more, for new special tokens")
    return model.model_copy(update={"vocab_size": tokenizer.vocab_size})


def resolve_chat(config: RunConfig, corpus: Corpus, tokenizer: Tokenizer, ranks: DistributedContext) -> RunConfig:
    """Look at the conversations: the length of the run in steps, and the questions that are answered through time.

    Raises:
        DataError: there is nothing to learn from, or a conversation cannot be learned from.
    """
    steps, prompts = ranks.broadcast(_look(config, corpus, tokenizer) if ranks.is_main else None)
    config = config.with_keys("training", steps=steps).with_keys("samples", prompts=prompts)
    # Tuning takes minutes, of which each save and each validation costs seconds, and answering more than scoring.
    often = {"evaluation": 6, "checkpoint": 6, "samples": 4}
    for name, times in often.items():
        config = config.with_keys(name, every=getattr(config, name).every or max(config.total_steps // times, 1))
    return config


def _look(config: RunConfig, corpus: Corpus, tokenizer: Tokenizer) -> tuple[int | None, list[str]]:
    if tokenizer.chat_template == CHATML:
        logger.info("chat template: ChatML")
    seen = survey(corpus, tokenizer)
    logger.info(seen.report(config.data))
    steps, epochs = config.training.steps, config.training.epochs
    if steps is None and epochs is not None:
        steps = max(round(epochs * seen.windows / config.sequences_per_step), 1)
        shape = f"{plural(seen.windows, 'window')}, {config.sequences_per_step} in a step"
        logger.info(f"length: {epochs:g} epochs of {shape}: {plural(steps, 'step')}")
        if steps < FEW_STEPS:
            wanted = math.ceil(FEW_STEPS * config.sequences_per_step / seen.windows)
            logger.warning(f"length: so few steps learn little; --epochs {wanted} makes {FEW_STEPS} or more")
    encoder = ChatEncoder(tokenizer, config.data)
    first = next(each for each in encoded(corpus, encoder, held_out=False) if encoder.usable(each))
    logger.info(f"learned, between the marks, of the first conversation:\n{show_learned(first, tokenizer)[:SHOWN]}")
    return steps, config.samples.prompts or _questions(corpus)


def _questions(corpus: Corpus) -> list[str]:
    """The first held-out questions of one turn."""
    found: list[str] = []
    for document in corpus.documents(held_out=True):
        messages = json.loads(document.text)["messages"]
        if len(messages) == 2 and messages[0]["role"] == "user":
            found.append(messages[0]["content"])
        if len(found) == QUESTIONS:
            break
    return found


def answers_eval_set(config: RunConfig, corpus: Corpus, tokenizer: Tokenizer) -> AnswerSlice:
    """The held-out conversations in windows, of which only the answers are scored; BadInput where none is held out."""
    windows = list(held_out_windows(corpus, tokenizer, config.evaluation.tokens))
    if not windows:
        count = sum(1 for _ in corpus.documents())
        raise none_chosen(f"{count:,} conversations", "tune")
    tokens = np.stack([np.concatenate(window.parts) for window in windows]).astype(np.int64)
    learned = np.stack([window.learned for window in windows])
    parts = np.stack([np.repeat(np.arange(len(w.parts)), [len(part) for part in w.parts]) for w in windows])
    targets = np.where(learned[:, 1:], tokens[:, 1:], IGNORE)
    predicted = tokens[learned].astype(np.int32)
    n_bytes = sum(len(tokenizer.token_bytes(int(i))) for i in predicted if int(i) not in tokenizer.special_ids)
    documents = sum(len(window.addresses) for window in windows)
    flat = np.concatenate([[tokenizer.eos_id], predicted]).astype(np.int32)
    return AnswerSlice(flat, n_bytes, documents, tokenizer.eos_id, (tokens[:, :-1], targets, parts[:, :-1]))


def learned_targets(batch: Batch, tokens: Tensor, ranks: DistributedContext) -> tuple[Tensor | None, int | None]:
    """The targets of chat data, (B, T), and how many of the global batch are learned; None where all are."""
    if batch.learned is None:
        return None, None
    with ranks.together():
        learned = np.ascontiguousarray(batch.learned[:, 1:])
        mask = to_device(torch.from_numpy(learned), tokens.device)
    count = sum(ranks.all_gather(int(learned.sum())))
    return tokens[:, 1:].masked_fill(~mask, IGNORE), max(count, 1)
