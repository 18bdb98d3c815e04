"""The sources of SRC, found by name and loaded when they are asked. A new source is one file and one line here.

local.py   files, folders and globs on this machine
url.py     one file behind an http(s):// URL
hub.py     datasets of the Hugging Face Hub
"""

from __future__ import annotations

import importlib
from typing import Any, Protocol

from smolforge.data.shard import Context, Source


class SourceModule(Protocol):
    """What a module in `SOURCES` defines."""

    def matches(self, spec: str) -> bool:
        """Whether SRC belongs to this source."""
        ...

    def resolve(self, spec: str, context: Context, recorded: dict[str, Any] | None) -> Source:
        """The shards that SRC names; `recorded` is its entry in an earlier index."""
        ...


# The first module that matches a SRC resolves it; `local` matches everything.
SOURCES = {
    "tales": "smolforge.tales.source",
    "web": "smolforge.data.sources.url",
    "hub": "smolforge.data.sources.hub",
    "local": "smolforge.data.sources.local",
}


def resolve(spec: str, context: Context, recorded: dict[str, Any] | None = None) -> Source:
    """The source that SRC names.

    Args:
        spec: what the user wrote.
        context: what sources share.
        recorded: the source in an earlier index: what it was resolved to then.

    Raises:
        DataError: there is no such source, or it cannot be read.
        SourceUnavailable: the network did not answer.
    """
    for name in SOURCES.values():
        module: SourceModule = importlib.import_module(name)  # type: ignore[assignment]
        if module.matches(spec):
            return module.resolve(spec, context, recorded)
    raise AssertionError("the last source matches everything")
