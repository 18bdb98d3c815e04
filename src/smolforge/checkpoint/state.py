"""Save and load a tree of training state exactly, without pickle.

Tensors go to tensors.safetensors, the tree around them to state.json. A value that JSON cannot express becomes an
object with one key that begins with `$`: a tensor's name, a tuple, bytes, a dict with keys other than strings, a float
that is not finite, an integer beyond 2**53 (which other readers of JSON would round).
"""

from __future__ import annotations

import base64
import json
import math
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolforge.checkpoint.weights import read_safetensors, write_safetensors
from smolforge.errors import CheckpointError
from smolforge.files import read_json

if TYPE_CHECKING:
    from torch import Tensor

TREE = "state.json"
TENSORS = "tensors.safetensors"
MAX_TREE_BYTES = 1 << 30
_FORMAT = 1
_EXACT = 1 << 53


def save_state(directory: Path, tree: Any, *, part: str = "") -> None:
    """Write `tree` into `directory` (made if missing).

    Args:
        tree: nested dicts, lists and tuples of tensors, numpy arrays, numbers, strings, bytes, booleans and None.
            Tensors come back on the CPU, without gradients; subclasses of dict come back as dict. Other
            types are refused rather than changed silently. Tensors without memory (meta) are those that another
            process writes.
        part: end of the name of the file of tensors, where several processes write one.

    Raises:
        TypeError: a value of another type, named by its path in the tree.
    """
    directory.mkdir(parents=True, exist_ok=True)
    writer = _Writer()
    encoded = {"format": _FORMAT, "tree": writer.encode(tree, "")}
    write_safetensors((directory / TENSORS).with_stem(f"{Path(TENSORS).stem}{part}"), writer.tensors)
    (directory / TREE).write_text(json.dumps(encoded, allow_nan=False) + "\n", encoding="utf-8")


def tensors_of(tree: Any) -> dict[str, Tensor]:
    """The tensors of a tree by the names under which `save_state` writes them; those without memory are left out."""
    writer = _Writer()
    writer.encode(tree, "")
    return writer.tensors


def load_state(directory: Path) -> Any:
    """The tree that `save_state` wrote. Tensors are private views of the mapped file: writing to them is safe.

    Raises:
        CheckpointError: a file is missing or damaged; it is named.
    """
    path = directory / TREE
    if not path.is_file():
        hint = "This checkpoint holds a model, but no state of training; start from it with --init."
        raise CheckpointError(f"{directory} has no {TREE}", hint=hint)
    content = read_json(path, limit=MAX_TREE_BYTES)
    if content.get("format") != _FORMAT or "tree" not in content:
        raise CheckpointError(f"has format {content.get('format')!r}, expected {_FORMAT}", field=str(path))
    files = sorted(directory.glob(f"{Path(TENSORS).stem}*.safetensors")) or [directory / TENSORS]
    tensors = {name: tensor for file in files for name, tensor in read_safetensors(file).items()}
    try:
        return _decode(content["tree"], tensors)
    except (ValueError, KeyError, TypeError, IndexError, RecursionError, struct.error) as error:
        raise CheckpointError(f"is damaged: {type(error).__name__}: {error}", field=str(path)) from None


class _Writer:
    """Encodes a tree and gathers its tensors under the names of their places."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[int, tuple[str, Any]] = {}  # by identity: a tensor used twice is stored once
        self._storages: set[int] = set()
        self._taken = {"__metadata__"}

    def encode(self, value: Any, path: str) -> Any:
        import numpy as np
        import torch

        kind = type(value)
        if value is None or kind in (bool, str):
            return value
        if kind is int:
            return value if -_EXACT <= value <= _EXACT else {"$int": hex(value)}
        if kind is float:
            return value if math.isfinite(value) else {"$float": struct.pack(">d", value).hex()}
        if kind is bytes:
            return {"$bytes": base64.b64encode(value).decode("ascii")}
        if isinstance(value, torch.Tensor):
            return {"$tensor": self._store(value, value, path)}
        if isinstance(value, np.ndarray):
            if value.dtype.kind not in "biuf" or value.dtype.byteorder == ">":
                raise TypeError(f"state{path}: arrays of {value.dtype} cannot be stored")
            return {"$array": self._store(value, torch.from_numpy(np.array(value)), path)}
        if kind is list:
            return [self.encode(inner, f"{path}.{i}") for i, inner in enumerate(value)]
        if isinstance(value, tuple):
            return {"$tuple": [self.encode(inner, f"{path}.{i}") for i, inner in enumerate(value)]}
        if isinstance(value, dict):
            if all(type(key) is str and not key.startswith("$") for key in value):
                return {key: self.encode(inner, f"{path}.{key}") for key, inner in value.items()}
            pairs = [(self.encode(key, f"{path}.key"), self.encode(v, f"{path}.{key}")) for key, v in value.items()]
            return {"$dict": pairs}
        raise TypeError(f"state{path}: a {kind.__module__}.{kind.__qualname__} cannot be stored")

    def _store(self, original: Any, tensor: Tensor, path: str) -> str:
        if id(original) in self._names:
            return self._names[id(original)][0]
        name = path.lstrip(".") or "tensor"
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        self._names[id(original)] = (name, original)  # the reference keeps the id from being used again
        if tensor.device.type == "meta":
            return name
        # A copy where the tensor is a part of a larger storage or shares it: the library stores whole ones only.
        plain = tensor.detach().to("cpu").contiguous()
        storage = plain.untyped_storage()
        if storage.nbytes() != plain.numel() * plain.element_size() or storage.data_ptr() in self._storages:
            plain = plain.clone()
        self._storages.add(plain.untyped_storage().data_ptr())
        self.tensors[name] = plain
        return name


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(inner, tensors) for inner in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        (tag, inner), *_ = value.items()
        if tag == "$tensor":
            return tensors[inner]
        if tag == "$array":
            return tensors[inner].numpy()
        if tag == "$tuple":
            return tuple(_decode(part, tensors) for part in inner)
        if tag == "$dict":
            return {_decode(key, tensors): _decode(part, tensors) for key, part in inner}
        if tag == "$int":
            return int(inner, 16)
        if tag == "$float":
            return struct.unpack(">d", bytes.fromhex(inner))[0]
        if tag == "$bytes":
            return base64.b64decode(inner, validate=True)
    if any(key.startswith("$") for key in value):
        raise ValueError(f"unknown mark {next(key for key in value if key.startswith('$'))!r}")
    return {key: _decode(inner, tensors) for key, inner in value.items()}
