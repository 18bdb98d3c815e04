"""The data pipeline: from a source name to batches that a step number identifies.

A source (SRC) is resolved to shards, whose row groups are listed once in an index. The order of the row groups, and of
the rows in them, is a pure function of the seed; it is dealt to a fixed number of lanes. A lane tokenizes its
documents, joins them with EOS and cuts windows of L+1 tokens; a batch takes the next window of each lane whose turn it
is. So the batch of step N depends on the sources, the tokenizer, the seed and the cursor alone: threads, prefetch and
the number of ranks decide when something is read, never what is read. To resume is to seek to a cursor.

    corpus.py     the sources of a configuration, opened and readable by address
    holdout.py    which documents training never sees
    sources/      from SRC to shards: local files, URLs, the Hub
    readers/      from a shard to rows of text: parquet, jsonl, json, txt
    index.py      every shard and row group, with a hash of the whole
    order.py      which rows each lane reads, epoch by epoch; the cursor, the position of every lane
    packing.py    one lane: tokenize, join, cut windows
    conversations.py  one lane of chat data: whole conversations packed into windows, and what is learned of them
    loader.py     batches from the lanes, made ahead in threads; which documents fed a step
    fetch.py      ranges over the network, with retries
    cache.py      what is kept on disk and in memory
    bench.py      `smolforge bench data`
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from smolforge.lazy import lazy_attributes

if TYPE_CHECKING:
    from smolforge.data.corpus import Corpus as Corpus
    from smolforge.data.fetch import Network as Network
    from smolforge.data.loader import Batch as Batch
    from smolforge.data.loader import Loader as Loader
    from smolforge.data.loader import batch_of_step as batch_of_step
    from smolforge.data.loader import data_digest as data_digest
    from smolforge.data.order import merge_cursors as merge_cursors

_IN_LOADER = dict.fromkeys(("Batch", "Loader", "data_digest", "batch_of_step"), "loader")
_HOMES = {"Corpus": "corpus", "Network": "fetch", "merge_cursors": "order", **_IN_LOADER}
__getattr__ = lazy_attributes(__name__, _HOMES)
