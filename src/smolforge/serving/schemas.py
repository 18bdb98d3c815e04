"""What clients can send. Every field is checked strictly; an error names the field and says what would be right.

No field is ignored silently: a field is supported, or listed in `HARMLESS`, or has a value that changes nothing
(`NEUTRAL`); everything else is refused.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from smolforge.errors import nearest
from smolforge.formatting import replace_lone_surrogates
from smolforge.generation.sampling_params import SamplingParams
from smolforge.serving.errors import refused, unsupported

MAX_LOGPROBS = 5  # OpenAI's bound for completions
MAX_TOP_LOGPROBS = 20  # and for chat
DEFAULT_MAX_TOKENS = 16  # OpenAI's default for completions
MAX_MESSAGES = 1024

# Fields about the account, the transport or the cache of another service; the answer does not depend on them.
HARMLESS = {
    "user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls", "cache_prompt", "id_slot", "priority", "request_id", "cache_salt", "return_progress",
    "spaces_between_special_tokens",
}  # fmt: skip
# Known fields with the values that change nothing; unless that is True, the values of `NOTHING` change nothing too.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "suffix": (), "tools": (), "tool_choice": ("none", "auto"), "functions": (), "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (), "prediction": (),
    "web_search_options": (), "reasoning_effort": ("none",), "verbosity": ("medium",), "store": (),
    "use_beam_search": (), "length_penalty": (1,), "early_stopping": (), "guided_json": (), "guided_regex": (),
    "guided_choice": (), "guided_grammar": (), "structured_outputs": (), "json_schema": (), "grammar": (),
    "mirostat": (0,), "dry_multiplier": (0,), "xtc_probability": (0,), "dynatemp_range": (0,), "top_n_sigma": (-1,),
    "repeat_penalty": (1,), "no_repeat_ngram_size": (0,), "n_probs": (0,), "bad_words": (), "allowed_token_ids": (),
    "prompt_logprobs": (), "truncate_prompt_tokens": (), "return_token_ids": (), "return_tokens_as_token_ids": (),
    "image_data": (), "lora": (), "continue_final_message": (), "include_stop_str_in_output": (),
    "skip_special_tokens": (True,), "add_special_tokens": (True,), "add_special": (True,), "parse_special": (),
    "chat_template": (), "chat_template_kwargs": (), "add_generation_prompt": (True,), "echo": (), "best_of": (1,),
}  # fmt: skip
NOTHING: tuple[Any, ...] = (None, False, "", [], {})


def check_text(text: str, what: str = "the text") -> str:
    """Text that can be tokenized.

    Raises:
        ValueError: it holds a lone surrogate, half of the code of a character.
    """
    if replace_lone_surrogates(text) is not text:
        raise ValueError(f"{what} holds a lone surrogate, which is not a character")
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
            raise ValueError(f"{_show(key)} is not a token id")
        if isinstance(bias, bool) or not isinstance(bias, (int, float)) or not math.isfinite(bias):
            raise ValueError(f"{_show(bias)} is not a number")
        found[int(key)] = bias
    return found


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _any_of(*schemas: dict[str, Any]) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [*schemas, {"type": "null"}]})


def _list_of(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": schema, "minItems": 1}


_STRING, _BIAS = {"type": "string"}, {"type": "number", "minimum": -100, "maximum": 100}
_IDS = _list_of({"type": "integer", "minimum": 0})
Prompt = Annotated[Any, BeforeValidator(_prompt), _any_of(_STRING, _list_of(_STRING), _IDS, _list_of(_IDS))]
Stop = Annotated[list[str], BeforeValidator(_stop), _any_of(_STRING, {"type": "array", "items": _STRING})]
LogitBias = Annotated[
    dict[int, float], BeforeValidator(_logit_bias), _any_of({"type": "object", "additionalProperties": _BIAS})
]
Text = Annotated[str, BeforeValidator(lambda v: check_text(v) if isinstance(v, str) else v)]


class Body(BaseModel):
    """A body whose unknown fields are refused by `check`."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    def check(self) -> None:
        """Refuse fields that are not supported.

        Raises:
            ApiError: 400 with the field.
        """
        for field, value in (self.model_extra or {}).items():
            if field in HARMLESS:
                continue
            if field not in NEUTRAL:
                known = nearest(field, type(self).model_fields)
                hint = f"did you mean {known}?" if known else "leave it out"
                raise unsupported(field[:100], f"is not a field of this request; {hint}")
            neutral = (*NEUTRAL[field], *((None,) if any(same is True for same in NEUTRAL[field]) else NOTHING))
            if not any(type(value) is type(same) and value == same for same in neutral):
                raise unsupported(field, "is not supported by this server; leave it out")


class StreamOptions(Body):
    """Options of a stream."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


Limit = Annotated[int | None, Field(ge=0)]


class SampledRequest(Body):
    """The fields that completions and chat have in common.

    max_completion_tokens (OpenAI), max_new_tokens (transformers) and n_predict (llama.cpp) mean the same as max_tokens.
    """

    model: Text | None = None
    max_tokens: Limit = None
    max_completion_tokens: Limit = None
    max_new_tokens: Limit = None
    n_predict: Limit = None
    n: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    typical_p: float | None = Field(default=None, gt=0, le=1)
    # Smaller penalties overflow the logits.
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100)
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

    def check_request(self, max_n: int) -> None:
        """Refuse unsupported fields, and fields that contradict each other.

        Raises:
            ApiError: 400 with the field.
        """
        self.check()
        if self.stream_options is not None:
            self.stream_options.check()
            if not self.stream:
                raise refused("stream_options", "is only allowed with stream: true")
        if (self.n or 1) > max_n:
            raise refused("n", f"{self.n} is more than this server's {max_n}")

    def _sampling(self, default_max_tokens: int, **more: Any) -> SamplingParams:
        limits = (self.max_completion_tokens, self.max_tokens, self.max_new_tokens, self.n_predict)
        same = (
            "n", "temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "frequency_penalty",
            "presence_penalty", "min_tokens", "ignore_eos",
        )  # fmt: skip
        given = {name: getattr(self, name) for name in same if getattr(self, name) is not None}
        return SamplingParams(
            **{"temperature": 1.0, "top_p": 1.0, **given, **more},
            max_tokens=next((limit for limit in limits if limit is not None), default_max_tokens),
            top_k=max(0, self.top_k or 0),
            logit_bias=self.logit_bias,
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            seed=self.seed,
        )


class CompletionRequest(SampledRequest):
    """The body of /v1/completions."""

    prompt: Prompt = None
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = None

    def check_request(self, max_n: int) -> None:
        """As in `SampledRequest`; best_of must equal n."""
        super().check_request(max_n)
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise unsupported("best_of", "is not supported; ask for n choices and rank them by logprobs")

    def sampling(self) -> SamplingParams:
        """The parameters for the engine.

        Raises:
            BadInput: a value is out of range.
        """
        return self._sampling(DEFAULT_MAX_TOKENS, echo=bool(self.echo), logprobs=self.logprobs)


class ContentPart(Body):
    """A part of a message; only text is supported."""

    type: Literal["text"]
    text: Text


class Message(Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[ContentPart] | None = None

    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class ChatRequest(SampledRequest):
    """The body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)

    def check_request(self, max_n: int) -> None:
        """As in `SampledRequest`; top_logprobs needs logprobs, and tool calls are refused."""
        super().check_request(max_n)
        if self.top_logprobs and not self.logprobs:
            raise refused("top_logprobs", "is only allowed with logprobs: true")
        for message in self.messages:
            if message.role == "tool" or (message.model_extra or {}).get("tool_calls"):
                raise unsupported("messages", "tool calls are not supported")

    def conversation(self) -> list[dict[str, str]]:
        """The messages as the chat template reads them."""
        roles = {"developer": "system"}
        return [{"role": roles.get(m.role, m.role), "content": m.text()} for m in self.messages]

    def sampling(self, default_max_tokens: int) -> SamplingParams:
        """The parameters for the engine.

        Raises:
            BadInput: a value is out of range.
        """
        return self._sampling(default_max_tokens, logprobs=(self.top_logprobs or 0) if self.logprobs else None)


class TokenizeRequest(Body):
    """The body of /tokenize; `prompt` (vLLM) and `content` (llama.cpp) mean the same."""

    model: Text | None = None
    prompt: Text | None = None
    content: Text | None = None
    with_pieces: bool | None = None

    def text(self) -> str:
        """The text to tokenize.

        Raises:
            ApiError: there is none, or two, or an unsupported field.
        """
        self.check()
        texts = [text for text in (self.prompt, self.content) if text is not None]
        if len(texts) != 1:
            raise refused("prompt", "give the text as prompt (or as content, which means the same)")
        return texts[0]


def _tokens(value: Any) -> Any:
    if not isinstance(value, list):
        raise ValueError("must be a list of token ids")
    _token_ids(value)
    return value


class DetokenizeRequest(Body):
    """The body of /detokenize."""

    model: Text | None = None
    tokens: Annotated[
        Any,
        BeforeValidator(_tokens),
        WithJsonSchema({"type": "array", "items": {"type": "integer", "minimum": 0}}),
    ]
