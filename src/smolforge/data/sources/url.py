"""SRC is a URL: http(s):// of one file, or a file, folder or glob behind any protocol that fsspec knows.

Parquet is read in ranges, anything else is fetched once into the cache. `s3://`, `gs://` and `az://` need the package
of their filesystem (s3fs, gcsfs, adlfs), whose own environment variables and configuration files hold the credentials.
"""

from __future__ import annotations

import contextlib
import re
from glob import has_magic
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from smolforge.data.fetch import HttpFile, Network, NoRanges, RemoteFile, Trouble, may_pass
from smolforge.data.sources import Context, Shard, Source, check_ending, format_of, no_known_file, of_known_format
from smolforge.data.sources.local import read_file
from smolforge.errors import DataError

PACKAGES = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs",
    "sftp": "paramiko", "ssh": "paramiko", "smb": "smbprotocol", "webhdfs": "requests", "oss": "ossfs",
}  # fmt: skip
IDENTITIES = ("ETag", "etag", "md5Hash", "crc32c", "content_md5", "LastModified", "last_modified", "mtime", "created")


class RemoteShard(Shard):
    """A remote file whose ranges are cached under its URL, size and identity, or read from a `local` copy."""

    remote = True
    local: Path | None = None

    def __init__(self, file: RemoteFile, name: str, identity: dict[str, Any], context: Context) -> None:
        assert file.size is not None
        self.file, self.name, self.format, self.size = file, name, format_of(name) or "", file.size
        self._identity, self._context = identity, context
        self._key = f"{file.url} {file.size} {sorted(identity.items())}"
        self._kept: set[str] = set()
        if not self.size:
            raise DataError(f"{name} is empty", field="data.sources")

    def read(self, start: int, length: int) -> bytes:
        if self.local:
            data = read_file(self.local, start, length)
            if len(data) != length:
                raise DataError(f"{self.local} is cut short", hint="Delete it; it will be fetched again.")
            return data
        cache, key = self._context.cache, f"{self._key} {start} {length}"
        data = cache.range(key)
        if data is not None and len(data) == length:
            return data
        if self._context.offline:
            raise self._missing(f"bytes {start:,} to {start + length:,} are")
        if self.file.ranges:
            with contextlib.suppress(NoRanges):
                data = self.file.read(start, length)
                cache.keep_range(key, data)
                self._kept.add(key)
                return data
        return read_file(self.whole(), start, length)

    def whole(self) -> Path:
        if self.local:
            return self.local
        cache, key = self._context.cache, f"{self._key} whole"
        if self._context.offline and not cache.holds(key):
            raise self._missing("it is")
        return cache.file(key, self.file.blocks(), what=self.name)

    def identity(self) -> dict[str, Any]:
        return self._identity

    def forget(self) -> None:
        kept, self._kept = self._kept, set()
        for key in kept:
            self._context.cache.drop_range(key)

    def _missing(self, what: str) -> DataError:
        problem = f"{self.name}: {what} not on this machine, and the network must not be used"
        hint = "Run once with the network (without HF_HUB_OFFLINE) so that the cache is filled."
        return DataError(problem, field="data.sources", hint=hint)


class FsspecFile(RemoteFile):
    """A file of an fsspec filesystem. Its content is checked when it is looked at: `cat_file` takes no condition."""

    def __init__(self, network: Network, filesystem: Any, path: str, size: int | None = None) -> None:
        super().__init__(network, filesystem.unstrip_protocol(path), path, host_of(filesystem), size)
        self.filesystem, self.path = filesystem, path

    def _look(self) -> dict[str, Any]:
        info = self.filesystem.info(self.path)
        if not isinstance(info.get("size"), int):
            raise DataError(f"{self.host} does not tell the length of {self.name}", field="data.sources")
        self.size = info["size"]
        key = next((key for key in IDENTITIES if info.get(key)), None)
        return {key.lower(): str(info[key])} if key else {}

    def _read(self, start: int, length: int, got: bytearray) -> None:
        got += self.filesystem.cat_file(self.path, start=start + len(got), end=start + length)
        if len(got) != length:
            del got[length:]
            raise Trouble("a range of another length than the one asked for")

    def _explain(self, error: Exception) -> Exception:
        return explain(error, self.host, self.url)


def matches(spec: str) -> bool:
    """Whether SRC is a URL, of the Hub excepted."""
    return bool(re.match(r"(?!hf:)[A-Za-z][A-Za-z0-9+.-]*(://|::)", spec))


def resolve(spec: str, context: Context, recorded: dict[str, Any] | None) -> Source:
    """The files behind the URL."""
    if context.offline and recorded is None:
        raise DataError(f"cannot look at {spec}: the network must not be used", field="data.sources")
    if spec.lower().startswith(("http://", "https://")):
        shards = [_http_shard(spec, context, recorded["shards"][0] if recorded else None)]
    else:
        shards = _fsspec_shards(spec, context, recorded["shards"] if recorded else [])
    return Source(spec, "web", list(shards))


def _http_shard(spec: str, context: Context, recorded: dict[str, Any] | None) -> RemoteShard:
    try:
        name = unquote(urlsplit(spec).path).rpartition("/")[2]
    except ValueError as error:
        raise DataError(f"{spec} is not a valid URL: {error}", field="data.sources") from None
    check_ending(name, spec)
    file = HttpFile(context.network, spec, name)
    if context.offline and recorded:
        file.size, file.etag = recorded["size"], recorded["identity"].get("etag")
        return RemoteShard(file, name, recorded["identity"], context)
    return RemoteShard(file, name, file.look(), context)


def _fsspec_shards(spec: str, context: Context, recorded: list[dict[str, Any]]) -> list[RemoteShard]:
    filesystem, path = open_filesystem(spec)
    if context.offline:
        files = [FsspecFile(context.network, filesystem, entry["file"], entry["size"]) for entry in recorded]
        return [RemoteShard(f, f.path, e["identity"], context) for f, e in zip(files, recorded, strict=True)]

    def find() -> list[str]:
        filesystem.invalidate_cache()
        if has_magic(path):
            return of_known_format(filesystem.glob(path))
        if filesystem.isdir(path):
            return of_known_format(filesystem.find(path))
        check_ending(path, spec)
        return [path]

    host = host_of(filesystem)
    paths = sorted(context.network.attempt(host, spec, find, lambda error: explain(error, host, spec)))
    if not paths:
        raise no_known_file(f"{spec} matches no file of a known format")
    files = [FsspecFile(context.network, filesystem, found) for found in paths]
    return [RemoteShard(file, file.path, file.look(), context) for file in files]


def open_filesystem(spec: str) -> tuple[Any, str]:
    """The fsspec filesystem of a URL, and the path in it; DataError where it is unknown or not installed."""
    from fsspec.core import url_to_fs

    protocol = re.split("://|::", spec)[0].lower()
    try:
        return url_to_fs(spec)
    except ImportError as error:
        package = PACKAGES.get(protocol)
        hint = f"Install it: pip install {package}" if package else str(error)
        raise DataError(f"{protocol}:// needs a package that is missing", field="data.sources", hint=hint) from None
    except ValueError as error:
        known = f"Known to fsspec: http, https, {', '.join(sorted(PACKAGES))} and others."
        raise DataError(f"cannot open {spec}: {error}", field="data.sources", hint=known) from None


def host_of(filesystem: Any) -> str:
    """What messages call the place: the first protocol of the filesystem."""
    protocol = filesystem.protocol
    return f"{protocol if isinstance(protocol, str) else protocol[0]}://"


def explain(error: Exception, host: str, what: str) -> Exception:
    """The error for what a filesystem raised: `Trouble` where it may pass, else `DataError`."""
    if isinstance(error, FileNotFoundError):
        return DataError(f"no such file: {what}", field="data.sources", hint="Check the address.")
    if isinstance(error, PermissionError):
        hint = "Check the credentials of this filesystem."
        return DataError(f"{host} refuses {what}: {error}", field="data.sources", hint=hint)
    # Each filesystem has errors of its own; those of a connection are OSErrors or say so in their name.
    status = getattr(error, "status", getattr(error, "code", getattr(error, "status_code", None)))
    name = type(error).__name__
    if isinstance(status, int) and may_pass(status):
        return Trouble(f"{status} {name}")
    if isinstance(error, OSError) or re.search("Timeout|Connect|Incomplete|Throttl", name):
        return Trouble(f"a broken connection ({name}: {str(error)[:100]})")
    return DataError(f"cannot read {what}: {name}: {error}", field="data.sources")
