"""A model behind one port: a page for people and an API that OpenAI's clients already speak.

    request → security → app → schemas → EngineThread.submit → engine (its own thread) → ServerRequest → answer

settings.py     what a server is told, checked before anything starts
models.py       what is served: a model directory, or a run whose newest checkpoint is followed
engine_thread.py     the thread that owns the engines; request.py  a request as the event loop sees it
security.py       who may enter: hosts, origins, keys, bodies; errors.py  everything said in OpenAI's shape
sidecar.py       a server beside a training; load_test.py  what a server gives to how many clients
schemas.py     what clients may send; completions.py, chat.py, tokens.py  what they get
metrics.py      Prometheus; shutdown and signals live in server.py
page/           the page: Gradio for the controls, our own script for tokens; training.py, timelapse.py feed it

Nothing heavy is imported before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smolforge.serving.app import create_app as create_app
    from smolforge.serving.server import serve as serve
    from smolforge.serving.settings import ServeSettings as ServeSettings

_HOMES = {"ServeSettings": "settings", "create_app": "app", "serve": "server"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
