"""/tokenize and /detokenize: the tokenizer by itself, in the shapes of llama.cpp and vLLM together."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter

from smolforge.serving.errors import refused
from smolforge.serving.schemas import DetokenizeRequest, TokenizeRequest
from smolforge.serving.state import Service
from smolforge.serving.transcript import token_string


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["Tokens"])

    @routes.post("/tokenize", summary="Text to token ids")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        if (body.prompt is None) == (body.content is None):
            raise refused("prompt", "give the text as prompt (or as content, which means the same)")
        text = body.prompt if body.prompt is not None else body.content
        engine = service.model.engine
        ids = await service.encode(text or "")
        answer: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": engine.context}
        if body.with_pieces:
            answer["pieces"] = [token_string(engine.tokenizer, i) for i in ids]
        return answer

    @routes.post("/detokenize", summary="Token ids to text")
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        engine = service.model.engine
        ids: Any = body.tokens
        if not isinstance(ids, list) or any(not isinstance(i, int) for i in ids):
            raise refused("tokens", "must be a list of token ids")
        for token_id in ids:
            if token_id >= engine.vocab_size:
                raise refused("tokens", f"token {token_id} is not in the vocabulary of {engine.vocab_size}")

        def work() -> str:
            return engine.tokenizer.decode(ids, skip_special_tokens=False)

        text = await asyncio.get_running_loop().run_in_executor(service.worker.encoder, work)
        return {"prompt": text, "content": text}

    return routes
