"""The settings of a request, checked before anything runs. Names follow OpenAI's API, and transformers' elsewhere."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from smolforge.errors import BadInput

MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_CHOICES = 128


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt. Immutable and checked; defaults are the seed project's.

    Attributes:
        max_tokens: most tokens to write; 0 writes none (useful with `echo`). The context ends earlier.
        temperature: divides the logits; 0 takes the likeliest token (greedy).
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens until their probability reaches p, in (0, 1].
        min_p: drop tokens less likely than this share of the likeliest, in [0, 1].
        typical_p: locally typical sampling (Meister et al. 2022), in (0, 1]; 1 is off.
        repetition_penalty: divides positive and multiplies negative logits of tokens in prompt or output; in
            [0.01, 100], since others overflow the logits.
        frequency_penalty: subtracted from a logit once for each time the token was written.
        presence_penalty: subtracted once from the logit of each token that was written.
        logit_bias: token id: added to its logit, in [-100, 100].
        stop: strings that end the text; never shown, and nothing before them is lost.
        stop_token_ids: token ids that end the text, besides the end-of-text token.
        min_tokens: end-of-text and `stop_token_ids` are impossible before this many tokens.
        seed: makes the text reproducible, alone and among any batch mates; drawn and kept if None.
        logprobs: report each token's log-probability and this many alternatives; None reports nothing.
        echo: report the prompt's tokens first.
        n: how many independent continuations.
        ignore_eos: write on past the end-of-text token.

    Raises:
        BadInput: a value is of the wrong type or out of range; the field is named.
    """

    max_tokens: int = 100
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.9
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    stop: tuple[str, ...] | str = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    seed: int | None = None
    logprobs: int | None = None
    echo: bool = False
    n: int = 1
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        self._integer("max_tokens", least=0)
        self._integer("top_k", least=0)
        self._integer("min_tokens", least=0)
        self._integer("n", least=1, most=MAX_CHOICES)
        self._number("temperature", 0, math.inf, "0 is greedy, 1 is the model's own distribution.")
        self._number("top_p", 0, 1, "It lies in (0, 1]; 1 keeps every token.", open_left=True)
        self._number("min_p", 0, 1, "It lies in [0, 1]; 0 is off.")
        self._number("typical_p", 0, 1, "It lies in (0, 1]; 1 is off.", open_left=True)
        self._number("repetition_penalty", 0.01, 100, "It lies in [0.01, 100]; 1 is off.")
        self._number("frequency_penalty", -2, 2, "It lies in [-2, 2]; 0 is off.")
        self._number("presence_penalty", -2, 2, "It lies in [-2, 2]; 0 is off.")
        for name in ("echo", "ignore_eos"):
            if not isinstance(getattr(self, name), bool):
                raise BadInput(f"must be true or false, not {getattr(self, name)!r}", field=name)
        if self.logprobs is not None:
            self._integer("logprobs", least=0, most=MAX_LOGPROBS)
        if self.seed is not None:
            self._integer("seed", least=-(2**63), most=2**64 - 1)
        if self.min_tokens > self.max_tokens:
            raise BadInput(f"{self.min_tokens} is more than max_tokens {self.max_tokens}", field="min_tokens")
        self._stops()
        self._ids()

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, without chance."""
        return self.temperature == 0

    def _integer(self, name: str, *, least: int, most: int | None = None) -> None:
        value: Any = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise BadInput(f"must be a whole number, not {value!r}", field=name)
        if value < least or (most is not None and value > most):
            bounds = f"at least {least}" if most is None else f"from {least} to {most}"
            raise BadInput(f"must be {bounds}, not {value}", field=name)

    def _number(self, name: str, low: float, high: float, hint: str, *, open_left: bool = False) -> None:
        value: Any = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise BadInput(f"must be a number, not {value!r}", field=name, hint=hint)
        if not math.isfinite(value) or value < low or value > high or (open_left and value == low):
            raise BadInput(f"{value} is out of range", field=name, hint=hint)

    def _stops(self) -> None:
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if len(stops) > MAX_STOPS:
            raise BadInput(f"{len(stops)} stop strings, at most {MAX_STOPS}", field="stop")
        for text in stops:
            if not isinstance(text, str) or not text:
                raise BadInput(f"each must be a non-empty string, not {text!r}", field="stop")
        object.__setattr__(self, "stop", stops)

    def _ids(self) -> None:
        ids = tuple(self.stop_token_ids)
        for name, some in (("stop_token_ids", ids), ("logit_bias", tuple(self.logit_bias))):
            for token_id in some:
                if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
                    raise BadInput(f"token ids are whole numbers from 0, not {token_id!r}", field=name)
        object.__setattr__(self, "stop_token_ids", ids)
        for token_id, bias in self.logit_bias.items():
            if isinstance(bias, bool) or not isinstance(bias, (int, float)) or not -100 <= bias <= 100:
                raise BadInput(f"token {token_id}: {bias!r} is not in [-100, 100]", field="logit_bias")
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))

    def check_vocabulary(self, vocab_size: int) -> None:
        """Check the token ids against the model's vocabulary.

        Raises:
            BadInput: an id is not below `vocab_size`.
        """
        for name, ids in (("stop_token_ids", self.stop_token_ids), ("logit_bias", tuple(self.logit_bias))):
            for token_id in ids:
                if token_id >= vocab_size:
                    raise BadInput(f"token {token_id} is not in the vocabulary of {vocab_size}", field=name)
