"""The page's door: the key as a login. The form needs no script and nothing from elsewhere."""

from __future__ import annotations

import asyncio
import html
from urllib.parse import parse_qs

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from smolforge.serving.security import COOKIE, Keys
from smolforge.serving.state import Service

WRONG_KEY_SECONDS = 0.5  # slows guessing down; others are not held up
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}</title><link rel="stylesheet" href="/page/static/login.css"></head>
<body><main><h1>{name}</h1><p>This server asks for its key.</p>
<form method="post" action="/login"><label for="key">API key</label>
<input id="key" name="key" type="password" autocomplete="current-password" required autofocus>
<p role="alert" class="error">{problem}</p><button>Enter</button></form></main></body></html>"""


def router(service: Service, keys: Keys) -> APIRouter:
    """The routes."""
    routes = APIRouter(include_in_schema=False)

    def form(problem: str, status: int) -> Response:
        page = _PAGE.format(name=html.escape(service.source.name), problem=html.escape(problem))
        return HTMLResponse(page, status, headers={"cache-control": "no-store"})

    @routes.get("/login")
    async def show() -> Response:
        return form("", 200) if keys.needed else RedirectResponse("/", 303)

    @routes.post("/login")
    async def enter(request: Request) -> Response:
        given = parse_qs((await request.body()).decode("utf-8", "replace")).get("key", [""])[0]
        if not keys.fits(given.encode("utf-8", "replace")):
            await asyncio.sleep(WRONG_KEY_SECONDS)
            return form("That is not the key.", 401)
        answer = RedirectResponse("/", 303)
        if keys.needed:
            secure = request.url.scheme == "https"
            answer.set_cookie(
                COOKIE, keys.session, max_age=30 * 86400, httponly=True, samesite="lax", secure=secure, path="/"
            )
        return answer

    return routes
