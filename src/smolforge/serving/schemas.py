"""What clients may send. Every field is checked strictly, and one error names the field and what would be right.

Fields that nobody knows are ignored, as clients send many; fields that are known to change the answer and that
smolforge does not have are refused unless their value is the neutral one.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from smolforge.errors import BadInput
from smolforge.generation.sampling_params import SamplingParams
from smolforge.serving.errors import refused

MAX_LOGPROBS = 5  # OpenAI's bound for completions
MAX_TOP_LOGPROBS = 20  # and for chat
DEFAULT_MAX_TOKENS = 16  # OpenAI's default for completions
MAX_MESSAGES = 1024

# Field: values that change nothing. Any other value asks for something that smolforge does not do.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "suffix": (),
    "tools": (),
    "tool_choice": ("none", "auto"),
    "functions": (),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "store": (),
    "use_beam_search": (),
    "length_penalty": (1,),
    "early_stopping": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "json_schema": (),
    "grammar": (),
    "mirostat": (0,),
    "dry_multiplier": (0,),
    "xtc_probability": (0,),
    "dynatemp_range": (0,),
    "top_n_sigma": (-1,),
    "bad_words": (),
    "allowed_token_ids": (),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "image_data": (),
    "lora": (),
    "continue_final_message": (),
}
_NEUTRAL: tuple[Any, ...] = (None, False, "", [], {})


def check_text(text: str, what: str = "the text") -> str:
    """Text that can be tokenized.

    Raises:
        ValueError: it holds half of a surrogate pair, which is no character.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} holds a lone surrogate, which is no character") from None
    return text


def _prompt(value: Any) -> Any:
    """One pass over a prompt that stops at the first thing wrong, however long it is."""
    if value is None or isinstance(value, str):
        return None if value is None else check_text(value)
    if not isinstance(value, list):
        raise ValueError("must be a string, a list of strings, a list of token ids, or a list of such lists")
    if not value:
        raise ValueError("is an empty list; give at least one string or token id")
    if isinstance(value[0], list):
        for inner in value:
            if not isinstance(inner, list) or not inner:
                raise ValueError("must hold only non-empty lists of token ids, since it begins with a list")
            _token_ids(inner)
    elif isinstance(value[0], str):
        for inner in value:
            if not isinstance(inner, str):
                raise ValueError(f"must hold only strings, since it begins with one; not {_show(inner)}")
            check_text(inner)
    else:
        _token_ids(value)
    return value


def _token_ids(ids: list[Any]) -> None:
    for token_id in ids:
        if type(token_id) is not int or token_id < 0:
            raise ValueError(f"token ids are whole numbers from 0, not {_show(token_id)}")


def _stop(value: Any) -> Any:
    if value is None:
        return []
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("must be a string or a list of strings")
    return [check_text(stop, "a stop string") for stop in stops]


def _logit_bias(value: Any) -> Any:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError("must map token ids to numbers from -100 to 100")
    found: dict[int, float] = {}
    for key, bias in value.items():
        if not (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 12):
            raise ValueError(f"{_show(key)} is no token id")
        if isinstance(bias, bool) or not isinstance(bias, (int, float)) or not math.isfinite(bias):
            raise ValueError(f"{_show(bias)} is no number")
        found[int(key)] = bias
    return found


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
Prompt = Annotated[
    Any,
    BeforeValidator(_prompt),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1},
                _IDS,
                {"type": "array", "items": _IDS, "minItems": 1},
                {"type": "null"},
            ]
        }
    ),
]
Stop = Annotated[
    list[str],
    BeforeValidator(_stop),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]}),
]
LogitBias = Annotated[
    dict[int, float],
    BeforeValidator(_logit_bias),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "object", "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}},
                {"type": "null"},
            ]
        }
    ),
]
Text = Annotated[str, BeforeValidator(lambda v: check_text(v) if isinstance(v, str) else v)]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    def refuse_unsupported(self) -> None:
        """Refuse what is known to change the answer and is not supported.

        Raises:
            ApiError: 400 with the field.
        """
        for field, value in (self.model_extra or {}).items():
            if field in UNSUPPORTED and not any(
                type(value) is type(neutral) and value == neutral for neutral in (*_NEUTRAL, *UNSUPPORTED[field])
            ):
                raise refused(field, "is not supported by this server; leave it out", code="unsupported_parameter")


class StreamOptions(_Body):
    """Options of a stream."""

    include_usage: bool | None = None


class _Sampled(_Body):
    """What completions and chat have in common."""

    model: Text | None = None
    n: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    typical_p: float | None = Field(default=None, gt=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: LogitBias = Field(default_factory=dict)
    stop: Stop = Field(default_factory=list)
    stop_token_ids: list[int] | None = None
    min_tokens: int | None = Field(default=None, ge=0)
    ignore_eos: bool | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Text | None = None

    # Ours and the request's name for the same.
    _same: ClassVar[tuple[str, ...]] = (
        "min_p",
        "typical_p",
        "repetition_penalty",
        "frequency_penalty",
        "presence_penalty",
        "min_tokens",
        "ignore_eos",
    )

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def check(self, max_n: int) -> None:
        """What a single field cannot tell.

        Raises:
            ApiError: 400 with the field.
        """
        self.refuse_unsupported()
        if self.stream_options is not None and not self.stream:
            raise refused("stream_options", "is only allowed with stream: true")
        if (self.n or 1) > max_n:
            raise refused("n", f"{self.n} is more than this server's {max_n}")

    def _sampling(self, **more: Any) -> SamplingParams:
        given = {name: getattr(self, name) for name in self._same if getattr(self, name) is not None}
        try:
            return SamplingParams(
                n=self.n or 1,
                temperature=1.0 if self.temperature is None else self.temperature,
                top_p=1.0 if self.top_p is None else self.top_p,
                top_k=max(0, self.top_k or 0),
                logit_bias=self.logit_bias,
                stop=tuple(self.stop),
                stop_token_ids=tuple(self.stop_token_ids or ()),
                seed=self.seed,
                **given,
                **more,
            )
        except BadInput as error:
            if error.field == "stop_token_ids":
                error.field = "stop_token_ids"
            raise


class CompletionRequest(_Sampled):
    """The body of /v1/completions."""

    prompt: Prompt = None
    max_tokens: int | None = Field(default=None, ge=0)
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = None

    def check(self, max_n: int) -> None:
        """As of `_Sampled`, and no best_of."""
        super().check(max_n)
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise refused(
                "best_of", "is not supported; ask for n choices and rank them by logprobs", "unsupported_parameter"
            )

    def sampling(self) -> SamplingParams:
        """As the engine wants it.

        Raises:
            BadInput: a value is out of range.
        """
        max_tokens = DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        return self._sampling(max_tokens=max_tokens, echo=bool(self.echo), logprobs=self.logprobs)


class ContentPart(_Body):
    """A part of a message; only text is understood."""

    type: Literal["text"]
    text: Text


class Message(_Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[ContentPart] | None = None

    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class ChatRequest(_Sampled):
    """The body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(default=None, ge=0)
    max_completion_tokens: int | None = Field(default=None, ge=0)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)

    def check(self, max_n: int) -> None:
        """As of `_Sampled`, and what belongs together."""
        super().check(max_n)
        if self.top_logprobs and not self.logprobs:
            raise refused("top_logprobs", "is only allowed with logprobs: true")
        for message in self.messages:
            if message.role == "tool" or (message.model_extra or {}).get("tool_calls"):
                raise refused("messages", "tool calls are not supported", "unsupported_parameter")

    def sampling(self, room: int) -> SamplingParams:
        """As the engine wants it; `room` is the default of max_tokens.

        Raises:
            BadInput: a value is out of range.
        """
        asked = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self._sampling(max_tokens=room if asked is None else asked, logprobs=logprobs)


class TokenizeRequest(_Body):
    """The body of /tokenize; `prompt` (vLLM) and `content` (llama.cpp) mean the same."""

    prompt: Text | None = None
    content: Text | None = None
    with_pieces: bool | None = None


class DetokenizeRequest(_Body):
    """The body of /detokenize."""

    tokens: Annotated[
        Any,
        BeforeValidator(lambda value: value if value == [] else _prompt(value)),
        WithJsonSchema({"type": "array", "items": {"type": "integer", "minimum": 0}}),
    ]
