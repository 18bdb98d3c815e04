"""The kinds of SRC. A new kind is one file here and one line in `KINDS`."""

from __future__ import annotations

from typing import Any

from smolforge.data.kinds import hub, local, tales, web
from smolforge.data.shard import Context, Source

# The first that claims a SRC resolves it; `local` claims everything.
KINDS = {
    "tales": tales,
    "web": web,
    "hub": hub,
    "local": local,
}


def resolve(spec: str, context: Context, recorded: dict[str, Any] | None = None) -> Source:
    """The source that SRC names.

    Args:
        spec: the user's word.
        context: what sources share.
        recorded: the source in an earlier index: what it was resolved to then.

    Raises:
        DataError: there is no such source, or it cannot be read.
        SourceUnavailable: the network stayed away.
    """
    kind = next(module for module in KINDS.values() if module.matches(spec))
    return kind.resolve(spec, context, recorded)
