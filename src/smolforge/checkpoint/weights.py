"""Read untrusted safetensors files.

The safetensors library checks a header before it maps the file: lengths, offsets, shapes and types must agree, and the
tensors must fill the file without overlap. So a forged header cannot make us allocate, read outside the file, or read
one tensor's bytes as another's. Tensors are views of the mapped file: nothing is copied until it is used. Pickle is
never read.

Format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from smolforge.checkpoint.gguf import read_gguf_weights
from smolforge.errors import CheckpointError, RunFailed
from smolforge.files import read_json
from smolforge.gguf_file import is_gguf, open_gguf

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "model.safetensors"
SHARD_INDEX = "model.safetensors.index.json"
MAX_SHARDS = 10_000
_LIBRARY_WORDS = "Error while deserializing header: "
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@contextlib.contextmanager
def _open_safetensors(path: Path, framework: str) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror or error}", field=str(path)) from None
    except (SafetensorError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        problem = f"is damaged or not a safetensors file: {str(error).removeprefix(_LIBRARY_WORDS)}"
        raise CheckpointError(problem, field=str(path), hint="Get the file again.") from None


def check_safetensors(path: Path) -> None:
    """Raise CheckpointError where a file is missing, cut, or its header does not fit its size; nothing is loaded."""
    with _open_safetensors(path, "numpy"):
        pass


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file by name, as views of the mapped file on the CPU; CheckpointError where it is damaged."""
    with _open_safetensors(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is not a dict)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors to one safetensors file, which whoever may read other new files of this process may read."""
    from safetensors.torch import save_file

    # The library makes files that only their owner may read (0600). One made by open() has the mode that umask says.
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata=metadata)
    path.chmod(mode)


def write_shard_index(directory: Path, names: Collection[str]) -> None:
    """Write the index of a model whose weights are in several files of `directory`, which must hold `names` together.

    Raises:
        RunFailed: they do not.
    """
    files = {path.name: read_safetensors(path) for path in sorted(directory.glob("model-*.safetensors"))}
    mapping = {name: file for file, tensors in files.items() for name in tensors}
    if different := sorted(mapping.keys() ^ set(names)):
        raise RunFailed(f"the parts of the checkpoint do not make up the model: {different[0]}")
    size = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
    content = {"metadata": {"total_size": size}, "weight_map": {name: mapping[name] for name in names}}
    (directory / SHARD_INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files with the weights of a model directory: one, or the shards that its index names. A GGUF file
    is its own.

    Raises:
        CheckpointError: there are none, only pickles, or the index names a file that it must not.
    """
    if is_gguf(directory):
        return [directory]
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    index = directory / SHARD_INDEX
    if not index.is_file():
        pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
        if not pickles:
            raise CheckpointError(f"{directory} has neither {WEIGHTS} nor {SHARD_INDEX}")
        problem = f"{directory} has its weights only as pickle ({pickles[0]}), which can run any code when it is read"
        hint = "Convert it once where you trust it: transformers' save_pretrained writes model.safetensors."
        raise CheckpointError(problem, hint=hint)
    names = sorted(set(_weight_map(index).values()))
    if not 1 <= len(names) <= MAX_SHARDS:
        raise CheckpointError(f"names {len(names):,} files", field=f"{index}: weight_map")
    for name in names:
        if "/" in name or not name.endswith(".safetensors") or not is_inside(name):
            raise CheckpointError(
                f"{name!r} is not a shard of this directory", field=f"{index}: weight_map",
                hint="Only plain names of .safetensors files inside the directory are read.",
            )  # fmt: skip
        if not (directory / name).is_file():
            raise CheckpointError(f"the shard {name} is missing", field=str(index))
    return [directory / name for name in names]


def is_inside(name: str) -> bool:
    """Whether `name` is the relative path of a file inside a directory: no parents, no roots, nothing odd."""
    parts = PurePosixPath(name).parts
    odd = any(char in name for char in "\\:") or not name.isprintable() or len(name) > 200
    return bool(parts) and not name.startswith("/") and ".." not in parts and not odd


def _weight_map(index: Path) -> dict[str, str]:
    mapping = read_json(index).get("weight_map")
    if not isinstance(mapping, dict) or not all(isinstance(name, str) for name in mapping.values()):
        raise CheckpointError("must map tensor names to file names", field=f"{index}: weight_map")
    return mapping


def read_weights(directory: Path) -> dict[str, Tensor]:
    """All tensors of a model directory by name, mapped, from one file or from shards; those of a GGUF file, decoded.

    Raises:
        CheckpointError: a file is missing or damaged, or the shards do not hold what the index says.
    """
    files = weight_files(directory)
    if files[0] == directory:
        return read_gguf_weights(open_gguf(directory))
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
        problem = f"tensor {missing[0]!r} is not in {mapping[missing[0]]}"
        raise CheckpointError(problem, field=str(directory / SHARD_INDEX))
    return weights
