"""A tokenizer as GGUF wants it: every id has a token and a type, merges in their order, a name for the splitting.

llama.cpp does not read tokenizer.json. It knows splitting rules by name; a tokenizer whose rule has no name there would
load and silently give other tokens, so it is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smolforge.errors import BadInput

if TYPE_CHECKING:
    from smolforge.tokenizer import Tokenizer


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE as GGUF wants it: every id has a token, a type, and the merges come in their order."""

    tokens: list[str]
    special: frozenset[int]
    added: frozenset[int]
    unused: frozenset[int]
    merges: list[str]
    rule: str
    ids: dict[str, int]
    chat_template: str | None

    @classmethod
    def of(cls, tokenizer: Tokenizer, size: int) -> Vocabulary:
        """The vocabulary of a tokenizer for a model with `size` rows; rows without a token are filled.

        Raises:
            BadInput: llama.cpp has no equal tokenizer; says what it is about this one.
        """
        file = json.loads(tokenizer.backend.to_str())
        added = {entry["id"]: entry for entry in file.get("added_tokens") or []}
        tokens = [tokenizer.token_text(i) for i in range(size)]
        unused = frozenset(i for i, token in enumerate(tokens) if not token)
        for i in unused:
            tokens[i] = f"[PAD{i}]"
        special = frozenset(i for i, entry in added.items() if entry["special"])
        return cls(
            tokens=tokens,
            special=special,
            added=frozenset(added) - special,
            unused=unused,
            merges=list(_merges(file)),
            rule=_rule(file),
            ids=_special_ids(tokenizer),
            chat_template=tokenizer.chat_template,
        )

    def write(self, gguf: Any, writer: Any) -> None:
        """Add it to the header of a file."""
        types = gguf.TokenType
        groups = ((self.unused, types.UNUSED), (self.special, types.CONTROL), (self.added, types.USER_DEFINED))
        kinds = [int(types.NORMAL)] * len(self.tokens)
        for ids, kind in groups:
            for i in ids:
                kinds[i] = int(kind)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.rule)
        writer.add_token_list(self.tokens)
        writer.add_token_types(kinds)
        writer.add_token_merges(self.merges)
        for name, found in self.ids.items():
            getattr(writer, f"add_{name}_token_id")(found)
        # The models are trained without a token at the beginning, and on text as it stands.
        writer.add_add_bos_token(False)
        writer.add_add_space_prefix(False)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def _special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    ids = {"eos": tokenizer.eos_id}
    for name in ("bos", "unk", "pad"):
        token = tokenizer.config.get(f"{name}_token")
        text = token.get("content") if isinstance(token, dict) else token
        found = tokenizer.backend.token_to_id(text) if isinstance(text, str) else None
        if found is not None:
            ids[name] = found
    return ids


def _merges(file: dict[str, Any]) -> Iterator[str]:
    for merge in file["model"]["merges"]:
        yield merge if isinstance(merge, str) else " ".join(merge)


def _rule(file: dict[str, Any]) -> str:
    """llama.cpp's name for how the tokenizer splits text before merging (`tokenizer.ggml.pre`)."""
    model = file["model"]
    if (
        model.get("type") != "BPE"
        or model.get("byte_fallback")
        or (file.get("decoder") or {}).get("type") != "ByteLevel"
    ):
        raise BadInput(
            f"the tokenizer is a {model.get('type')} with the decoder {(file.get('decoder') or {}).get('type')}",
            field="tokenizer",
            hint="Only byte-level BPE tokenizers can be exported to GGUF.",
        )
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise BadInput(f"the tokenizer has {key} {model[key]!r}, which llama.cpp does not", field="tokenizer")
    if file.get("normalizer") is not None:
        raise BadInput(
            f"the tokenizer changes text by {file['normalizer'].get('type')} first, which llama.cpp does not",
            field="tokenizer",
        )
    splitter = file.get("pre_tokenizer") or {}
    steps: list[dict[str, Any]] = splitter["pretokenizers"] if splitter.get("type") == "Sequence" else [splitter]
    shapes = [_shape(step) for step in steps]
    if shapes == ["digits", "bytes"]:
        return "smollm"
    if shapes == ["bytes"]:
        return "gpt-2"
    kinds = " then ".join(str(step.get("type")) for step in steps)
    raise BadInput(
        f"the tokenizer splits text by {kinds}, for which no rule of llama.cpp is known here",
        field="tokenizer",
        hint="Known: single digits then GPT-2's pattern (SmolLM2's and ours), and GPT-2's pattern alone.",
    )


def _shape(step: dict[str, Any]) -> str | None:
    if step.get("type") == "Digits" and step.get("individual_digits"):
        return "digits"
    if step.get("type") == "ByteLevel" and step.get("use_regex", True) and not step.get("add_prefix_space"):
        return "bytes"
    return None
