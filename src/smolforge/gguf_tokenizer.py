"""A `tokenizers` tokenizer from the metadata of a GGUF file, equal to the tokenizer.json that the file was made from.

GGUF names how text is split instead of describing it: `tokenizer.ggml.model` is `gpt2` (byte-level BPE, whose pattern
`tokenizer.ggml.pre` names) or `llama` (sentencepiece, whose merges follow from the scores of its tokens). A name that
is not known here is refused, since another pattern would load and give other tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from smolforge.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

    from smolforge.gguf_file import GgufFile

_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 2, 3, 4, 5  # tokenizer.ggml.token_type
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{DIGITS}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The patterns of those tokenizers whose own is not GPT-2's.
PATTERNS = {"llama-bpe": _WORDS.replace("{DIGITS}", "{1,3}"), "qwen2": _WORDS.replace("{DIGITS}", "")}
SPLITS = ("smollm", "gpt-2", *PATTERNS)
# Tokens that end a turn, where the file does not name one (as llama.cpp looks for them).
ENDS_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")


def gguf_tokenizer(file: GgufFile) -> tuple[Backend, dict[str, Any]]:
    """The tokenizer of a file, and what its tokenizer_config.json would hold.

    Raises:
        CheckpointError: the file has no tokenizer, or one that is not known here; its name is given.
    """
    metadata, where = file.metadata, str(file.path)
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or len(set(tokens)) != len(tokens):
        repeated = "a token twice in" if tokens else "no"
        raise CheckpointError(f"has {repeated} tokenizer.ggml.tokens", field=where)
    kinds = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
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
        ends = [
            i for i, (t, kind) in enumerate(zip(tokens, kinds, strict=False)) if kind == _CONTROL and t in ENDS_OF_TURN
        ]
        found += ends[:1]
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
    pairs = [tuple(merge.split(" ", 1)) for merge in merges or [] if isinstance(merge, str)]
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
    if not isinstance(scores, list) or len(scores) != len(tokens):
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

    known = len(kinds) == len(tokens) and any(kind == _CONTROL for kind in kinds)
    special = [i for i, kind in enumerate(kinds) if kind in (_UNKNOWN, _CONTROL)] if known else sorted(named)
    backend.add_special_tokens([AddedToken(tokens[i], special=True, normalized=False) for i in special])
    added = [i for i, kind in enumerate(kinds) if kind == _USER_DEFINED]
    backend.add_tokens([AddedToken(tokens[i], special=False, normalized=False) for i in added])
