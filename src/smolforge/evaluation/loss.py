"""How well a model predicts text: loss, perplexity and bits per byte on a tokenized evaluation set.

Each document is scored by itself, from one EOS to the next, so a score does not depend on the documents before it.
Short documents share a window, separated by borders that attention does not cross; a long one continues in further
windows. Bits per byte are the bits of all predicted tokens, EOS included, divided by the UTF-8 bytes of the text: they
compare models with different tokenizers, and a model with the entropy of its source.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from smolforge.config import DataConfig, build_config
from smolforge.data import Corpus
from smolforge.data.holdout import Holdout
from smolforge.devices import sum_type
from smolforge.distributed import DistributedContext
from smolforge.errors import BadInput, DataError
from smolforge.generation.runners import Runner
from smolforge.generation.scheduler import CHUNK
from smolforge.generation.sequence import ScheduledChunk
from smolforge.model.architecture import CausalLM
from smolforge.model.loss import IGNORE
from smolforge.run import Run
from smolforge.tokenizer import Tokenizer

LONGEST = 2048  # context in tokens unless another is given


@dataclass(frozen=True)
class EvalSlice:
    """A tokenized evaluation set.

    The first token is only context, that of every document: what the tokenizer begins a text with (BOS), or an EOS.
    """

    tokens: np.ndarray  # int32 (n,)
    n_bytes: int  # in UTF-8, of the text behind the predicted tokens
    documents: int  # the last one may be truncated
    eos_id: int  # what each document ends with

    def windows(self, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Inputs, targets (`IGNORE` where nothing is predicted) and the part of the window a position is in, (W, L).

        A document begins as a prompt does: after the tokenizer's BOS, or where it has none at position 0, and the EOS
        that its first token is predicted from is a part of its own.
        """
        begin = self.tokens[0]
        ends = np.flatnonzero(self.tokens[1:] == self.eos_id) + 1
        bounds = [0, *ends.tolist()]
        if bounds[-1] < len(self.tokens) - 1:
            bounds.append(len(self.tokens) - 1)
        spans = []  # (window, column, first token, count, whether the document begins here)
        window, column = 0, 0
        for start, end in pairwise(bounds):
            if column and end - start > length - column:
                window, column = window + 1, 0
            for first in range(start, end, length):
                count = min(length, end - first)
                spans.append((window, column, first, count, first == start))
                window, column = (window + 1, 0) if column + count == length else (window, column + count)
        shape = (spans[-1][0] + 1, length)
        inputs, targets = np.zeros(shape, dtype=np.int64), np.full(shape, IGNORE, dtype=np.int64)
        parts = np.zeros(shape, dtype=np.int64)
        for number, (row, column, first, count, opens) in enumerate(spans, start=1):
            place = slice(column, column + count)
            inputs[row, place] = self.tokens[first : first + count]
            targets[row, place] = self.tokens[first + 1 : first + count + 1]
            parts[row, place] = 2 * number
            if opens:
                inputs[row, column] = begin
                parts[row, column] -= begin == self.eos_id
        return inputs, targets, parts


@dataclass(frozen=True)
class AnswerSlice(EvalSlice):
    """Held-out answers: `tokens` are an EOS and all that is predicted, `packed` the windows with their questions."""

    packed: tuple[np.ndarray, np.ndarray, np.ndarray]

    def windows(self, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.packed


@dataclass(frozen=True)
class Score:
    """The scores of a model on an evaluation set. `loss` is in nats per token."""

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    n_bytes: int
    documents: int


def tokenize_eval_set(
    texts: Iterable[str | tuple[str, bool]], tokenizer: Tokenizer, max_tokens: int | None = None
) -> EvalSlice:
    """Tokenize texts until `max_tokens` are reached; the last document is truncated there.

    Args:
        texts: documents, or pieces of them, each with whether it ends its document.

    Raises:
        DataError: the texts are empty.
    """
    pieces: list[list[int]] = [[*tokenizer.prefix_ids, tokenizer.eos_id][:1]]
    count = n_bytes = documents = 0
    inside = False  # a document
    for item in texts:
        text, ends = (item, True) if isinstance(item, str) else item
        ids = [*tokenizer.encode(text), *([tokenizer.eos_id] if ends else [])]
        whole = max_tokens is None or count + len(ids) <= max_tokens
        if not whole:
            ids = ids[: max_tokens - count]  # type: ignore[operator]
        pieces.append(ids)
        count += len(ids)
        documents, inside = documents + (not inside), not ends
        n_bytes += len(text.encode()) if whole else sum(len(tokenizer.token_bytes(i)) for i in ids)
        if max_tokens is not None and count >= max_tokens:
            break
    if not n_bytes:
        raise DataError("there is no text to evaluate on", hint="The source is empty, or no document is held out.")
    tokens = np.concatenate([np.asarray(p, dtype=np.int32) for p in pieces])
    return EvalSlice(tokens, n_bytes, documents, tokenizer.eos_id)


def evaluate(
    model: CausalLM, piece: EvalSlice, *, length: int, batch: int = 1, device: torch.device | str = "cpu",
    context: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
    ranks: DistributedContext | None = None, between: Callable[[], None] = lambda: None,
) -> Score:  # fmt: skip
    """Score `model` on a slice, the windows divided among the ranks.

    Args:
        length: positions in a window; context is never longer.
        batch: windows at a time, always the same shape, so that nothing is compiled again.
        context: what the forward pass runs in, such as autocast.
        between: called between batches; it may raise to stop.
    """
    ranks = ranks or DistributedContext()
    nats = torch.zeros((), dtype=sum_type(torch.device(device)), device=device)
    was_training = model.training
    model.eval()
    try:
        with ranks.together(), torch.no_grad():
            inputs, targets, documents = piece.windows(length)
            mine = range(ranks.rank, len(inputs), ranks.world_size)
            # As many batches on each rank, because a forward pass of a sharded model is one of all ranks.
            for start in range(0, -(-len(inputs) // ranks.world_size), batch):
                between()
                rows = list(mine[start : start + batch])
                missing = ((0, batch - len(rows)), (0, 0))
                x, y, ids = (
                    torch.from_numpy(np.pad(array[rows], missing, constant_values=fill)).to(device)
                    for array, fill in ((inputs, 0), (targets, IGNORE), (documents, 0))
                )
                with context():
                    nats += model.loss(x, y, document_ids=ids)[1]
    finally:
        model.train(was_training)
    return _score(sum(ranks.all_gather(float(nats))), piece)


def evaluate_runner(runner: Runner, piece: EvalSlice, *, length: int) -> Score:
    """The same score of a runner: weights, keys and values in the precision that serving uses."""
    nats = 0.0
    for tokens, targets, documents in zip(*piece.windows(length), strict=True):
        for document in np.unique(documents[targets != IGNORE]):
            (rows,) = np.nonzero((documents == document) & (targets != IGNORE))
            cache = runner.new_cache(len(rows))
            for start in range(0, len(rows), CHUNK):
                part = rows[start : start + CHUNK]
                logits = runner.forward([ScheduledChunk(cache, tokens[part].tolist(), start, len(part))])
                wanted = torch.from_numpy(targets[part].astype(np.int64))
                nats += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
    return _score(nats, piece)


def _score(total: float, piece: EvalSlice) -> Score:
    """The score for so many nats of all that was predicted."""
    predicted = len(piece.tokens) - 1
    loss = total / predicted
    bits_per_byte = total / math.log(2) / piece.n_bytes
    return Score(loss, math.exp(min(loss, 700.0)), bits_per_byte, predicted, piece.n_bytes, piece.documents)


@dataclass(frozen=True)
class SourceScore:
    """A score, the text that was scored, the length of its windows, and the entropy of the source where it is known."""

    score: Score
    text: EvalSlice
    length: int
    entropy_bits_per_byte: float | None


HeldOut = tuple[DataConfig, Holdout]  # how a run reads text, and which of it training never sees


def held_out_by(run: Run | None) -> HeldOut | None:
    """What a run held out of all its sources; None without a run, or for one that did not train on text."""
    if run is None or (config := build_config(str(run.config_path)).data).format != "text":
        return None
    with Corpus.open(config, index=run.read_index(), cache_dir=run.path / "cache") as corpus:
        return config, corpus.holdout


def score_sources(
    model: CausalLM, tokenizer: Tokenizer, sources: dict[str, float], *,
    tokens: int, length: int | None = None, held_out: bool = False, trained: HeldOut | None = None,
    text_column: str | None = None,
) -> SourceScore:  # fmt: skip
    """Score the mixture of some sources by their weights; rows that cannot be read are told and left out.

    Args:
        tokens: maximum number of tokens to score.
        length: context in tokens; the model's, at most `LONGEST`, unless given.
        held_out: only the documents that training never sees.
        trained: of the run that made the model, with `held_out`; without, the defaults decide what is held out.
        text_column: that of `trained`, or "text", unless given.

    Raises:
        DataError: a source is missing or has no text.
        BadInput: the model has no context of that length.
    """
    positions = model.config.max_position_embeddings
    length = min(positions, LONGEST) if length is None else length
    if not 1 <= length <= positions:
        raise BadInput(f"{length} does not fit the model's {positions} positions", field="length")
    config = DataConfig(sources=sources, on_error="skip")
    if trained is not None:
        config = trained[0].model_copy(update={"sources": sources, "on_error": "skip"})
    if text_column is not None:
        config = config.model_copy(update={"text_column": text_column})
    with Corpus.open(config) as corpus:
        if trained is not None:
            corpus.holdout = trained[1]
        texts = corpus.parts(held_out=True if held_out else None)
        text, entropy = tokenize_eval_set(texts, tokenizer, tokens), corpus.entropy_bits_per_byte
    windows = -(-(len(text.tokens) - 1) // length)
    length = min(length, len(text.tokens) - 1)
    return SourceScore(evaluate(model, text, length=length, batch=min(4, windows)), text, length, entropy)
