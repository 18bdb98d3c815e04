"""The OpenAI API: /v1/completions, /v1/chat/completions, and the tokenizer at /tokenize and /detokenize.

Both ways of asking for text share `Answer`: it submits the prompts and sends the answer, whole or as a stream.
`CompletionAnswer` and `ChatAnswer` only say how a choice is written as JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from smolforge.serving.engine_thread import LoadedModel, ServerRequest
from smolforge.serving.errors import ApiError, refused
from smolforge.serving.schemas import (
    DEFAULT_MAX_TOKENS,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from smolforge.serving.state import ServerState
from smolforge.serving.streaming import DONE, EventStream, Transcript, cancel_on_exit, event
from smolforge.serving.structured import CallReader, Demand, plain_messages
from smolforge.tokenizer import StreamDecoder, Tokenizer

if TYPE_CHECKING:
    from smolforge.generation.sampling_params import SamplingParams
    from smolforge.generation.sequence import StepOutput

# JSON has no minus infinity; OpenAI's API sends -9999.0 for "practically never".
MIN_LOGPROB = -9999.0
# A part of a streamed choice: its text, its logprobs, its finish_reason.
Part = tuple[dict[str, Any], "dict[str, Any] | None", "str | None"]
# The answer of a route that can stream; OpenAPI 3.1 cannot describe the form of one event.
_CONTENT = {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}}
_TEXT = "One object, or with stream: true its parts as server-sent events."
EITHER: dict[int | str, dict[str, Any]] = {200: {"description": _TEXT, "content": _CONTENT}}


def router(state: ServerState) -> APIRouter:
    """The routes."""
    routes = APIRouter()

    @routes.post("/v1/completions", summary="Continue prompts", responses=EITHER, tags=["OpenAI"])
    async def completions(body: CompletionRequest, request: Request) -> Response:
        model, prefix = state.model_named(body.model), body.add_special_tokens is not False
        prompts = await prompt_ids(state, model, body.prompt, special_tokens=bool(body.parse_special), prefix=prefix)
        defaults = {"max_tokens": DEFAULT_MAX_TOKENS, **model.engine.defaults}
        params = body.sampling(state.settings.max_n, defaults)
        return await answer(state, model, CompletionAnswer, body, request, prompts, params)

    @routes.post("/v1/chat/completions", summary="Answer a conversation", responses=EITHER, tags=["OpenAI"])
    async def chat(body: ChatRequest, request: Request) -> Response:
        model = state.model_named(body.model)
        ids = await chat_ids(state, model, body.conversation(), **body.rendering())
        params = body.sampling(state.settings.max_n, chat_defaults(model, ids))
        return await answer(state, model, ChatAnswer, body, request, [ids], params)

    @routes.post("/tokenize", summary="Text to token ids", tags=["Tokens"])
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        model = state.model_named(body.model)
        engine = model.engine
        if body.messages is not None:
            ids = await chat_ids(state, model, plain_messages(body.messages), **body.rendering())
        else:
            text = body.content if body.prompt is None else body.prompt
            prefix = body.add_special_tokens is not False and body.add_special is not False
            ids = (await prompt_ids(state, model, text, special_tokens=bool(body.parse_special), prefix=prefix))[0]
        pieces = {"pieces": [token_string(engine.tokenizer, i) for i in ids]} if body.with_pieces else {}
        return {"tokens": ids, "count": len(ids), "max_model_len": engine.context, **pieces}

    @routes.post("/detokenize", summary="Token ids to text", tags=["Tokens"])
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        engine = state.model_named(body.model).engine
        unknown = next((i for i in body.tokens if i >= engine.vocab_size), None)
        if unknown is not None:
            raise refused("tokens", f"token {unknown} is not in the vocabulary of {engine.vocab_size}")
        text = await state.compute(lambda: engine.tokenizer.decode(body.tokens, skip_special_tokens=False))
        return {"prompt": text, "content": text}

    return routes


async def answer(
    state: ServerState, model: LoadedModel, kind: type[Any], body: Any, request: Request, prompts: list[list[int]],
    params: SamplingParams,
) -> Response:  # fmt: skip
    """Submit prompts; the response, as events where the body asks for a stream.

    Args:
        model: which made the prompts' ids: another one may be served by now, and knows other tokens.
        kind: makes of (submitted request, body) an object with `stream` and `whole`.
        body: a request with `demand` and `stream`.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(state.client(request))
        demand = body.demand()
        grammar = await state.compute(lambda: demand.grammar(model.engine.grammars))
        submitted = await state.submit(model, prompts, dataclasses.replace(params, grammar=grammar))
        stack.enter_context(cancel_on_exit(state.thread, submitted, state.settings.request_seconds))
        found = kind(submitted, body)
        if body.stream:
            return EventStream(found.stream(), stack.pop_all())
        return JSONResponse(await found.whole())


async def chat_ids(
    state: ServerState, model: LoadedModel, conversation: list[dict[str, Any]], **options: Any
) -> list[int]:
    """Token ids of a conversation, as of `ChatTemplate.encode`; ApiError 400 where the model has no chat template."""
    tokenizer = model.engine.tokenizer
    if tokenizer.chat_template is None:
        text = f"the model {model.name!r} has no chat template: it continues text. Use /v1/completions."
        raise ApiError(400, text, param="messages", code="no_chat_template")
    return await state.compute(lambda: tokenizer.encode_chat(conversation, **options))


def chat_defaults(model: LoadedModel, ids: list[int]) -> dict[str, Any]:
    """The sampling of an answer to a prompt: the model's own, and as long as there is room."""
    engine = model.engine
    room = max(1, engine.room(len(ids)))
    return {**engine.defaults, "max_tokens": min(room, engine.defaults.get("max_tokens", room))}


async def prompt_ids(state: ServerState, model: LoadedModel, prompt: Any, **options: Any) -> list[list[int]]:
    """Every form of `prompt` as lists of token ids; without a prompt the beginning of a document, as OpenAI has it.

    The options are those of `Tokenizer.encode_prompt`.
    """
    tokenizer = model.engine.tokenizer
    if prompt is None:
        return [tokenizer.prefix_ids or [tokenizer.eos_id]]
    if isinstance(prompt, str):
        prompt = [prompt]
    if isinstance(prompt[0], str):
        return await state.compute(lambda: [tokenizer.encode_prompt(text, **options) for text in prompt])
    return [prompt] if isinstance(prompt[0], int) else prompt


class Answer:
    """The answer to one request. Subclasses write a choice as JSON."""

    id_prefix: str
    whole_object: str
    stream_object: str

    def __init__(self, request: ServerRequest, body: Any) -> None:
        self.request, self.body = request, body
        self.tokenizer = request.model.engine.tokenizer
        n, step = request.params.n, request.model.step
        # (prompt, choice of the prompt) in the order of the choices' indices
        keys = [(prompt, choice) for prompt in range(len(request.prompts)) for choice in range(n)]
        self.transcripts = {key: (index, Transcript()) for index, key in enumerate(keys)}
        # Which weights wrote it: changes when a newer checkpoint takes over.
        fingerprint = f"smolforge-{f'step-{step}' if step is not None else int(request.model.created)}"
        head = {"id": f"{self.id_prefix}{uuid.uuid4().hex}", "created": int(time.time()), "model": request.model.name}
        self.head = {**head, "system_fingerprint": fingerprint}

    def logprobs(self, tokens: Sequence[StepOutput]) -> dict[str, Any] | None:
        """The tokens with their log-probabilities, or None where they were not asked for."""
        raise NotImplementedError

    def choice(self, text: str, reason: str | None) -> tuple[dict[str, Any], str | None]:
        """The text of a whole choice, and its finish_reason."""
        raise NotImplementedError

    def opening(self) -> dict[str, Any] | None:
        """The first part of a streamed choice, before any text."""
        return None

    def parts(self, index: int, text: str, tokens: list[StepOutput], reason: str | None) -> list[Part]:
        """The parts of streamed choice `index` that one step brings: (text, logprobs, finish_reason) each."""
        raise NotImplementedError

    async def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        async for batch in self.request.batches():
            for prompt, step in batch:
                self.transcripts[prompt, step.index][1].push(step)
        choices = []
        for index, whole in self.transcripts.values():
            logprobs, (text, reason) = self.logprobs(whole.reported), self.choice(whole.text, whole.finish_reason)
            choices.append({"index": index, **text, "logprobs": logprobs, "finish_reason": reason})
        return {**self.head, "object": self.whole_object, "choices": choices, "usage": self.request.usage()}

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events; steps that are ready together are sent together."""
        head = {**self.head, "object": self.stream_object}
        include_usage = bool(self.body.stream_options and self.body.stream_options.include_usage)
        more = {"usage": None} if include_usage else {}

        def chunk(index: int, text: dict[str, Any], logprobs: Any = None, reason: str | None = None) -> bytes:
            choice = {"index": index, **text, "logprobs": logprobs, "finish_reason": reason}
            return event({**head, "choices": [choice], **more})

        opening = self.opening()
        if opening is not None:
            yield b"".join(chunk(index, opening) for index, _ in self.transcripts.values())
        async for batch in self.request.batches():
            out = bytearray()
            for prompt, step in batch:
                index, transcript = self.transcripts[prompt, step.index]
                for part in self.parts(index, step.text, transcript.push(step), step.finish_reason):
                    out += chunk(index, *part)
            if out:
                yield bytes(out)
        if include_usage:
            yield event({**head, "choices": [], "usage": self.request.usage()})
        yield DONE


class CompletionAnswer(Answer):
    """The answer of /v1/completions."""

    id_prefix, whole_object, stream_object = "cmpl-", "text_completion", "text_completion"

    def __init__(self, request: ServerRequest, body: Any) -> None:
        super().__init__(request, body)
        self._lengths: dict[int, int] = {}  # characters of the prompts, by the engine's request

    def choice(self, text: str, reason: str | None) -> tuple[dict[str, Any], str | None]:
        return {"text": text}, reason

    def parts(self, index: int, text: str, tokens: list[StepOutput], reason: str | None) -> list[Part]:
        return [({"text": text}, self.logprobs(tokens), reason)] if text or tokens or reason else []

    def logprobs(self, tokens: Sequence[StepOutput]) -> dict[str, Any] | None:
        """`top_logprobs` always includes the token itself, so it can hold one more than asked for."""
        if self.body.logprobs is None:
            return None
        names = [token_string(self.tokenizer, token.token_id) for token in tokens]
        logprobs = [None if token.logprob is None else _finite(token.logprob) for token in tokens]
        tops: list[dict[str, float] | None] = []
        for name, token, own in zip(names, tokens, logprobs, strict=True):
            top = {token_string(self.tokenizer, i): _finite(logprob) for i, logprob in reversed(token.top_logprobs)}
            if own is not None:
                top.setdefault(name, own)
            tops.append(None if own is None else dict(sorted(top.items(), key=lambda item: -item[1])))
        offsets = [self._shown_before(token) + token.text_offset for token in tokens]
        return {"tokens": names, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}

    def _shown_before(self, token: StepOutput) -> int:
        """Characters of the prompt, from whose beginning OpenAI counts; those of `echo` are counted already."""
        if self.body.echo:
            return 0
        if token.request not in self._lengths:
            [prompt] = [one.prompt for one in self.request.requests if one.id == token.request]
            decoder = StreamDecoder(self.tokenizer)
            self._lengths[token.request] = sum(len(decoder.push(i)) for i in prompt)
        return self._lengths[token.request]


class ChatAnswer(Answer):
    """The answer of /v1/chat/completions."""

    id_prefix, whole_object, stream_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, request: ServerRequest, body: Any) -> None:
        super().__init__(request, body)
        self.demand: Demand = body.demand()
        self.readers = [CallReader(self.demand) for _ in self.transcripts]  # of streamed choices

    def choice(self, text: str, reason: str | None) -> tuple[dict[str, Any], str | None]:
        reader = CallReader(self.demand)
        shown = reader.push(text)[0] + reader.flush()
        message = {"role": "assistant", "content": shown, "refusal": None}
        if reader.calls:
            message |= {"content": shown or None, "tool_calls": [call.to_json() for call in reader.calls]}
        return {"message": message}, self.reason(reader, reason)

    def reason(self, reader: CallReader, reason: str | None) -> str | None:
        """The finish_reason: an answer that ended by itself after calls says so."""
        return "tool_calls" if reason == "stop" and reader.calls else reason

    def opening(self) -> dict[str, Any] | None:
        """The role."""
        return {"delta": {"role": "assistant", "content": ""}}

    def parts(self, index: int, text: str, tokens: list[StepOutput], reason: str | None) -> list[Part]:
        """The text or the whole calls, then the end in a part of its own."""
        reader, found = self.readers[index], list[Part]()
        text, calls = reader.push(text)
        text += reader.flush() if reason else ""
        if text or (tokens and not self.demand.functions):
            found.append(({"delta": {"content": text}}, self.logprobs(tokens), None))
        for place, call in enumerate(calls, len(reader.calls) - len(calls)):
            found.append(({"delta": {"tool_calls": [{"index": place, **call.to_json()}]}}, None, None))
        if reason:
            found.append(({"delta": {}}, None, self.reason(reader, reason)))
        return found

    def logprobs(self, tokens: Sequence[StepOutput]) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None

        def describe(token_id: int | None, logprob: float) -> dict[str, Any]:
            assert token_id is not None
            data = list(self.tokenizer.token_bytes(token_id))
            return {"token": token_string(self.tokenizer, token_id), "logprob": _finite(logprob), "bytes": data}

        content = []
        for token in tokens:
            top = [describe(token_id, logprob) for token_id, logprob in token.top_logprobs]
            content.append({**describe(token.token_id, token.logprob or 0.0), "top_logprobs": top})
        return {"content": content, "refusal": None}


def token_string(tokenizer: Tokenizer, token_id: int | None) -> str:
    """A token as OpenAI spells it: its text, or `bytes:\\xe2\\x9c` where its bytes are not text by themselves."""
    assert token_id is not None  # a token that is reported has an id
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)
