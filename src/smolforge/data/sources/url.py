"""SRC is an http(s):// URL of one file: parquet is read in ranges, anything else fetched once into the cache."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from smolforge.data.readers import format_of, known_endings
from smolforge.data.remote import NoRanges, RemoteFile
from smolforge.data.shard import Context, Shard, Source
from smolforge.errors import DataError


class RemoteShard(Shard):
    """A file behind a URL, its ranges kept in the cache under what identifies it."""

    remote = True

    def __init__(self, file: RemoteFile, name: str, format: str, identity: dict[str, Any], context: Context) -> None:
        assert file.size is not None
        self.file, self.name, self.format, self.size = file, name, format, file.size
        self._identity, self._context = identity, context
        self._key = f"{file.url} {file.size} {sorted(identity.items())}"
        self._kept: set[str] = set()
        self._lock = threading.Lock()
        if not self.size:
            raise DataError(f"{name} is empty", field="data.sources")

    def read(self, start: int, length: int) -> bytes:
        cache, key = self._context.cache, f"{self._key} {start} {length}"
        data = cache.range(key)
        if data is not None and len(data) == length:
            return data
        if self._context.offline:
            raise self.missing(f"bytes {start:,} to {start + length:,} are")
        if self.file.ranges:
            with contextlib.suppress(NoRanges):
                data = self.file.read(start, length)
                cache.keep_range(key, data)
                with self._lock:
                    self._kept.add(key)
                return data
        with self.whole().open("rb") as plain:
            plain.seek(start)
            return plain.read(length)

    def whole(self) -> Path:
        cache, key = self._context.cache, f"{self._key} whole"
        if self._context.offline and not cache.holds(key):
            raise self.missing("it is")
        return cache.file(key, self.file.blocks(), what=self.name)

    def identity(self) -> dict[str, Any]:
        return self._identity

    def forget(self) -> None:
        with self._lock:
            kept, self._kept = self._kept, set()
        for key in kept:
            self._context.cache.drop_range(key)

    def missing(self, what: str) -> DataError:
        """The error for bytes that only the network has."""
        return DataError(
            f"{self.name}: {what} not on this machine, and the network is not to be used",
            field="data.sources",
            hint="Run once with the network (without HF_HUB_OFFLINE) so that the cache is filled.",
        )


def matches(spec: str) -> bool:
    """Whether SRC is a URL."""
    return spec.lower().startswith(("http://", "https://"))


def resolve(spec: str, context: Context, recorded: dict[str, Any] | None) -> Source:
    """The one file behind the URL.

    Raises:
        DataError: its ending is unknown, it is not there, or offline and not known from an index.
        SourceUnavailable: the network stayed away.
    """
    try:
        name = unquote(urlsplit(spec).path).rpartition("/")[2]
    except ValueError as error:
        raise DataError(f"{spec} is no URL: {error}", field="data.sources") from None
    format = format_of(name)
    if format is None:
        raise DataError(
            f"{spec} has an unknown ending", field="data.sources", hint=f"Known endings: {known_endings()}."
        )
    file = RemoteFile(context.network, spec, name)
    if context.offline:
        if recorded is None:
            raise DataError(f"cannot look at {spec}: the network is not to be used", field="data.sources")
        entry = recorded["shards"][0]
        file.size, file.etag = entry["size"], entry["identity"].get("etag")
        identity = entry["identity"]
    else:
        file.look()
        identity = {"etag": file.etag} if file.etag else {"modified": file.modified} if file.modified else {}
    return Source(spec, "web", [RemoteShard(file, name, format, identity, context)])
