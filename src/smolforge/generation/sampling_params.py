"""The settings of a request, checked before anything runs. Names follow OpenAI's API, and transformers' elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    InstanceOf,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.dataclasses import dataclass

from smolforge.errors import BadInput, first_problem
from smolforge.generation.grammar import Grammar

MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_CHOICES = 128

Count = Annotated[int, Field(ge=0)]
TokenId = Annotated[int, Field(ge=0)]
# Logits divided by less than 1e-6 can overflow; the likeliest token has all of the probability long before.
Temperature = Annotated[float, Field(ge=0, le=1e6), AfterValidator(lambda value: value if value >= 1e-6 else 0.0)]
Share = Annotated[float, Field(ge=0, le=1)]
Mass = Annotated[float, Field(gt=0, le=1)]  # of probability, which is never empty
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Stops = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...],
    Field(max_length=MAX_STOPS, strict=False),
    BeforeValidator(lambda stop: (stop,) if isinstance(stop, str) else stop),
]


@dataclass(frozen=True, config=ConfigDict(strict=True, allow_inf_nan=False, extra="forbid"))
class SamplingParams:
    """How to continue a prompt. Immutable and checked; defaults are the seed project's.

    Attributes:
        max_tokens: most tokens to write; 0 writes none (useful with `echo`). The context ends earlier.
        temperature: divides the logits; 0, as all below 1e-6, takes the likeliest token (greedy).
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
        grammar: what the text must be, from `Engine.grammars`; the text ends where the grammar does.

    Raises:
        BadInput: a value is of the wrong type or out of range; the field is named.
    """

    max_tokens: Count = 100
    temperature: Temperature = 0.8
    top_k: Count = 0
    top_p: Mass = 0.9
    min_p: Share = 0.0
    typical_p: Mass = 1.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    logit_bias: Mapping[TokenId, Bias] = Field(default_factory=dict)
    stop: Stops = ()
    stop_token_ids: Annotated[tuple[TokenId, ...], Field(strict=False)] = ()
    min_tokens: Count = 0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool = False
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    ignore_eos: bool = False
    grammar: InstanceOf[Grammar] | None = None

    @model_validator(mode="wrap")
    @classmethod
    def _explain(cls, values: Any, validate: Any) -> Any:
        try:
            return validate(values)
        except ValidationError as error:
            raise first_problem(error) from None

    @field_validator("min_tokens")
    @classmethod
    def _within_max_tokens(cls, value: int, info: ValidationInfo) -> int:
        most = info.data.get("max_tokens", value)
        if value > most:
            raise ValueError(f"{value} is more than max_tokens {most}")
        return value

    @field_validator("grammar")
    @classmethod
    def _can_end(cls, value: Grammar | None, info: ValidationInfo) -> Grammar | None:
        if value is not None and (info.data.get("ignore_eos") or info.data.get("min_tokens")):
            raise ValueError("says itself where the text ends: leave out ignore_eos and min_tokens")
        return value

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, without chance."""
        return self.temperature == 0

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise BadInput where a token id is not below `vocab_size`."""
        for name, ids in (("stop_token_ids", self.stop_token_ids), ("logit_bias", tuple(self.logit_bias))):
            for token_id in ids:
                if token_id >= vocab_size:
                    raise BadInput(f"token {token_id} is not in the vocabulary of {vocab_size}", field=name)
