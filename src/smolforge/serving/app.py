"""The app: routes and middleware put together, and the model loaded and followed while they answer.

app = create_app(ServeSettings("RUN"))      # any ASGI server can run it; `server.serve` does it well
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response
from starlette.staticfiles import StaticFiles
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from smolforge.errors import SmolforgeError, wrong_values
from smolforge.serving import openai_routes, responses_routes, security
from smolforge.serving.errors import STATUSES, ApiError, as_api_error, not_ready
from smolforge.serving.settings import ServeSettings
from smolforge.serving.state import ServerState

logger = logging.getLogger(__name__)
DESCRIPTION = "The OpenAI API over your own model. Unsupported fields are refused, never ignored."


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every error."""

    error: ErrorDetail


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text} for status, (_, text) in STATUSES.items()
}


def create_app(settings: ServeSettings) -> FastAPI:
    """The app of one model; SmolforgeError where the model's name cannot be used."""
    state = ServerState(settings)
    keys = state.keys

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        state.thread.start()
        loading = asyncio.create_task(load_and_follow(state))
        try:
            yield
        finally:
            loading.cancel()
            await state.thread.stop()

    app = FastAPI(
        title="smolforge", summary=f"{state.source.name} on an OpenAI API", description=DESCRIPTION, lifespan=lifespan,
        docs_url=None, redoc_url=None, redirect_slashes=False, root_path=settings.root_path, responses=ERRORS,
        exception_handlers={
            **dict.fromkeys((ApiError, SmolforgeError, Exception), _answer), RequestValidationError: _invalid,
            HTTPException: _http,
        },
    )  # fmt: skip
    app.state.server = state
    app.include_router(openai_routes.router(state))
    app.include_router(responses_routes.router(state))
    app.include_router(about(state))
    app.include_router(security.login_router(state.source.name, keys))
    if settings.page:
        from smolforge.serving import page_routes

        app.include_router(page_routes.router(state))
        files = StaticFiles(packages=[("smolforge.serving", "page/static"), ("smolforge.report", "static")])
        app.mount("/page/static", files)
    app.add_middleware(security.BodyMiddleware, settings=settings, metrics=state.metrics)
    app.add_middleware(security.SecurityMiddleware, settings=settings, keys=keys, metrics=state.metrics)
    if settings.cors_origins:
        app.add_middleware(
            # Any header: the openai package for JavaScript sends a dozen of its own (x-stainless-...).
            CORSMiddleware, allow_origins=list(settings.cors_origins), allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )  # fmt: skip
    if settings.forwarded_allow_ips:
        app.add_middleware(ProxyHeadersMiddleware, trusted_hosts=settings.forwarded_allow_ips)  # type: ignore[arg-type]
    return app


def about(state: ServerState) -> APIRouter:
    """/v1/models, /health and /metrics."""
    routes = APIRouter(tags=["Server"])

    def describe() -> dict[str, Any]:
        model = state.model
        return {
            "id": model.name, "object": "model", "created": int(model.created), "owned_by": "smolforge",
            "max_model_len": model.engine.context, "checkpoint_step": model.step,
        }  # fmt: skip

    @routes.get("/v1/models", summary="The served model in a list")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [describe()]}

    @routes.get("/v1/models/{model:path}", summary="The served model")
    async def one_model(model: str) -> dict[str, Any]:
        state.model_named(model)
        return describe()

    @routes.get("/health", summary="Whether requests are served")
    async def health() -> Response:
        if state.problem is not None:
            return not_ready(state.problem).response()
        return JSONResponse({"status": "ok", "model": state.source.name})

    @routes.get("/metrics", summary="Metrics for Prometheus", response_class=Response)
    async def metrics() -> Response:
        return Response(generate_latest(state.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return routes


async def load_and_follow(state: ServerState) -> None:
    """Load the model. For a run: wait for its first checkpoint and take over each newer one."""
    thread, seconds = state.thread, state.settings.follow_seconds
    source, tried = state.source, None  # the newest checkpoint that was tried: a damaged one is read once
    while True:
        if source is not state.source:  # a visitor of the page chose another run
            source, tried = state.source, None
        newest = source.newest() if source.follows else None
        newer = newest is not None and newest != tried and (thread.model is None or newest > thread.model.age)
        if newer or (thread.model is None and not source.follows):
            tried = newest
            try:
                await state.load(source)
            except Exception as error:
                # A later checkpoint can be whole; a draft that does not fit the first one fits none.
                misfit = isinstance(error, SmolforgeError) and (error.field or "").startswith("draft")
                if thread.model is None and (misfit or not source.follows):
                    thread.problem, state.failure = f"the model cannot be loaded: {error}", error
                    return
                logger.error("cannot load %s: %s", source.model, error, exc_info=not isinstance(error, SmolforgeError))
        if thread.model is not None and not (source.follows and seconds):
            return
        await asyncio.sleep(seconds or 2.0)


async def _answer(_: Request, error: Exception) -> Response:
    return as_api_error(error).response()


async def _invalid(request: Request, error: Exception) -> Response:
    """The first error of a request in words."""
    assert isinstance(error, RequestValidationError)
    given = {"body": error.body, "query": dict(request.query_params), "path": request.path_params}
    first, *others = wrong_values(error.errors(), given)
    # An entry of several types has errors of each. The deepest inside it is about the type that was meant.
    first = max([first, *(o for o in others if o.path[:2] == first.path[:2])], key=lambda wrong: len(wrong.path))
    where = first.path[1:]
    if not where and first.error["type"] in ("json_invalid", "model_attributes_type", "missing"):
        return ApiError(400, "the body is not a JSON object; send one with Content-Type: application/json").response()
    return ApiError(400, f"{'.'.join(where)}: {first.message}", param=where[0] if where else None).response()


async def _http(request: Request, error: Exception) -> Response:
    """Unknown paths and methods; OPTIONS is answered with the methods of the path."""
    assert isinstance(error, HTTPException)
    path, status, headers = request.url.path[:200], error.status_code, dict(error.headers or {})
    if status == 404:
        return ApiError(404, f"there is nothing at {path}", code="not_found").response()
    if status == 405 and "Allow" in headers:
        methods = set(headers["Allow"].split(", "))
        headers["Allow"] = ", ".join(sorted({*methods, *({"HEAD"} if "GET" in methods else ()), "OPTIONS"}))
        if request.method == "OPTIONS":
            return Response(status_code=204, headers=headers)
        text = f"{path} does not take {request.method}; it takes {headers['Allow']}"
        return ApiError(405, text, headers=headers).response()
    return ApiError(status, str(error.detail), headers=headers).response()
