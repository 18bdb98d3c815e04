"""A parquet footer, read with suspicion: where the chunks of one column lie.

pyarrow's own accessors to a row group's columns abort the whole process when a footer is inconsistent (a C++
exception passes a frame that declares none), so a footer from outside is walked here first. It is a Thrift
structure in the compact protocol (thrift.apache.org, thrift-compact-protocol.md; the fields are numbered in
parquet-format's parquet.thrift). Everything is bounded by the bytes that are there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

MAX_DEPTH = 16

# Wire types of the compact protocol.
STOP, TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(13)


class BadFooter(ValueError):
    """The bytes are no footer, or one that contradicts itself."""


class Chunk(NamedTuple):
    """One row group of the column: rows, bytes of the unpacked pages, and where the packed ones lie."""

    rows: int
    unpacked: int
    start: int
    length: int


class Compact:
    """A cursor over Thrift compact bytes."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def byte(self) -> int:
        """One byte."""
        if self.at >= len(self.data):
            raise BadFooter("it ends in the middle")
        self.at += 1
        return self.data[self.at - 1]

    def varint(self) -> int:
        """An unsigned number of at most 64 bits."""
        value = shift = 0
        while shift < 64:
            byte = self.byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value & (2**64 - 1)
            shift += 7
        raise BadFooter("a number of more than 64 bits")

    def signed(self) -> int:
        """A zigzag number."""
        value = self.varint()
        return (value >> 1) ^ -(value & 1)

    def binary(self) -> bytes:
        """Length and bytes."""
        length = self.varint()
        if length > len(self.data) - self.at:
            raise BadFooter(f"a string of {length:,} bytes where {len(self.data) - self.at:,} are left")
        self.at += length
        return self.data[self.at - length : self.at]

    def fields(self) -> Iterator[tuple[int, int]]:
        """(number, type) of each field of a struct; the caller reads or skips its value before the next."""
        number = 0
        while kind := (header := self.byte()) & 15:
            number = number + (header >> 4) if header >> 4 else self.signed()
            yield number, kind

    def items(self, kind: int, wanted: int) -> int:
        """Length of a list whose elements are of type `wanted`."""
        header = self.byte()
        size = header >> 4 if header >> 4 < 15 else self.varint()
        if kind != LIST or (header & 15 != wanted and size):
            raise BadFooter("a field is not of its type")
        if size > len(self.data) - self.at:
            raise BadFooter(f"a list of {size:,} where {len(self.data) - self.at:,} bytes are left")
        return size

    def number(self, kind: int) -> int:
        """An integer field."""
        if kind not in (I16, I32, I64):
            raise BadFooter("a field is not of its type")
        return self.signed()

    def skip(self, kind: int, depth: int = 0) -> None:
        """Pass over a value of any type."""
        if depth > MAX_DEPTH:
            raise BadFooter("it is nested too deeply")
        if kind in (I16, I32, I64):
            while self.byte() > 127:
                pass
        elif kind == BINARY:
            self.binary()
        elif kind == STRUCT:
            for _, inner in self.fields():
                self.skip_field(inner, depth + 1)
        elif kind in (LIST, SET):
            header = self.byte()
            size = header >> 4 if header >> 4 < 15 else self.varint()
            self._skip_many(size, (header & 15,), depth)
        elif kind == MAP:
            if size := self.varint():
                kinds = self.byte()
                self._skip_many(size, (kinds >> 4, kinds & 15), depth)
        elif kind in (TRUE, FALSE, BYTE):
            self.byte()
        elif kind == DOUBLE:
            self.at += 8
        else:
            raise BadFooter(f"a value of unknown type {kind}")

    def skip_field(self, kind: int, depth: int = 0) -> None:
        """Pass over the value of a struct's field; a boolean one holds its value in its header."""
        if kind not in (TRUE, FALSE):
            self.skip(kind, depth)

    def _skip_many(self, size: int, kinds: tuple[int, ...], depth: int) -> None:
        if size > len(self.data) - self.at:  # each takes a byte at least
            raise BadFooter(f"a list of {size:,} where {len(self.data) - self.at:,} bytes are left")
        for _ in range(size):
            for kind in kinds:
                self.skip(kind, depth + 1)


def column_chunks(footer: bytes, column: str) -> list[Chunk] | None:
    """The chunks of a top-level column in all row groups, or None where there is no such column.

    Args:
        footer: the serialized FileMetaData, without its length and the magic bytes.
        column: name of a column that is no group.

    Raises:
        BadFooter: it is damaged.
    """
    thrift = Compact(footer)
    leaf, leaves, chunks = None, 0, None
    for number, kind in thrift.fields():
        if number == 2:
            leaf, leaves = _find_leaf(thrift, kind, column)
        elif number == 4:
            if leaves == 0:
                raise BadFooter("row groups come before the schema")
            chunks = [_row_group(thrift, leaf, leaves) for _ in range(thrift.items(kind, STRUCT))]
        else:
            thrift.skip_field(kind)
    if chunks is None:
        raise BadFooter("it has no row groups")
    return None if leaf is None else chunks


def _find_leaf(thrift: Compact, kind: int, column: str) -> tuple[int | None, int]:
    """(number of the leaf that the column is, number of all leaves); the schema is a tree in preorder."""
    leaf, leaves = None, 0
    open_nodes: list[int] = []  # children still to come, from the root down
    for i in range(thrift.items(kind, STRUCT)):
        name, children = b"", 0
        for number, inner in thrift.fields():
            if number == 4 and inner == BINARY:
                name = thrift.binary()
            elif number == 5:
                children = thrift.number(inner)
            else:
                thrift.skip_field(inner)
        depth = len(open_nodes)
        if i and not depth:
            raise BadFooter("its schema has two roots")
        if depth:
            open_nodes[-1] -= 1
        if children > 0 or not i:
            open_nodes.append(children)
        else:
            if depth == 1 and name == column.encode():
                leaf = leaves
            leaves += 1
        while open_nodes and open_nodes[-1] <= 0:
            open_nodes.pop()
        if len(open_nodes) > 100:
            raise BadFooter("its schema is nested too deeply")
    return leaf, leaves


def _row_group(thrift: Compact, leaf: int | None, leaves: int) -> Chunk:
    rows = unpacked = start = length = 0
    for number, kind in thrift.fields():
        if number == 1:
            count = thrift.items(kind, STRUCT)
            if count != leaves:
                raise BadFooter(f"a row group has {count} columns, the schema {leaves}")
            for i in range(count):
                if i == leaf:
                    unpacked, start, length = _chunk(thrift)
                else:
                    thrift.skip(STRUCT)
        elif number == 3:
            rows = thrift.number(kind)
        else:
            thrift.skip_field(kind)
    return Chunk(rows, unpacked, start, length)


def _chunk(thrift: Compact) -> tuple[int, int, int]:
    """(bytes unpacked, first byte, bytes packed) of a column chunk: its dictionary page and its data pages."""
    unpacked = length = data = dictionary = 0
    for number, kind in thrift.fields():
        if number == 3 and kind == STRUCT:
            for inner, inner_kind in thrift.fields():
                if inner == 6:
                    unpacked = thrift.number(inner_kind)
                elif inner == 7:
                    length = thrift.number(inner_kind)
                elif inner == 9:
                    data = thrift.number(inner_kind)
                elif inner == 11:
                    dictionary = thrift.number(inner_kind)
                else:
                    thrift.skip_field(inner_kind)
        else:
            thrift.skip_field(kind)
    return unpacked, dictionary if 0 < dictionary < data else data, length
