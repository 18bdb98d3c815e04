"""A model behind one port: a page for people and an API that OpenAI's clients already speak.

    request → guard → app → protocol → Worker.submit → engine (its own thread) → Generation → answer

settings.py     what a server is told, checked before anything starts
models.py       what is served: a model directory, or a run whose newest checkpoint is followed
worker.py       the thread that owns the engines; generation.py  a request as the event loop sees it
guard.py        who may enter: hosts, origins, keys, bodies; errors.py  everything said in OpenAI's shape
beside.py       a server beside a training; bench.py    what a server gives to how many clients
protocol.py     what clients may send; completions.py, chat.py, tokens.py  what they get
metrics.py      Prometheus; shutdown and signals live in server.py
page/           the page: Gradio for the controls, our own script for tokens; training.py, lapse.py feed it

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
