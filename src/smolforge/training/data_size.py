"""How much text a run has, and how often it reads it: told in one line before the first step; length in epochs.

Files, documents and bytes are those of the index; of parquet and `tales` the bytes are estimated. The tokens are
estimated from samples of the text.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from smolforge.config import RunConfig
from smolforge.data import Corpus
from smolforge.distributed import DistributedContext
from smolforge.formatting import count, plural, size
from smolforge.tokenizer import Tokenizer
from smolforge.training.recipe import resolve_batch

logger = logging.getLogger(__name__)

SAMPLES = 8  # places of a source that are looked at
SAMPLE_CHARACTERS = 32 << 10  # in each of them
BYTES_PER_TOKEN = 4.0  # of English text, before there is a tokenizer
SHOWN = 6  # sources whose epochs are told


@dataclass(frozen=True)
class SourceSize:
    """The size of a source; `tokens` is an estimate."""

    name: str
    files: int
    documents: int
    bytes: int
    tokens: int


def measure(corpus: Corpus, tokenizer: Tokenizer | None) -> list[SourceSize]:
    """The size of each source; without a tokenizer a token is taken for `BYTES_PER_TOKEN`."""
    sizes = []
    for number, entry in enumerate(corpus.index["sources"]):
        shards, sample = entry["shards"], _sample(corpus, number)
        tokens_per_byte = 1 / BYTES_PER_TOKEN
        if tokenizer is not None and sample:
            tokens_per_byte = sum(map(len, tokenizer.encode_batch(sample))) / _bytes(sample)
        documents = sum(shard.get("documents", sum(rows for rows, *_ in shard["groups"])) for shard in shards)
        known = sum(shard.get("text_bytes", sum(group[1] for group in shard["groups"])) for shard in shards)
        text = known or round(_bytes(sample) / max(len(sample), 1) * documents)
        sizes.append(
            SourceSize(corpus.specs[number], len(shards), documents, text, round(text * tokens_per_byte) + documents)
        )
    return sizes


def _bytes(texts: Sequence[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def _sample(corpus: Corpus, source: int) -> list[str]:
    """Texts from places all over a source; of a remote one from its beginning."""
    ranges = corpus.orders[source].ranges
    places = {0} if corpus.remote else {len(ranges) * i // SAMPLES for i in range(SAMPLES)}
    found = []
    for place in sorted(places):
        rows, seen = corpus.read(source, ranges[place]), 0
        for number in range(ranges[place].rows):
            text = rows(number).text
            if text.strip():
                found.append(text[:SAMPLE_CHARACTERS] if len(text) > 2 * SAMPLE_CHARACTERS else text)
                seen += len(text)
            if seen >= SAMPLE_CHARACTERS:
                break
    return found


def resolve_epochs(
    config: RunConfig, corpus: Corpus, tokenizer: Tokenizer, ranks: DistributedContext, device: torch.device
) -> tuple[RunConfig, float]:
    """Tell the size of the text; `config`, with batch and steps where epochs are given, and the most epochs read."""
    sizes = ranks.broadcast(measure(corpus, tokenizer) if ranks.is_main else None)
    if config.training.steps is None and config.training.epochs is not None:
        one = config.with_keys("training", steps=1, tokens_per_step=config.data.sequence_length)
        tokens = config.training.epochs / max(epochs(sizes, one)) * one.tokens_per_step
        batch = resolve_batch(config.with_keys("training", tokens=round(tokens), epochs=None), device).tokens_per_step
        if config.training.tokens_per_step is None:  # processes were started before anybody knew how short the text is
            batch = max(batch, ranks.world_size * config.data.sequence_length)
        config = config.with_keys("training", tokens_per_step=batch, steps=max(round(tokens / batch), 1))
    if ranks.is_main:
        tell_size(sizes, config)
    return config, max(epochs(sizes, config))


def epochs(sizes: Sequence[SourceSize], config: RunConfig) -> list[float]:
    """How often a run of this length reads each source."""
    weights, tokens = config.data.sources, config.total_steps * config.tokens_per_step
    shares = (weights[source.name] / sum(weights.values()) for source in sizes)
    kept = 1 - config.data.holdout
    return [tokens * share / max(source.tokens * kept, 1) for source, share in zip(sizes, shares, strict=True)]


def tell_size(sizes: Sequence[SourceSize], config: RunConfig) -> None:
    """One line: the text there is, and how often the run reads it."""
    files, documents, text, tokens = (
        sum(getattr(source, name) for source in sizes) for name in ("files", "documents", "bytes", "tokens")
    )
    read = epochs(sizes, config)
    reads = f"{_times(read[0])} epochs ({plural(config.total_steps, 'step')})"
    if len(sizes) > 1:
        named = (f"{Path(s.name).name} {_times(e)}" for s, e in zip(sizes[:SHOWN], read, strict=False))
        reads = f"of its sources, by weight, these epochs: {', '.join(named)}{', …' if len(sizes) > SHOWN else ''}"
    found = f"{plural(files, 'file')}, {size(text)} of text, {plural(documents, 'document')}"
    logger.info(f"data: {found}, about {count(tokens)} tokens; this run reads {reads}")


def _times(read: float) -> str:
    return "less than 0.01" if read < 0.01 else f"{read:.2g}"
