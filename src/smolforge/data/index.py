"""The index: every shard and row group of every source, resolved to a revision, with a hash of the whole.

It is kept as `data_index.json` of a run. The hash covers what decides the stream (which shards, what is in them, how
they are read) but not the names of the shards, so a moved folder is still the same corpus.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from smolforge.data.fetch import NEW_RUN
from smolforge.data.readers import Reader, open_reader
from smolforge.data.sources import Context, Source, resolve_source
from smolforge.errors import DataError, SourceChanged

logger = logging.getLogger(__name__)

VERSION = 1
THREADS = 8  # shards scanned at the same time
LOG_EVERY = 50  # shards


def build_index(specs: Sequence[str], context: Context) -> tuple[dict[str, Any], list[tuple[Source, list[Reader]]]]:
    """Resolve and scan all sources.

    Returns:
        The index, and each source with its shards ready to read.

    Raises:
        DataError: a source is missing, empty, damaged, or not what its name says.
        SourceUnavailable: the network did not answer.
    """
    entries, opened = [], []
    for spec in specs:
        source = resolve_source(spec, context)
        readers = [open_reader(shard, context) for shard in source.shards]
        described = _scan(source, readers)
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
        opened.append((source, readers))
    index: dict[str, Any] = {"version": VERSION, "sources": entries}
    index["hash"] = digest(index)
    return index, opened


def reopen(index: dict[str, Any], specs: Sequence[str], context: Context) -> list[tuple[Source, list[Reader]]]:
    """The sources of an earlier index, checked against it but not scanned again.

    Raises:
        SourceChanged: a source is not the one of the index; the message names the shard and what changed.
        DataError: the index is damaged.
    """
    check(index)
    entries = index["sources"]
    if len(entries) != len(specs):
        raise SourceChanged(
            f"the run started with {len(entries)} sources ({', '.join(e['source'] for e in entries)}), "
            f"the configuration has {len(specs)}",
            field="data.sources",
            hint=NEW_RUN,
        )
    opened = []
    for spec, entry in zip(specs, entries, strict=True):
        for key, now in (("column", context.column), ("separator", context.separator)):
            if entry[key] != now:
                raise SourceChanged(f"{spec}: the {key} was {entry[key]!r} and is {now!r}", hint=NEW_RUN)
        source = resolve_source(spec, context, entry)
        if (source.kind, source.revision) != (entry["kind"], entry["revision"]):
            raise SourceChanged(
                f"{spec} was {entry['kind']} at {entry['revision']} and is {source.kind} at {source.revision}",
                field="data.sources",
                hint=NEW_RUN,
            )
        readers = _match(spec, source, entry["shards"], context)
        opened.append((source, readers))
    return opened


def _scan(source: Source, readers: list[Reader]) -> list[dict[str, Any]]:
    count = len(readers)

    def one(reader: Reader) -> dict[str, Any]:
        groups = reader.scan()
        reader.use(groups)
        shard = reader.shard
        return {
            "file": shard.name,
            "size": shard.size,
            "identity": shard.identity(),
            **shard.notes(),
            "groups": groups,
        }

    described = []
    with ThreadPoolExecutor(THREADS if count > 1 else 1) as pool:
        futures = [pool.submit(one, reader) for reader in readers]
        try:
            for done, future in enumerate(futures, 1):
                described.append(future.result())
                if done % LOG_EVERY == 0:
                    logger.info("%s: %d of %d shards indexed", source.spec, done, count)
        except BaseException:
            for future in futures:
                future.cancel()
            raise
    return described


def _match(spec: str, source: Source, recorded: list[dict[str, Any]], context: Context) -> list[Reader]:
    now = {shard.name: shard for shard in source.shards}
    was = {entry["file"]: entry for entry in recorded}
    if len(now) == len(was) == 1 and source.kind == "local":
        now = dict(zip(was, now.values(), strict=True))  # a single file may have been renamed
    gone, new = sorted(set(was) - set(now)), sorted(set(now) - set(was))
    if gone:
        raise SourceChanged(f"{spec}: {_some(gone)} no longer there", field="data.sources", hint=NEW_RUN)
    if new:
        message = f"{spec}: {_some(new)} not in the index that the run started with"
        raise SourceChanged(message, field="data.sources", hint=NEW_RUN)

    def one(entry: dict[str, Any]) -> Reader:
        shard = now[entry["file"]]
        difference = shard.difference(entry)
        if difference:
            raise SourceChanged(f"{spec}: {entry['file']} changed: {difference}", field="data.sources", hint=NEW_RUN)
        reader = open_reader(shard, context)
        reader.use(entry["groups"])
        return reader

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
    """Check an index that was read from a file.

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
