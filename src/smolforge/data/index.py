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

from smolforge.data.fetch import changed
from smolforge.data.readers import Reader, open_reader
from smolforge.data.sources import Context, Source, resolve_source
from smolforge.errors import DataError
from smolforge.formatting import plural

logger = logging.getLogger(__name__)

VERSION = 1
THREADS = 8  # shards scanned at the same time
LOG_EVERY = 50  # shards
MOST_ERRORS = 20  # files that one error names


def build_index(specs: Sequence[str], context: Context) -> tuple[dict[str, Any], list[tuple[Source, list[Reader]]]]:
    """Resolve and scan all sources: the index, and each source with its shards ready to read."""
    entries, opened = [], []
    for spec in specs:
        source = resolve_source(spec, context)
        readers = [open_reader(shard, context) for shard in source.shards]
        described = _scan(source, readers)
        if first := next((reader.first_bad for reader in readers if reader.first_bad), None):
            bad = sum(reader.bad_rows for reader in readers)
            logger.warning("%s: %s cannot be used, left out: %s", spec, plural(bad, "row"), first.message)
        rows = sum(rows for shard in described for rows, *_ in shard["groups"])
        if not rows:
            raise DataError(f"{spec} holds no documents", field="data.sources")
        read_as = {"column": context.column, "separator": context.separator}
        head = {"source": spec, "kind": source.kind, "revision": source.revision, **read_as, "rows": rows}
        entries.append({**head, "shards": described})
        opened.append((source, readers))
    index: dict[str, Any] = {"version": VERSION, "sources": entries}
    index["hash"] = digest(index)
    return index, opened


def reopen(index: dict[str, Any], specs: Sequence[str], context: Context) -> list[tuple[Source, list[Reader]]]:
    """The sources of an earlier index, not scanned again; SourceChanged names the shard and what changed."""
    check(index)
    entries = index["sources"]
    if len(entries) != len(specs):
        names = ", ".join(entry["source"] for entry in entries)
        raise changed(f"the run started with {len(entries)} sources ({names}), the configuration has {len(specs)}")
    opened = []
    for spec, entry in zip(specs, entries, strict=True):
        for key, now in (("column", context.column), ("separator", context.separator)):
            if entry[key] != now:
                raise changed(f"{spec}: the {key} was {entry[key]!r} and is {now!r}")
        source = resolve_source(spec, context, entry)
        was, now = f"{entry['kind']} at {entry['revision']}", f"{source.kind} at {source.revision}"
        if was != now:
            raise changed(f"{spec} was {was} and is {now}")
        opened.append((source, _match(spec, source, entry["shards"], context)))
    return opened


def _scan(source: Source, readers: list[Reader]) -> list[dict[str, Any]]:
    def scan(reader: Reader) -> dict[str, Any] | DataError:
        shard = reader.shard
        try:
            groups, head = reader.scan(), {"file": shard.name, "size": shard.size, "identity": shard.identity()}
        except DataError as error:
            return error
        reader.use(groups)
        bad = {"bad_rows": reader.bad_rows} if reader.bad_rows else {}
        return {**head, **shard.notes, **bad, **reader.counted, "groups": groups}

    count, described, errors = len(readers), [], []
    with ThreadPoolExecutor(THREADS if count > 1 else 1) as pool:
        for done, entry in enumerate(pool.map(scan, readers), 1):
            if isinstance(entry, DataError):
                errors.append(entry)
                if len(errors) == MOST_ERRORS:  # what closes `map`'s iterator cancels the rest
                    break
            else:
                described.append(entry)
            if done % LOG_EVERY == 0:
                logger.info("%s: %d of %d shards indexed", source.spec, done, count)
    if errors:
        raise _one_error(source.spec, errors, count)
    return described


def _one_error(spec: str, errors: list[DataError], count: int) -> DataError:
    """The error for all files that cannot be used; that of the only one as it is."""
    if len(errors) == 1:
        return errors[0]
    more = "at least " if len(errors) == MOST_ERRORS else ""
    listed = "".join(f"\n  {error.message}" for error in errors)
    hints = dict.fromkeys(error.hint for error in errors if error.hint)
    problem = f"{spec}: {more}{len(errors)} of {count:,} files cannot be used:{listed}"
    return DataError(problem, field=errors[0].field, hint=" ".join(hints) or None)


def _match(spec: str, source: Source, recorded: list[dict[str, Any]], context: Context) -> list[Reader]:
    now = {shard.name: shard for shard in source.shards}
    was = {entry["file"]: entry for entry in recorded}
    if len(now) == len(was) == 1 and source.kind == "local":
        now = dict(zip(was, now.values(), strict=True))  # a single file may have been renamed
    if gone := sorted(set(was) - set(now)):
        raise changed(f"{spec}: {_some(gone)} no longer there")
    if new := sorted(set(now) - set(was)):
        raise changed(f"{spec}: {_some(new)} not in the index that the run started with")

    def one(entry: dict[str, Any]) -> Reader:
        shard = now[entry["file"]]
        if difference := shard.difference(entry):
            raise changed(f"{spec}: {entry['file']} changed: {difference}")
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
        [entry[key] for key in ("kind", "revision", "column", "separator")]
        + [[[shard["size"], shard["identity"], shard["groups"]] for shard in entry["shards"]]]
        for entry in index["sources"]
    ]
    return hashlib.sha256(json.dumps(core, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check(index: Any) -> None:
    """Raise DataError for an index from a file that is of another version, damaged, or whose hash is not its own."""
    try:
        if index["version"] != VERSION:
            raise DataError(f"the index is of version {index['version']!r}; this smolforge reads {VERSION}")
        for entry in index["sources"]:
            names = [entry["source"], entry["kind"], entry["column"], *(shard["file"] for shard in entry["shards"])]
            if not all(isinstance(name, str) for name in names):
                raise TypeError("name")
            for shard in entry["shards"]:
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
