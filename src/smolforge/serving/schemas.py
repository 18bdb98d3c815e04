"""What clients can send. Every field is checked strictly; an error names the field and says what would be right.

No field is ignored silently: a field is supported, or listed in `HARMLESS`, or has a value that changes nothing
(`NEUTRAL`); everything else is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from smolforge.errors import nearest
from smolforge.formatting import replace_lone_surrogates
from smolforge.generation.sampling_params import Bias, Mass, Penalty, SamplingParams, Share, TokenId
from smolforge.serving.errors import refused, unsupported
from smolforge.serving.structured import Demand, NamedTool, ResponseFormat, Tool, ToolCall, ToolChoice, plain_messages

if TYPE_CHECKING:
    from typing_extensions import Self

MAX_LOGPROBS = 5  # OpenAI's bound for completions
MAX_TOP_LOGPROBS = 20  # and for chat
DEFAULT_MAX_TOKENS = 16  # OpenAI's default for completions
API_SAMPLING = {"temperature": 1.0, "top_p": 1.0}  # OpenAI's, for models that say nothing else
MAX_MESSAGES = 1024

# Fields about the account, the transport or the cache of another service; the answer does not depend on them.
HARMLESS = {
    "user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "cache_prompt", "id_slot", "priority", "request_id", "cache_salt", "return_progress",
    "spaces_between_special_tokens",
}  # fmt: skip
# Known fields with the values that change nothing; unless that is True, the values of `NOTHING` change nothing too.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "suffix": (), "functions": (), "function_call": ("none", "auto"), "tools": (), "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True,), "truncation": ("disabled",), "background": (), "include": (), "reasoning": (),
    "previous_response_id": (), "conversation": (), "max_tool_calls": (), "modalities": (["text"],), "audio": (),
    "prediction": (),
    "web_search_options": (), "reasoning_effort": ("none",), "verbosity": ("medium",), "store": (),
    "use_beam_search": (), "length_penalty": (1,), "early_stopping": (), "guided_json": (), "guided_regex": (),
    "guided_choice": (), "guided_grammar": (), "structured_outputs": (), "json_schema": (), "grammar": (),
    "mirostat": (0,), "dry_multiplier": (0,), "xtc_probability": (0,), "dynatemp_range": (0,), "top_n_sigma": (-1,),
    "repeat_penalty": (1,), "no_repeat_ngram_size": (0,), "n_probs": (0,), "bad_words": (), "allowed_token_ids": (),
    "prompt_logprobs": (), "truncate_prompt_tokens": (), "return_token_ids": (), "return_tokens_as_token_ids": (),
    "image_data": (), "lora": (), "continue_final_message": (), "include_stop_str_in_output": (),
    "skip_special_tokens": (True,), "add_special_tokens": (), "add_special": (), "parse_special": (),
    "chat_template": (), "chat_template_kwargs": (), "add_generation_prompt": (True,), "echo": (), "best_of": (1,),
}  # fmt: skip
NOTHING: tuple[Any, ...] = (None, False, "", [], {})


def _check_text(text: Any) -> Any:
    if isinstance(text, str) and replace_lone_surrogates(text) is not text:
        raise ValueError("the text holds a lone surrogate, which is not a character")
    return text


def _kind_of_prompt(value: Any) -> str | None:
    """Which form of a prompt this is, by its first element; None for anything else."""
    if isinstance(value, str):
        return "string"
    first = value[0] if isinstance(value, list) and value else None
    return {list: "lists", str: "strings", int: "ids"}.get(type(first))


Text = Annotated[str, BeforeValidator(_check_text)]  # text that can be tokenized
# A long list is checked up to the first thing wrong.
Ids = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Prompt = Annotated[
    Annotated[Text, Tag("string")]
    | Annotated[list[Text], Field(min_length=1, fail_fast=True), Tag("strings")]
    | Annotated[Ids, Tag("ids")]
    | Annotated[list[Ids], Field(min_length=1, fail_fast=True), Tag("lists")],
    Discriminator(
        _kind_of_prompt,
        custom_error_type="prompt",
        custom_error_message="must be a string, a list of strings, a list of token ids, or a list of such lists",
    ),
]
# The keys of a JSON object are strings.
LogitBias = dict[Annotated[TokenId, Field(strict=False)], Bias]


def _is_same(value: Any, other: Any) -> bool:
    """Whether two values of JSON are equal: 1 and 1.0 are, 1 and true are not."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


class StrictModel(BaseModel):
    """Fields of exactly the types that they have."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class Body(StrictModel, extra="allow"):
    """A body whose unsupported fields are refused."""

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        for field, value in (self.model_extra or {}).items():
            if field in HARMLESS:
                continue
            if field not in NEUTRAL:
                known = nearest(field, type(self).model_fields)
                hint = f"did you mean {known}?" if known else "leave it out"
                raise unsupported(field[:100], f"is not a field of this request; {hint}")
            neutral = (*NEUTRAL[field], *((None,) if any(same is True for same in NEUTRAL[field]) else NOTHING))
            if not any(_is_same(value, same) for same in neutral):
                raise unsupported(field, "is not supported by this server; leave it out")
        return self


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
    top_p: Mass | None = None
    top_k: int | None = Field(default=None, ge=-1)
    min_p: Share | None = None
    typical_p: Mass | None = None
    repetition_penalty: float | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: LogitBias | None = None
    stop: Text | Annotated[list[Text], Field(fail_fast=True)] | None = None
    stop_token_ids: list[int] | None = None
    min_tokens: int | None = Field(default=None, ge=0)
    ignore_eos: bool | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise refused("stream_options", "is only allowed with stream: true")
        return self

    def sampling(self, max_n: int, defaults: Mapping[str, Any], **more: Any) -> SamplingParams:
        """The parameters for the engine; BadInput where a value is out of range.

        Args:
            defaults: for what the request does not give; where they do not say either, OpenAI's.
            more: fields of other meaning in the request.
        """
        if (self.n or 1) > max_n:
            raise refused("n", f"{self.n} is more than this server's {max_n}")
        limits = (self.max_completion_tokens, self.max_tokens, self.max_new_tokens, self.n_predict)
        names = {field.name for field in dataclasses.fields(SamplingParams)} & set(type(self).model_fields)
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if any(limit is not None for limit in limits):
            given["max_tokens"] = next(limit for limit in limits if limit is not None)
        if given.get("top_k") == -1:
            given["top_k"] = 0
        if given.get("seed") == -1:  # llama.cpp's word for a random one
            del given["seed"]
        return SamplingParams(**{**API_SAMPLING, **defaults, **given, **more})


class CompletionRequest(SampledRequest):
    """The body of /v1/completions.

    With `parse_special` (llama.cpp) special tokens that a text writes out are read as such; with `add_special_tokens`
    (vLLM), unless false, a text begins as the tokenizer begins one.
    """

    prompt: Prompt | None = None
    parse_special: bool | None = None
    add_special_tokens: bool | None = None
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _check_best_of(self) -> Self:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise unsupported("best_of", "is not supported; ask for n choices and rank them by logprobs")
        return self

    def demand(self) -> Demand:
        """What the text has to be."""
        return Demand.of(self.response_format, [], None, None)


class ContentPart(StrictModel):
    """A part of a message; only text is supported."""

    type: Literal["text"]
    text: Text


class Message(StrictModel, extra="allow"):
    """One message of a conversation. Other keys, such as `name`, go to the chat template."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[ContentPart] | None = None
    tool_calls: list[ToolCall] | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _check_parts(cls, content: Any) -> Any:
        if content == []:
            raise ValueError("the list has no part; give a text")
        for part in content if isinstance(content, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind != "text":
                raise ValueError(f"this model reads text only, not a part of type {kind[:50]!r}")
            if kind != "text" or not isinstance(part.get("text"), str):
                raise ValueError('each part must look like {"type": "text", "text": "..."}')
        return content

    @model_validator(mode="after")
    def _check_content(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"the message of the {self.role} has no content; give a text")
        return self

    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class TemplateFields(Body):
    """How the chat template renders a conversation; the meanings are vLLM's.

    Unless one of the first two is given, a last message of the assistant is continued, and any other one answered.
    """

    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_template_fields(self) -> Self:
        if self.continue_final_message and self.add_generation_prompt:
            raise refused("continue_final_message", "is not possible together with add_generation_prompt: true")
        return self

    def rendering(self) -> dict[str, Any]:
        """The options of `ChatTemplate.encode`."""
        continued = self.continue_final_message
        if continued is None and self.add_generation_prompt is not None:
            continued = False
        prompt = self.add_generation_prompt is not False
        return {"generation_prompt": prompt, "continued": continued, "variables": self.chat_template_kwargs}


class ChatRequest(SampledRequest, TemplateFields):
    """The body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise refused("top_logprobs", "is only allowed with logprobs: true")
        return self

    def demand(self) -> Demand:
        """What the answer has to be."""
        functions = [tool.function for tool in self.tools or ()]
        return Demand.of(self.response_format, functions, self.tool_choice, self.parallel_tool_calls)

    def conversation(self) -> list[dict[str, Any]]:
        """The messages as the chat template reads them."""
        return self.demand().instruct(plain_messages(self.messages))

    def sampling(self, max_n: int, defaults: Mapping[str, Any], **more: Any) -> SamplingParams:
        """As of every request; `logprobs` only says whether."""
        return super().sampling(max_n, defaults, logprobs=(self.top_logprobs or 0) if self.logprobs else None, **more)


class TokenizeRequest(TemplateFields):
    """The body of /tokenize: a text or a conversation, each with fields of its own.

    `prompt` (vLLM) and `content` (llama.cpp) mean the same, and so do `add_special_tokens` and `add_special`.
    """

    model: Text | None = None
    prompt: Text | None = None
    content: Text | None = None
    messages: list[Message] | None = Field(default=None, min_length=1, max_length=MAX_MESSAGES)
    parse_special: bool | None = None
    add_special_tokens: bool | None = None
    add_special: bool | None = None
    with_pieces: bool | None = None

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if sum(given is not None for given in (self.prompt, self.content, self.messages)) != 1:
            raise refused("prompt", "give a text as prompt (or as content, which means the same), or messages")
        of_text, kind = ("parse_special", "add_special_tokens", "add_special"), "a text"
        for field in of_text if self.messages is not None else TemplateFields.model_fields:
            if getattr(self, field):
                raise unsupported(field, f"only has a meaning for {kind if self.messages is not None else 'messages'}")
        return self


class DetokenizeRequest(Body):
    """The body of /detokenize."""

    model: Text | None = None
    tokens: list[TokenId] = Field(fail_fast=True)
