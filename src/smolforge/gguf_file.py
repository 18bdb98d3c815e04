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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolforge.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer as Backend

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
    """A matrix as a GGUF file stores it, which a parameter of a model carries as its attribute `blocks`."""

    kind: str  # Q8_0, Q4_0 or Q4_1: 32 weights of a row share a scale
    rows: np.ndarray  # (rows, bytes of a row)
    version: int = 0  # the parameter's `_version` when it was read; with another one, its numbers have changed since


def blocks_of(parameter: Any) -> Blocks | None:
    """The blocks whose numbers a parameter has, or None."""
    blocks = getattr(parameter, "blocks", None)
    return blocks if blocks is not None and blocks.version == parameter._version else None


class GgufFile:
    """An open file: its `metadata`, all keys with their values, and where each of its `tensors` lies, by name."""

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
            found = "a big-endian file" if version in (2 << 24, 3 << 24) else f"version {version} of the format"
            raise ValueError(f"{found} is not read, only little-endian ones of the versions 2 and 3")
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
        self.tensors = {name: self._place(name, shape, kind, data + at) for name, shape, kind, at in found}

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
            problem = f"tensor {name!r} is of the type {self.type_name(name)}, which the package gguf does not decode"
            hint = "Use another quantization of this model, such as Q8_0 or Q4_K_M."
            raise CheckpointError(problem, field=str(self.path), hint=hint) from None
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

    def _place(self, name: str, shape: tuple[int, ...], kind: int, start: int) -> GgufTensor:
        import gguf

        if kind not in gguf.GGML_QUANT_SIZES:
            raise ValueError(f"tensor {name!r} is of the unknown type {kind}")
        per_block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
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
        problem = f"is damaged or not a GGUF file: {words}"
        raise CheckpointError(problem, field=str(path), hint="Get the file again.") from None


@functools.lru_cache(maxsize=2)
def _open(path: Path, size: int, changed: int) -> GgufFile:
    return GgufFile(path)


# The tokenizer: equal to the tokenizer.json that the file was made from. GGUF names how text is split instead of
# describing it, and a name that is not known here is refused, since another pattern would load and give other tokens.

_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 2, 3, 4, 5  # tokenizer.ggml.token_type
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{DIGITS}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The patterns of those tokenizers whose own is not GPT-2's.
PATTERNS = {"llama-bpe": _WORDS.replace("{DIGITS}", "{1,3}"), "qwen2": _WORDS.replace("{DIGITS}", "")}
_ARRAYS = {"tokens": str, "token_type": int, "merges": str, "scores": float}  # tokenizer.ggml.*
SPLITS = ("smollm", "gpt-2", *PATTERNS)
# Tokens that end a turn, where the file does not name one (as llama.cpp looks for them).
ENDS_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")


def gguf_tokenizer(file: GgufFile) -> tuple[Backend, dict[str, Any]]:
    """The tokenizer of a file, and what its tokenizer_config.json would hold.

    `tokenizer.ggml.model` is `gpt2` (byte-level BPE, whose pattern `tokenizer.ggml.pre` names) or `llama`
    (sentencepiece, whose merges follow from the scores of its tokens).

    Raises:
        CheckpointError: the file has no tokenizer, or one that is not known here; its name is given.
    """
    metadata, where = file.metadata, str(file.path)
    for name, entry in _ARRAYS.items():
        found = metadata.get(f"tokenizer.ggml.{name}", [])
        if not isinstance(found, list) or (found and not isinstance(found[0], entry)):
            raise CheckpointError(f"is not an array of {entry.__name__}", field=f"{where}: tokenizer.ggml.{name}")
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    if not tokens or len(set(tokens)) != len(tokens):
        repeated = "a token twice in" if tokens else "no"
        raise CheckpointError(f"has {repeated} tokenizer.ggml.tokens", field=where)
    kinds = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if len(kinds) != len(tokens):
        raise CheckpointError(f"has {len(kinds)} tokenizer.ggml.token_type for {len(tokens)} tokens", field=where)
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        backend, add_bos = _byte_level(metadata, tokens, where)
    elif kind == "llama":
        backend, add_bos = _sentencepiece(metadata, tokens, kinds, where), True
    else:
        raise CheckpointError(
            f"the tokenizer {kind!r} is not supported", field=f"{where}: tokenizer.ggml.model",
            hint="Supported: gpt2 (byte-level BPE) and llama (sentencepiece).",
        )  # fmt: skip
    _add_tokens(backend, tokens, kinds, set(_special_ids(metadata).values()))
    config: dict[str, Any] = {f"{name}_token": tokens[i] for name, i in _special_ids(metadata).items()}
    config["add_bos_token"] = bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos))
    if config["add_bos_token"] and "bos_token" in config:
        from tokenizers import processors

        bos = config["bos_token"]
        backend.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single=[bos, "$A"], special_tokens=[(bos, tokens.index(bos))]
        )
    if isinstance(template := metadata.get("tokenizer.chat_template"), str):
        config["chat_template"] = template
    return backend, config


def end_ids(metadata: dict[str, Any]) -> list[int]:
    """The tokens after which a text ends: those of the end of a text, a turn and a message that the file names."""
    names = ("eos", "eot", "eom")
    found = [metadata[key] for name in names if type(metadata.get(key := f"tokenizer.ggml.{name}_token_id")) is int]
    if "tokenizer.ggml.eot_token_id" not in metadata:
        tokens, kinds = metadata.get("tokenizer.ggml.tokens", []), metadata.get("tokenizer.ggml.token_type", [])
        named = enumerate(zip(tokens, kinds, strict=False))
        found += [i for i, (token, kind) in named if kind == _CONTROL and token in ENDS_OF_TURN][:1]
    return list(dict.fromkeys(found))


def _special_ids(metadata: dict[str, Any]) -> dict[str, int]:
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    found = {ours: metadata.get(f"tokenizer.ggml.{name}_token_id") for name, ours in names.items()}
    size = len(metadata["tokenizer.ggml.tokens"])
    return {name: i for name, i in found.items() if type(i) is int and 0 <= i < size}


def _byte_level(metadata: dict[str, Any], tokens: list[str], where: str) -> tuple[Backend, bool]:
    """The tokenizer, and whether a text begins with the first token unless the file says otherwise."""
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    split, merges = metadata.get("tokenizer.ggml.pre"), metadata.get("tokenizer.ggml.merges")
    if split not in SPLITS:
        raise CheckpointError(
            f"the splitting {split!r} is not supported", field=f"{where}: tokenizer.ggml.pre",
            hint=f"Supported: {', '.join(SPLITS)}.",
        )  # fmt: skip
    pairs = [tuple(merge.split(" ", 1)) for merge in merges or []]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise CheckpointError("has no tokenizer.ggml.merges, or one that is not a pair", field=where)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    try:
        # Llama 3 takes a whole word that is a token as that one, whatever the merges say.
        backend = Backend(models.BPE(vocabulary, pairs, ignore_merges=split == "llama-bpe"))  # type: ignore[arg-type]
    except Exception as error:  # the library raises Exception itself
        raise CheckpointError(f"the merges do not belong to the tokens: {error}", field=where) from None
    pattern = PATTERNS.get(split)
    first = pre_tokenizers.Digits(individual_digits=True) if split == "smollm" else None
    if pattern:
        first = pre_tokenizers.Split(Regex(pattern), "isolated")
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(([first] if first else []) + steps)  # type: ignore[assignment]
    if split == "qwen2":
        backend.normalizer = normalizers.NFC()  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return backend, split == "llama-bpe"


def _sentencepiece(metadata: dict[str, Any], tokens: list[str], kinds: Sequence[int], where: str) -> Backend:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers

    scores = metadata.get("tokenizer.ggml.scores")
    if not scores or len(scores) != len(tokens):
        raise CheckpointError("has no tokenizer.ggml.scores for its tokens", field=where)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    pairs = merges_of_scores(tokens, kinds, scores)
    unknown = next((tokens[i] for i, kind in enumerate(kinds) if kind == _UNKNOWN), None)
    backend = Backend(models.BPE(vocabulary, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaces: list[Any] = [normalizers.Replace(" ", "\u2581")]
    words: list[Any] = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend("\u2581"))
        words.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence(spaces)  # type: ignore[assignment]
    backend.decoder = decoders.Sequence(words)  # type: ignore[assignment]
    return backend


def merges_of_scores(tokens: list[str], kinds: Sequence[int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The merges of a sentencepiece vocabulary, best first: every pair of tokens that makes a token, by its score."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token, kind, score in zip(tokens, kinds, scores, strict=True):
        if kind in (_UNKNOWN, _CONTROL, _UNUSED):
            continue
        parts = [(token[:at], token[at:]) for at in range(1, len(token))]
        found = [(left, right) for left, right in parts if left in vocabulary and right in vocabulary]
        merges += [(-score, vocabulary[left], vocabulary[right], left, right) for left, right in found]
    return [(left, right) for *_, left, right in sorted(merges)]


def _add_tokens(backend: Backend, tokens: list[str], kinds: Sequence[int], named: set[int]) -> None:
    """Mark the tokens that are matched in text as a whole; those of the kind control are special."""
    from tokenizers import AddedToken

    known = any(kind == _CONTROL for kind in kinds)
    special = [i for i, kind in enumerate(kinds) if kind in (_UNKNOWN, _CONTROL)] if known else sorted(named)
    backend.add_special_tokens([AddedToken(tokens[i], special=True, normalized=False) for i in special])
    added = [i for i, kind in enumerate(kinds) if kind == _USER_DEFINED]
    backend.add_tokens([AddedToken(tokens[i], special=False, normalized=False) for i in added])
