"""The index: every shard and row group of every source, resolved to a revision, with a hash of the whole.

`data_index.json` of a run. The hash covers what decides the stream (which shards, what is in them, how they are
read) and not what a shard is called by this user on this machine, so a moved folder is still the same corpus.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from smolforge.data import sources
from smolforge.data.readers import reader
from smolforge.data.shard import Context, Format, Shard, Source
from smolforge.errors import DataError, SourceChanged

logger = logging.getLogger(__name__)

VERSION = 1
THREADS = 8  # shards looked at side by side
TELL_EVERY = 50
_NEW_RUN = "A run goes on with the data it began with; put it back, or start a new run."


def build(specs: Sequence[str], context: Context) -> tuple[dict[str, Any], list[tuple[Source, list[Format]]]]:
    """Resolve and scan all sources.

    Returns:
        The index, and each source with its shards ready to read.

    Raises:
        DataError: a source is missing, empty, damaged, or not what its name says.
        SourceUnavailable: the network stayed away.
    """
    entries, opened = [], []
    for spec in specs:
        source = sources.resolve(spec, context)
        formats = [reader(shard, context) for shard in source.shards]
        described = _scan(source, formats)
        entry = {
            "source": spec,
            "kind": source.kind,
            "revision": source.revision,
            "column": context.column,
            "separator": context.separator,
            "rows": sum(rows for shard in described for rows, *_ in shard["groups"]),
            "shards": described,
        }
        if not entry["rows"]:
            raise DataError(f"{spec} holds no documents", field="data.sources")
        entries.append(entry)
        opened.append((source, formats))
    index: dict[str, Any] = {"version": VERSION, "sources": entries}
    index["hash"] = digest(index)
    return index, opened


def reopen(index: dict[str, Any], specs: Sequence[str], context: Context) -> list[tuple[Source, list[Format]]]:
    """The sources of an earlier index, checked against it but not scanned again.

    Raises:
        SourceChanged: a source is not the one of the index; the message names the shard and what changed.
        DataError: the index is damaged.
    """
    check(index)
    entries = index["sources"]
    if len(entries) != len(specs):
        raise SourceChanged(
            f"the run began with {len(entries)} sources ({', '.join(e['source'] for e in entries)}), "
            f"the configuration has {len(specs)}",
            field="data.sources",
            hint=_NEW_RUN,
        )
    opened = []
    for spec, entry in zip(specs, entries, strict=True):
        for key, now in (("column", context.column), ("separator", context.separator)):
            if entry[key] != now:
                raise SourceChanged(f"{spec}: the {key} was {entry[key]!r} and is {now!r}", hint=_NEW_RUN)
        source = sources.resolve(spec, context, entry)
        if (source.kind, source.revision) != (entry["kind"], entry["revision"]):
            raise SourceChanged(
                f"{spec} was {entry['kind']} at {entry['revision']} and is {source.kind} at {source.revision}",
                field="data.sources",
                hint=_NEW_RUN,
            )
        formats = _match(spec, source, entry["shards"], context)
        opened.append((source, formats))
    return opened


def _scan(source: Source, formats: list[Format]) -> list[dict[str, Any]]:
    count = len(formats)
    told = 0

    def one(format: Format) -> dict[str, Any]:
        groups = format.scan()
        format.use(groups)
        shard = format.shard
        return {
            "file": shard.name,
            "size": shard.size,
            "identity": shard.identity(),
            **shard.notes(),
            "groups": groups,
        }

    described = []
    with ThreadPoolExecutor(THREADS if count > 1 else 1) as pool:
        futures = [pool.submit(one, format) for format in formats]
        try:
            for done, future in enumerate(futures):
                described.append(future.result())
                if done - told >= TELL_EVERY:
                    logger.info("%s: %d of %d shards indexed", source.spec, done, count)
                    told = done
        except BaseException:
            for future in futures:
                future.cancel()
            raise
    return described


def _match(spec: str, source: Source, recorded: list[dict[str, Any]], context: Context) -> list[Format]:
    now = {shard.name: shard for shard in source.shards}
    was = {entry["file"]: entry for entry in recorded}
    if len(now) == len(was) == 1 and source.kind == "local":
        now = dict(zip(was, now.values(), strict=True))  # a single file may have been renamed
    gone, new = sorted(set(was) - set(now)), sorted(set(now) - set(was))
    if gone:
        raise SourceChanged(f"{spec}: {_some(gone)} no longer there", field="data.sources", hint=_NEW_RUN)
    if new:
        raise SourceChanged(f"{spec}: {_some(new)} not there when the run began", field="data.sources", hint=_NEW_RUN)

    def one(entry: dict[str, Any]) -> Format:
        shard: Shard = now[entry["file"]]
        changed = shard.same_as(entry)
        if changed:
            raise SourceChanged(f"{spec}: {entry['file']} changed: {changed}", field="data.sources", hint=_NEW_RUN)
        format = reader(shard, context)
        format.use(entry["groups"])
        return format

    with ThreadPoolExecutor(THREADS if len(recorded) > 1 else 1) as pool:
        return list(pool.map(one, recorded))


def _some(names: list[str]) -> str:
    if len(names) == 1:
        return f"{names[0]} is"
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''} are"


def digest(index: dict[str, Any]) -> str:
    """Hash of what decides the stream."""
    core = [
        [
            entry["kind"],
            entry["revision"],
            entry["column"],
            entry["separator"],
            [[shard["size"], shard["identity"], shard["groups"]] for shard in entry["shards"]],
        ]
        for entry in index["sources"]
    ]
    return hashlib.sha256(json.dumps(core, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check(index: Any) -> None:
    """Refuse what is no index.

    Raises:
        DataError: it is of another version, damaged, or its hash is not its own.
    """
    try:
        if index["version"] != VERSION:
            raise DataError(f"the index is of version {index['version']!r}; this smolforge reads {VERSION}")
        for entry in index["sources"]:
            _strings(entry["source"], entry["kind"], entry["column"])
            for shard in entry["shards"]:
                _strings(shard["file"])
                if not isinstance(shard["identity"], dict):
                    raise TypeError("identity")
                for group in shard["groups"]:
                    if len(group) < 2 or not all(isinstance(n, int) and 0 <= n < 2**50 for n in group):
                        raise ValueError("row group")
        whole = digest(index) == index["hash"]
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise DataError(f"the index is damaged: {error!r}", field="data_index.json") from None
    if not whole:
        raise DataError("the index is damaged: its hash is not its own", field="data_index.json")


def _strings(*values: Any) -> None:
    if not all(isinstance(value, str) for value in values):
        raise TypeError("name")
