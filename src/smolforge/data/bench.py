"""`smolforge bench data`: read, tokenize and pack without a model; tokens per second, and per core."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from smolforge.config import DataConfig
from smolforge.data import Corpus
from smolforge.data.loader import Loader
from smolforge.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# SmolLM2-135M at 2,048 positions, bf16, 45% MFU of 989 TFLOP/s: the fastest single GPU that smolforge is planned for.
H200_TOKENS_PER_SECOND = 361_000
SEQUENCES = 16
DOCUMENTS = 4000
VOCABULARY = 4096


def measure(
    sources: Sequence[str] = (), *, tokenizer: str | None = None, seconds: float = 10.0, length: int = 2048
) -> dict[str, Any]:
    """Make batches for some seconds, in the thread that measures.

    Args:
        sources: what to read; a parquet shard of `tales`, written for the purpose, unless given.
        tokenizer: a directory or Hub id; one of 4,096 tokens, trained on the source, unless given.
        length: tokens in a window.
    """
    with contextlib.ExitStack() as stack:
        if not sources:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="smolforge-bench-")))
            logger.info("writing %s documents of tales as parquet", f"{DOCUMENTS:,}")
            sources = [str(_write_tales(folder / "tales.parquet"))]
        config = DataConfig(sources=dict.fromkeys(sources, 1.0), sequence_length=length)
        corpus = stack.enter_context(Corpus.open(config))
        if tokenizer is None:
            logger.info("training a tokenizer of %s tokens", f"{VOCABULARY:,}")
            texts = (document.text for document in islice(corpus.documents(), 1000))
            encoder = Tokenizer.train(texts, VOCABULARY)
        else:
            encoder = Tokenizer.from_pretrained(tokenizer)
        loader = stack.enter_context(Loader(corpus, encoder, sequences_per_step=SEQUENCES, workers=0))
        next(loader)  # opens every lane
        batches = 0
        began, busy = time.perf_counter(), time.process_time()
        while time.perf_counter() - began < seconds:
            batch = next(loader)
            batches += 1
        wall, busy = time.perf_counter() - began, time.process_time() - busy
        n_bytes = len(encoder.decode(batch.tokens[0].tolist()).encode()) / batch.tokens.shape[1]
    tokens = batches * SEQUENCES * length
    per_core = tokens / busy
    return {
        "sources": list(sources),
        "tokenizer": tokenizer or f"trained, {VOCABULARY} tokens",
        "tokens": tokens,
        "tokens_per_second": tokens / wall,
        "tokens_per_core_second": per_core,
        "cores_used": busy / wall,
        "bytes_per_token": n_bytes,
        "h200_tokens_per_second": H200_TOKENS_PER_SECOND,
        "cores_for_an_h200": H200_TOKENS_PER_SECOND / per_core,
    }


def _write_tales(path: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with Corpus.open(DataConfig(sources={"tales": 1.0})) as corpus:
        texts = [document.text for document in islice(corpus.documents(), DOCUMENTS)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=1000)
    return path


def table(result: dict[str, Any]) -> str:
    """The results as text."""
    return (
        f"tokens/s             {result['tokens_per_second']:,.0f} with {result['cores_used']:.1f} cores\n"
        f"a core alone         {result['tokens_per_core_second']:,.0f} ({result['bytes_per_token']:.1f} bytes each)\n"
        f"cores for an H200    {result['cores_for_an_h200']:.1f}, which trains on "
        f"{result['h200_tokens_per_second']:,} tokens/s of SmolLM2-135M"
    )
