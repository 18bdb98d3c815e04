"""What jsonl and txt share: local plain bytes behind a shard, read by position.

A compressed shard is unpacked once into the cache, never whole into memory, and never beyond the cache's bound:
that is also what stops a file that unpacks to terabytes. An unpacked file stays open, so that another process
which trims the cache cannot take it away.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from pathlib import Path

from smolforge.data.shard import Context, Format, Shard
from smolforge.errors import DataError, SourceChanged

GROUP_BYTES = 1 << 20


class PlainBytes(Format):
    """A format over plain bytes whose row groups are consecutive runs of bytes."""

    def __init__(self, shard: Shard, context: Context) -> None:
        super().__init__(shard, context)
        self._file: int | None = None
        self._starts: list[int] = []

    @property
    def label(self) -> str:
        """The shard as errors call it."""
        return self.shard.name

    @abstractmethod
    def scan_file(self, path: Path) -> list[list[int]]:
        """Row groups of the plain file at `path`."""

    def scan(self) -> list[list[int]]:
        path = self._plain()
        try:
            return self.scan_file(path)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from None

    def use(self, groups: list[list[int]]) -> None:
        super().use(groups)
        self._starts = [0]
        for _, size in groups:
            self._starts.append(self._starts[-1] + size)

    def group_bytes(self, group: int) -> bytes:
        """The bytes of a row group."""
        start, size = self._starts[group], self.groups[group][1]
        try:
            if self._file is None:
                self._file = os.open(self._plain(), os.O_RDONLY)
            data = os.pread(self._file, size, start)
        except OSError as error:
            raise DataError(f"cannot read {self.label}: {error.strerror}") from None
        if len(data) != size:
            raise SourceChanged(f"{self.label} ends at byte {start + len(data):,}, inside an indexed row group")
        return data

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _plain(self) -> Path:
        """The local file without compression."""
        for ending in (".gz", ".zst"):
            if self.shard.name.lower().endswith(ending):
                from smolforge.data.unpack import unpacked

                return unpacked(self.shard, ending, self.context.cache)
        return self.shard.whole()


def not_utf8(label: str, error: UnicodeDecodeError, offset: int) -> DataError:
    """The error for bytes that are no UTF-8; `offset` is the place of the decoded bytes in the file."""
    at = offset + error.start
    return DataError(
        f"{label} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {at:,}",
        field="data.sources",
        hint="Convert it, for example with `iconv -f latin1 -t utf-8`.",
    )
