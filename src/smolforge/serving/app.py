"""The app: routes put together, the model loaded and followed while they answer.

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
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from smolforge.errors import SmolforgeError
from smolforge.serving import chat, completions, login, tokens
from smolforge.serving.engine_thread import EngineThread
from smolforge.serving.errors import ApiError
from smolforge.serving.metrics import CONTENT_TYPE_LATEST, Metrics
from smolforge.serving.models import LoadedModel, ModelSource
from smolforge.serving.security import BodyMiddleware, Keys, SecurityMiddleware
from smolforge.serving.settings import ServeSettings
from smolforge.serving.state import Service
from smolforge.serving.streaming import as_api_error

log = logging.getLogger("smolforge.serving")
DESCRIPTION = "The OpenAI API over a model of one's own. Fields that are not supported are refused, never ignored."


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """Every answer that is not the one asked for."""

    error: ErrorDetail


REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "A field is wrong or not supported; it is named.",
        401: "No key, or a wrong one.",
        404: "No such model.",
        408: "The body came too slowly.",
        413: "The body is too large.",
        429: "Too much is waiting; see Retry-After.",
        500: "The model failed.",
        503: "Loading, broken or shutting down.",
        504: "The request took too long.",
    }.items()
}


def create_app(settings: ServeSettings) -> FastAPI:
    """The app of one model.

    Raises:
        SmolforgeError: the model's name cannot be used.
    """
    source = ModelSource(settings.model, settings.name)
    metrics = Metrics()
    worker = EngineThread(settings.max_queue)
    service = Service(settings, source, worker, metrics)
    keys = Keys(settings.api_key)
    metrics.watch(worker)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        loading = asyncio.create_task(load_and_follow(service))
        try:
            yield
        finally:
            loading.cancel()
            await worker.stop()

    app = FastAPI(
        title="smolforge", summary=f"{source.name} on an OpenAI API", description=DESCRIPTION, lifespan=lifespan,
        docs_url=None, redoc_url=None, responses=REFUSALS,
    )  # fmt: skip
    app.state.service = service
    routers = [completions.router(service), chat.router(service), tokens.router(service), about(service)]
    routers.append(login.router(service, keys))
    if settings.page:
        from smolforge.serving.page import assets, timelapse, training, write

        routers += [assets.router(), write.router(service), timelapse.router(service), training.router(service)]
    for routes in routers:
        app.include_router(routes)
    app.add_exception_handler(ApiError, _told)
    app.add_exception_handler(SmolforgeError, _told)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _told)
    methods = _methods(routers)
    if settings.page:
        from smolforge.serving.page.page import mount

        mount(app, service)
    app.add_middleware(
        BodyMiddleware, settings=settings, metrics=metrics, stopping=service.stopping,
        label=lambda path: path if path in methods else ("/v1/models/" if path.startswith("/v1/") else "page"),
        ours=lambda path: path in methods,
    )  # fmt: skip
    app.add_middleware(SecurityMiddleware, settings=settings, keys=keys, methods=methods, metrics=metrics)
    if settings.cors_origins:
        from starlette.middleware.cors import CORSMiddleware

        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.cors_origins), allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )  # fmt: skip
    return app


def _methods(routers: list[APIRouter]) -> dict[str, set[str]]:
    """Methods of each path; a path with a parameter stands for all that begin like it."""
    found: dict[str, set[str]] = {"/openapi.json": {"GET"}}
    for route in (route for router in routers for route in router.routes):
        assert isinstance(route, APIRoute)
        found.setdefault(route.path.partition("{")[0], set()).update(route.methods or ())
    for methods in found.values():
        if "GET" in methods:
            methods.add("HEAD")
    return found


def about(service: Service) -> APIRouter:
    """/v1/models, /health and /metrics."""
    routes = APIRouter(tags=["Server"])

    def describe() -> dict[str, Any]:
        model = service.model
        return {
            "id": service.source.name,
            "object": "model",
            "created": model.created,
            "owned_by": "smolforge",
            "max_model_len": model.engine.context,
            "checkpoint_step": model.step,
        }

    @routes.get("/v1/models", summary="The model that is served")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [describe()]}

    @routes.get("/v1/models/{model:path}", summary="One model")
    async def one_model(model: str) -> dict[str, Any]:
        service.check_model(model)
        return describe()

    @routes.get("/health", summary="Whether requests are served", tags=["Server"])
    async def health() -> Response:
        worker = service.worker
        if worker.draining:
            problem = "the server is shutting down"
        elif worker.problem is not None:
            problem = worker.problem
        else:
            problem = None if worker.model else service.loading
        if problem is not None:
            error = ApiError(503, problem, code="not_ready", headers={"Retry-After": "2"})
            return error.response()
        return JSONResponse({"status": "ok", "model": service.source.name})

    @routes.get("/metrics", summary="Metrics for Prometheus", response_class=Response)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return routes


async def load_and_follow(service: Service) -> None:
    """Load the model; with a run, wait for its first checkpoint and take over each newer one."""
    worker, source, settings = service.worker, service.source, service.settings
    loop = asyncio.get_running_loop()
    tried: int | None = None  # the newest step that was looked at: a damaged one is not read again and again

    def load() -> LoadedModel:
        return source.open(quantize=settings.quantize, max_batch=settings.max_batch, draft=settings.draft)

    while True:
        steps = source.steps() if source.follows else []
        newest = steps[-1] if steps else None
        if worker.model is None or (newest is not None and newest != tried and source.newer_than(worker.model.step)):
            tried = newest
            try:
                if not source.waiting:
                    model = await loop.run_in_executor(worker.loader, load)
                    before = worker.model
                    if before is None or before.step is None or (model.step or 0) > before.step:
                        await worker.install(model)
                        worker.problem = None
                        log.info("serving %s from %s", source.name, model.directory)
                        for decision in model.engine.decisions:
                            log.info("%s", decision)
                        if before is not None:
                            service.metrics.swaps.inc()
            except asyncio.CancelledError:
                raise
            except Exception as error:
                log.error("cannot load %s: %s", source.model, error, exc_info=not isinstance(error, SmolforgeError))
                # A later checkpoint may be whole; a draft that does not fit the first one will fit none.
                misfit = isinstance(error, SmolforgeError) and (error.field or "").startswith("draft")
                if worker.model is None and (misfit or not source.follows):
                    worker.problem, service.failure = f"the model cannot be loaded: {error}", error
                    return
        if worker.model is not None and not (source.follows and settings.follow_seconds):
            return
        await asyncio.sleep(settings.follow_seconds or 2.0)


async def _told(_: Request, error: Exception) -> Response:
    return as_api_error(error).response()


async def _invalid(_: Request, error: Exception) -> Response:
    """The first thing wrong with a body, in words."""
    assert isinstance(error, RequestValidationError)
    first: dict[str, Any] = error.errors()[0]
    where = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    no_object = not where and first["type"] in ("json_invalid", "model_attributes_type", "missing")
    if no_object or (len(where) == 1 and where[0].isdigit()):  # a number is the place where the JSON breaks off
        return ApiError(400, "the body is not a JSON object; send one with Content-Type: application/json").response()
    message = first["msg"].removeprefix("Value error, ")
    field = where[0] if where else None
    path = ".".join(part for part in where if part.isidentifier() or part.isdigit())
    return ApiError(400, f"{path}: {message[:1].lower()}{message[1:]}", param=field).response()


async def _http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {})).response()
