"""Everything that goes wrong, said in the shape that OpenAI's clients read.

{"error": {"message": ..., "type": ..., "param": the field or null, "code": ...}}
"""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from smolforge.errors import SmolforgeError

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """An answer that is not the one asked for.

    Args:
        status: HTTP status.
        message: one sentence that says what happened and what would be right.
        param: the field of the request that it is about.
        code: a word for programs, such as `model_not_found`.
        headers: of the response, e.g. Retry-After.
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
        message = self.message.encode("utf-8", "replace").decode()
        kind = TYPES.get(self.status, "server_error")
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The same as an HTTP response."""
        return JSONResponse(self.body(), self.status, self.headers)


def refused(field: str, message: str, code: str | None = None) -> ApiError:
    """A 400 about one field."""
    return ApiError(400, f"{field}: {message}", param=field, code=code)


def busy(message: str, *, seconds: int = 1) -> ApiError:
    """A 429 that says when to come back."""
    return ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": str(seconds)})


def of_smolforge(error: SmolforgeError, status: int = 400) -> ApiError:
    """A SmolforgeError as an answer."""
    field = f"{error.field}: " if error.field else ""
    hint = f" {error.hint}" if error.hint else ""
    code = "context_length_exceeded" if "context" in error.message else None
    return ApiError(status, f"{field}{error.message}.{hint}", param=error.field, code=code)
