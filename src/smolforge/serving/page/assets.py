"""The page's own files, by name: read once, so that no path of a request ever reaches the file system."""

from __future__ import annotations

import hashlib
from importlib import resources

from fastapi import APIRouter, Request
from starlette.responses import Response

from smolforge.serving.errors import ApiError

_TYPES = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}


def router() -> APIRouter:
    """The route of the static files."""
    folder = resources.files("smolforge.serving.page") / "static"
    files = {entry.name: entry.read_bytes() for entry in folder.iterdir() if entry.name.rpartition(".")[2] in _TYPES}
    tags = {name: f'"{hashlib.blake2b(data, digest_size=8).hexdigest()}"' for name, data in files.items()}
    routes = APIRouter(include_in_schema=False)

    @routes.get("/page/static/{name}")
    async def static(name: str, request: Request) -> Response:
        if name not in files:
            raise ApiError(404, f"there is no file {name[:100]!r}")
        headers = {"etag": tags[name], "cache-control": "no-cache"}
        if request.headers.get("if-none-match") == tags[name]:
            return Response(status_code=304, headers=headers)
        return Response(files[name], media_type=_TYPES[name.rpartition(".")[2]], headers=headers)

    return routes
