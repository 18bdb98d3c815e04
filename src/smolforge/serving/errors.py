"""Every error in the shape that OpenAI's clients read.

{"error": {"message": ..., "type": ..., "param": the field or null, "code": ...}}
"""

from __future__ import annotations

import logging
from typing import Any

from starlette.responses import JSONResponse

from smolforge.errors import SmolforgeError
from smolforge.formatting import replace_lone_surrogates

logger = logging.getLogger(__name__)
# OpenAI's type of the error, and when it happens, by status.
STATUSES = {
    400: ("invalid_request_error", "A field is wrong or not supported; the message names it."),
    401: ("authentication_error", "No key, or a wrong one."),
    403: ("permission_error", "Another web page or host name asks."),
    404: ("not_found_error", "No such model."),
    408: ("timeout_error", "The body came too slowly."),
    413: ("invalid_request_error", "The body is too large."),
    429: ("rate_limit_error", "Too many requests are waiting; see Retry-After."),
    500: ("server_error", "The model failed."),
    503: ("service_unavailable_error", "Loading, broken or shutting down."),
    504: ("timeout_error", "The request took too long."),
}


class ApiError(Exception):
    """An error answer.

    Its message is one sentence that says what happened and what would be right, `param` the field of the request that
    is wrong, `code` a word for programs, such as `model_not_found`.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """The error as OpenAI writes it."""
        # A lone surrogate of the client's JSON cannot be sent back as UTF-8.
        message = replace_lone_surrogates(self.message)
        kind = STATUSES.get(self.status, STATUSES[500 if self.status >= 500 else 400])[0]
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The error as an HTTP response."""
        return JSONResponse(self.body(), self.status, self.headers)


def refused(field: str, message: str, code: str | None = None) -> ApiError:
    """A 400 about one field."""
    return ApiError(400, f"{field}: {message}", param=field, code=code)


def unsupported(field: str, message: str) -> ApiError:
    """A 400 about a field that this server does not support."""
    return refused(field, message, "unsupported_parameter")


def busy(message: str) -> ApiError:
    """A 429 that says when to try again."""
    return ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": "1"})


def not_ready(reason: str) -> ApiError:
    """A 503 while no model is served."""
    return ApiError(503, reason, code="not_ready", headers={"Retry-After": "2"})


def shutting_down(headers: dict[str, str] | None = None) -> ApiError:
    """A 503 at the end of the server."""
    return ApiError(503, "the server is shutting down", code="shutting_down", headers=headers)


def as_api_error(error: Exception) -> ApiError:
    """The answer to the client for `error`; details of unexpected errors only go to the log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, SmolforgeError):
        field = f"{error.field}: " if error.field else ""
        hint = f" {error.hint}" if error.hint else ""
        code = "context_length_exceeded" if "context" in error.message else None
        status = 400 if error.exit_code == 2 else 500
        return ApiError(status, f"{field}{error.message}.{hint}", param=error.field, code=code)
    if isinstance(error, RecursionError):
        return ApiError(400, "the body is nested too deeply")
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed; its log has the details")
