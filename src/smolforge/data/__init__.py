"""The stream: from a word for a source to batches with an address.

    source -> index -> order -> packing -> loader
    sources/   index    order    packing    loader      where text is, what is in it, who reads it when,
    readers/          cursor                          windows of tokens, batches of windows

The batch of step N is a pure function of the sources, the tokenizer, the seed and the cursor. Threads, prefetch
and the number of ranks decide when something is read, never what comes out.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smolforge.data.corpus import Corpus
    from smolforge.data.cursor import merge_cursors
    from smolforge.data.document import Address, Document
    from smolforge.data.loader import Batch, Loader, data_digest
    from smolforge.data.network import Network
    from smolforge.data.replay import which

_WHERE = {
    "Address": "document",
    "Batch": "loader",
    "Corpus": "corpus",
    "Document": "document",
    "Loader": "loader",
    "Network": "network",
    "data_digest": "loader",
    "merge_cursors": "cursor",
    "which": "replay",
}
__all__ = [
    "Address",
    "Batch",
    "Corpus",
    "Document",
    "Loader",
    "Network",
    "data_digest",
    "merge_cursors",
    "which",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"smolforge.data.{_WHERE[name]}"), name)
