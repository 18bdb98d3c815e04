"""Read GGUF files: metadata, tokenizer and (mostly quantized) tensors of a model in one file, as llama.cpp has them.

Only the header is parsed, and every length in it is compared with the size of the file before it is used. Tensors are
views of the mapped file; the `gguf` package turns their blocks into numbers. Its own reader takes seconds for the
vocabulary of a small model, so it is not used.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import functools
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolforge.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np

SUFFIX = ".gguf"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_ENTRIES, _MAX_SIZE = 1 << 20, 1 << 40


def is_gguf(path: str | Path) -> bool:
    """Whether `path` is a file that its name calls GGUF."""
    return str(path).lower().endswith(SUFFIX) and Path(path).expanduser().is_file()


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies: its type of ggml, its shape with the rows first, and its bytes in the file."""

    type: int
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class Blocks:
    """A matrix as a GGUF file stores it, which a parameter of a model carries as its attribute `blocks`.

    Attributes:
        kind: Q8_0, Q4_0 or Q4_1: 32 weights of a row share a scale.
        rows: (rows, bytes of a row).
        version: the parameter's `_version` when it was read; with another one, its numbers have changed since.
    """

    kind: str
    rows: np.ndarray
    version: int = 0


def blocks_of(parameter: Any) -> Blocks | None:
    """The blocks whose numbers a parameter has, or None."""
    blocks = getattr(parameter, "blocks", None)
    return blocks if blocks is not None and blocks.version == parameter._version else None


class GgufFile:
    """An open file.

    Attributes:
        metadata: all keys with their values; arrays are lists.
        tensors: where each tensor lies, by its name in the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._at = 0
        if self._map[:4] != b"GGUF":
            raise ValueError("it does not begin with 'GGUF'")
        self._at = 4
        version, tensors, entries = self._take("I"), self._take("Q"), self._take("Q")
        if version not in (2, 3):
            raise ValueError(f"version {version} of the format is not read, only 2 and 3")
        if max(tensors, entries) > _MAX_ENTRIES:
            raise ValueError(f"it announces {tensors:,} tensors and {entries:,} keys")
        self.metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self._text()
            self.metadata[key] = self._value(self._take("I"))
        found = [(self._text(), self._shape(), self._take("I"), self._take("Q")) for _ in range(tensors)]
        align = self.metadata.get("general.alignment", 32)
        if type(align) is not int or align < 1:
            raise ValueError(f"general.alignment is {align!r}")
        data = -(-self._at // align) * align
        sizes = _block_sizes()
        self.tensors = {
            name: self._place(name, shape, sizes.get(kind), kind, data + at) for name, shape, kind, at in found
        }

    def blocks(self, name: str) -> np.ndarray:
        """The bytes of a tensor as they are stored, (rows, bytes of a row); a view of the file."""
        import numpy as np

        tensor = self.tensors[name]
        flat = np.frombuffer(self._map, np.uint8, tensor.nbytes, tensor.start)
        return flat.reshape(*tensor.shape[:-1], -1)

    def type_name(self, name: str) -> str:
        """The type of a tensor as people know it, such as Q4_1."""
        import gguf

        return gguf.GGMLQuantizationType(self.tensors[name].type).name

    def dequantized(self, name: str) -> np.ndarray:
        """The numbers of a tensor, fp32; raises CheckpointError for a type that the gguf package does not decode."""
        import gguf
        import numpy as np

        tensor = self.tensors[name]
        try:
            numbers = gguf.quants.dequantize(self.blocks(name), gguf.GGMLQuantizationType(tensor.type))
        except NotImplementedError:
            raise CheckpointError(
                f"tensor {name!r} is of the type {self.type_name(name)}, which the package gguf does not decode",
                field=str(self.path),
                hint="Use another quantization of this model, such as Q8_0 or Q4_K_M.",
            ) from None
        return np.array(numbers, np.float32).reshape(tensor.shape)  # of its own: what is a view cannot be written to

    def _take(self, code: str) -> Any:
        value = struct.unpack_from("<" + code, self._map, self._at)[0]
        self._at += struct.calcsize("<" + code)
        return value

    def _text(self) -> str:
        size = self._take("Q")
        if size > len(self._map) - self._at:
            raise ValueError(f"a text of {size:,} bytes at byte {self._at:,} reaches beyond its end")
        self._at += size
        return self._map[self._at - size : self._at].decode("utf-8", errors="replace")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        if kind in _SCALARS:
            return self._take(_SCALARS[kind])
        if kind != _ARRAY:
            raise ValueError(f"a value at byte {self._at:,} is of the unknown type {kind}")
        inner, count = self._take("I"), self._take("Q")
        if count > len(self._map) - self._at or inner == _ARRAY:
            raise ValueError(f"an array at byte {self._at:,} has {count:,} entries of type {inner}")
        if inner == _STRING:
            return [self._text() for _ in range(count)]
        if inner not in _SCALARS:
            raise ValueError(f"an array at byte {self._at:,} is of the unknown type {inner}")
        found = struct.unpack_from(f"<{count}{_SCALARS[inner]}", self._map, self._at)
        self._at += struct.calcsize(f"<{count}{_SCALARS[inner]}")
        return list(found)

    def _shape(self) -> tuple[int, ...]:
        count = self._take("I")
        if not 1 <= count <= 4:
            raise ValueError(f"a tensor has {count} dimensions")
        return tuple(self._take("Q") for _ in range(count))[::-1]

    def _place(
        self, name: str, shape: tuple[int, ...], block: tuple[int, int] | None, kind: int, start: int
    ) -> GgufTensor:
        if block is None:
            raise ValueError(f"tensor {name!r} is of the unknown type {kind}")
        per_block, block_bytes = block
        count = math.prod(shape)
        nbytes = count // per_block * block_bytes
        if not 1 <= count <= _MAX_SIZE or shape[-1] % per_block or start + nbytes > len(self._map):
            raise ValueError(f"tensor {name!r} {list(shape)} at byte {start:,} reaches beyond its end")
        return GgufTensor(kind, shape, start, nbytes)


def open_gguf(path: str | Path) -> GgufFile:
    """The parsed header of a GGUF file, read once as long as the file stays the same.

    Raises:
        CheckpointError: it cannot be read, is cut, damaged, or no GGUF file at all.
    """
    path = Path(path).expanduser()
    try:
        status = path.stat()
        return _open(path, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", field=str(path)) from None
    except (ValueError, struct.error, OverflowError, MemoryError) as error:
        words = "its header ends too early" if isinstance(error, struct.error) else str(error)
        raise CheckpointError(
            f"is damaged or not a GGUF file: {words}", field=str(path), hint="Get the file again."
        ) from None


def _block_sizes() -> dict[int, tuple[int, int]]:
    """Numbers and bytes of a block, by type."""
    import gguf

    return {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}


@functools.lru_cache(maxsize=2)
def _open(path: Path, size: int, changed: int) -> GgufFile:
    return GgufFile(path)
