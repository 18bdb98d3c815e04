"""Reading safetensors that nobody vouches for.

A header is a promise about the bytes that follow. Before the library maps a file, the promise is checked against
the size of the file: lengths, offsets, shapes and types must agree, tensors must not overlap and must fill the
file. So a forged header cannot make us allocate, read outside, or read one tensor's bytes as another's. Tensors
are views of the mapped file: nothing is copied until it is used. Pickle is never read.

Format: https://huggingface.co/docs/safetensors (8 bytes little-endian header length, JSON header, data).
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NoReturn

from smolforge.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "model.safetensors"
SHARD_INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100 << 20  # the safetensors library's own limit
MAX_JSON_BYTES = 64 << 20
MAX_DIMENSIONS = 16
MAX_SHARDS = 10_000
# Bytes of one element. The types that torch and safetensors both know and that hold whole bytes.
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class Entry:
    """What a safetensors header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_json(path: Path, *, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file of bounded size.

    Raises:
        CheckpointError: missing, too large, no JSON, a key given twice, or no object.
    """
    try:
        size = path.stat().st_size
        if size > limit:
            raise CheckpointError(f"{size:,} bytes are too many for this file", field=str(path))
        return parse_object(path.read_bytes(), str(path))
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", field=str(path)) from None


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `data`, with repeated keys refused.

    Raises:
        CheckpointError: naming `where`.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"is not JSON: {error}", field=where) from None
    if not isinstance(value, dict):
        raise CheckpointError("must hold a JSON object", field=where)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in value if names.count(name) > 1)
        raise ValueError(f"the key {repeated!r} is given twice")
    return value


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors that a safetensors file holds, after checking every promise of its header.

    Raises:
        CheckpointError: the file is missing, cut, or its header does not fit its size.
    """
    where = str(path)

    def bad(message: str) -> NoReturn:
        raise CheckpointError(message, field=where, hint="The file is damaged or was made up; get it again.")

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                bad(f"is cut: {size} bytes hold no safetensors header")
            length = int.from_bytes(prefix, "little")
            if length > min(size - 8, MAX_HEADER_BYTES):
                bad(f"its header claims {length:,} bytes, but the file has {size:,}")
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", field=where) from None
    header = parse_object(raw, f"{where}: header")
    header.pop("__metadata__", None)
    entries = {name: _entry(name, value, bad) for name, value in header.items()}
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            what = "overlaps another tensor" if entry.begin < position else "leaves a hole before it"
            bad(f"tensor {name!r} {what} (it begins at {entry.begin:,}, expected {position:,})")
        position = entry.end
    if position != size - 8 - length:
        bad(f"holds {size - 8 - length:,} bytes of tensors, but its header describes {position:,}")
    return entries


def _entry(name: str, value: Any, bad: Any) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        bad(f"tensor {name!r} needs dtype, shape and data_offsets in the header")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        bad(f"tensor {name!r} has the type {dtype!r}; known: {', '.join(ITEM_BYTES)}")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        bad(f"tensor {name!r} has the shape {shape!r}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        bad(f"tensor {name!r} has the offsets {offsets!r}")
    needed = math.prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != needed:
        bad(f"tensor {name!r} of {dtype} {shape} needs {needed:,} bytes, but has {offsets[1] - offsets[0]:,}")
    return Entry(dtype, tuple(shape), offsets[0], offsets[1])


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 62 for v in values)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one checked file, as views of the mapped file on the CPU.

    Raises:
        CheckpointError: the file does not pass `read_header`.
    """
    from safetensors import SafetensorError, safe_open

    names = read_header(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, RuntimeError, ValueError, OSError) as error:
        raise CheckpointError(f"cannot be read: {error}", field=str(path)) from None


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files with the weights of a model directory: one, or the shards that its index names.

    Raises:
        CheckpointError: there are none, only pickles, or the index names a file that it must not.
    """
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    index = directory / SHARD_INDEX
    if not index.is_file():
        _explain_missing(directory)
    names = sorted(set(_weight_map(index).values()))
    if not 1 <= len(names) <= MAX_SHARDS:
        raise CheckpointError(f"names {len(names):,} files", field=f"{index}: weight_map")
    for name in names:
        if not is_plain_name(name) or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{name!r} is no shard of this directory", field=f"{index}: weight_map",
                hint="Only plain names of .safetensors files inside the directory are read.",
            )  # fmt: skip
        if not (directory / name).is_file():
            raise CheckpointError(f"the shard {name} is missing", field=str(index))
    return [directory / name for name in names]


def is_plain_name(name: str) -> bool:
    """Whether `name` is that of a file directly inside a directory: no separators, no parents, no roots."""
    return PurePosixPath(name).name == name and not re.search(r"[\\/\0:]", name) and name not in ("", ".", "..")


def _weight_map(index: Path) -> dict[str, str]:
    mapping = read_json(index).get("weight_map")
    if not isinstance(mapping, dict) or not all(isinstance(name, str) for name in mapping.values()):
        raise CheckpointError("must map tensor names to file names", field=f"{index}: weight_map")
    return mapping


def _explain_missing(directory: Path) -> NoReturn:
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{directory} has its weights only as pickle ({pickles[0]}), which can run any code when it is read",
            hint="Convert it once where you trust it: transformers' save_pretrained writes model.safetensors.",
        )
    raise CheckpointError(f"{directory} has neither {WEIGHTS} nor {SHARD_INDEX}")


def read_weights(directory: Path) -> dict[str, Tensor]:
    """All tensors of a model directory by name, mapped, from one file or from shards.

    Raises:
        CheckpointError: a file is missing or damaged, or the shards do not hold what the index says.
    """
    files = weight_files(directory)
    if files[0].name == WEIGHTS:
        return read_safetensors(files[0])
    mapping = _weight_map(directory / SHARD_INDEX)
    weights: dict[str, Tensor] = {}
    for path in files:
        for name, tensor in read_safetensors(path).items():
            if mapping.get(name) != path.name:
                said = f"the index puts it in {mapping[name]}" if name in mapping else "the index does not name it"
                raise CheckpointError(f"holds tensor {name!r}, but {said}", field=str(path))
            weights[name] = tensor
    missing = sorted(set(mapping) - set(weights))
    if missing:
        raise CheckpointError(
            f"tensor {missing[0]!r} is not in {mapping[missing[0]]}", field=str(directory / SHARD_INDEX)
        )
    return weights
