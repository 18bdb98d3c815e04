"""Constrained decoding: only tokens that a grammar allows are drawn, so that the text is what the grammar describes.

The parser is llguidance (of the extra `web`): it turns a JSON schema or a Lark grammar into the set of allowed tokens
of each step, in about 0.1 ms. A `Grammar` is compiled once for a request; each sequence follows it with a `Matcher` of
its own, and so does each copy of a sampler that drafts.

https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterable
from typing import Any

import numpy as np

from smolforge.errors import BadInput
from smolforge.tokenizer import Tokenizer

logger = logging.getLogger(__name__)
# One way to write each value: whitespace that a schema leaves free would let a small model write nothing else.
_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Matcher:
    """Where one sequence stands in its grammar. A grammar that has ended allows nothing but the end of the text."""

    def __init__(self, matcher: Any, eos_ids: Iterable[int], vocab_size: int) -> None:
        self._matcher, self._eos_ids, self._vocab_size = matcher, list(eos_ids), vocab_size
        self.failed = False  # the parser gave up on a schema with thousands of alternatives: the text is cut off there

    def allowed(self) -> np.ndarray:
        """Which tokens may come next, bool (V,)."""
        if self._matcher.is_stopped():
            allowed = np.zeros(self._vocab_size, bool)
            allowed[self._eos_ids] = True
            return allowed
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        return np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(bool)

    def accept(self, token_id: int) -> None:
        """Follow a token that was written."""
        if not self._matcher.is_stopped() and not self._matcher.consume_token(token_id):
            self.failed = True
            reason = self._matcher.get_error().partition("\n")[0]
            logger.warning("a grammar could not be followed, so its text is cut off: %s", reason[:300])

    def fork(self) -> Matcher:
        """A copy that goes its own way."""
        return Matcher(self._matcher.deep_copy(), self._eos_ids, self._vocab_size)


class Grammar:
    """A compiled grammar for the tokenizer of one engine. Made by `GrammarCompiler`."""

    def __init__(self, compiled: Any, eos_ids: Iterable[int], vocab_size: int) -> None:
        self._start = Matcher(compiled, eos_ids, vocab_size)

    def matcher(self) -> Matcher:
        """A matcher at the beginning of the grammar."""
        return self._start.fork()


class GrammarCompiler:
    """Compiles grammars for one tokenizer and logits of `vocab_size` rows. Any thread may use it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Iterable[int]) -> None:
        self._tokenizer, self._vocab_size, self._eos_ids = tokenizer, vocab_size, sorted(eos_ids)

    def json_schema(self, schema: dict[str, Any], *, field: str = "response_format") -> Grammar:
        """A JSON value of this schema. An object has no keys beside its `properties` unless the schema allows them.

        Raises:
            BadInput: llguidance is not installed, or the schema is wrong or beyond what it supports; names `field`.
        """
        return self.lark(f"start: {json_rule(schema)}\n", field=field)

    def lark(self, grammar: str, *, field: str) -> Grammar:
        """A text of this grammar, in llguidance's form of Lark; raises as `json_schema` does."""
        library = _llguidance(field)
        limits = library.LLParserLimits(verbose_errors=False)  # else an error holds the whole schema
        matcher = library.LLMatcher(self._vocabulary, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            reason = " ".join(matcher.get_error().split())[:300]
            raise BadInput(f"the schema cannot be followed: {reason}", field=field)
        return Grammar(matcher, self._eos_ids, self._vocab_size)

    @functools.cached_property
    def _vocabulary(self) -> Any:
        library = _llguidance("response_format")
        wrapper = library.TokenizerWrapper(_Vocabulary(self._tokenizer, self._eos_ids[0]))
        return library.LLTokenizer(wrapper, n_vocab=self._vocab_size, eos_token=self._eos_ids)


class _Vocabulary:
    """A tokenizer as llguidance reads it: the bytes of each token, and what encodes a text."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, eos_id: int) -> None:
        self.eos_token_id = eos_id
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_ids)
        self._tokenizer = tokenizer

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode("utf-8", "replace"))


def json_rule(schema: dict[str, Any]) -> str:
    """A JSON value of `schema` as a term of a Lark grammar."""
    return "%json " + json.dumps({**closed(schema), "x-guidance": _COMPACT})


def closed(schema: Any) -> Any:
    """The schema whose objects with `properties` have no other keys, unless it says something about them.

    What follows it follows `schema` too. Parts of an `allOf` describe one object together and stay as they are.
    """
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    named = ("properties", "$defs", "definitions")
    kept = ("allOf", "enum", "const", "default", "examples", "required")
    found = {}
    for key, value in schema.items():
        if key in named and isinstance(value, dict):
            value = {name: closed(one) for name, one in value.items()}
        found[key] = value if key in kept else value if key in named else closed(value)
    if "properties" in schema and not {"allOf", "$ref", "patternProperties", "unevaluatedProperties"} & set(schema):
        found.setdefault("additionalProperties", False)
    return found


def _llguidance(field: str) -> Any:
    try:
        import llguidance
    except ModuleNotFoundError:
        hint = "Install it: pip install 'smolforge[web]'"
        raise BadInput("structured output needs the package llguidance", field=field, hint=hint) from None
    return llguidance
