"""smolforge serve: a page and an OpenAI-compatible API over a model or a running training."""

from __future__ import annotations

import argparse
import os
from typing import Any

from smolforge.cli.options import MODEL_HELP, add_inference, add_numbers

EXAMPLES = """\
examples:
  smolforge serve runs/pocket                    the page and the API on http://127.0.0.1:8000
  smolforge serve HuggingFaceTB/SmolLM2-135M --port 9000
  SMOLFORGE_API_KEY=... smolforge serve runs/pocket --host 0.0.0.0

A run that is still training is followed: its newest checkpoint takes over while requests go on. With a key, API
clients send 'Authorization: Bearer KEY' and the page asks for it once.
"""


def add(verbs: Any) -> None:
    """Describe the verb's arguments."""
    parser = verbs.add_parser(
        "serve",
        help="serve a page and an OpenAI-compatible API",
        description="Serve a model, or a run while it trains, on a page and an OpenAI-compatible API.",
        epilog=EXAMPLES,
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--host", default="127.0.0.1", help="address to bind (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="port, 0 for a free one (default 8000)")
    parser.add_argument(
        "--api-key", default=None, metavar="KEY", help="require this key, or one of KEY,KEY (better: SMOLFORGE_API_KEY)"
    )
    parser.add_argument("--allow-public", action="store_true", help="serve a public address without a key")
    parser.add_argument(
        "--cors-origin", dest="cors_origins", action="append", default=[], metavar="URL",
        help="let this web origin call the API",
    )  # fmt: skip
    parser.add_argument(
        "--root-path", default="", metavar="PATH", help="prefix under which a reverse proxy serves this, such as /llm"
    )
    parser.add_argument(
        "--forwarded-allow-ips", default="", metavar="IPS",
        help="reverse proxies whose X-Forwarded-For is believed: addresses, networks with commas between them, or *",
    )  # fmt: skip
    parser.add_argument("--name", default=None, help="id of the model in the API (default: its directory's name)")
    add_inference(parser)
    limits = parser.add_argument_group("limits")
    integer = (
        ("--max-batch", 16, "sequences generated at once"),
        ("--max-queue", 256, "sequences that may wait; further ones get 429"),
        ("--max-per-client", 64, "unfinished requests of one client; further ones get 429"),
        ("--max-body", 512 << 10, "bytes of a request"),
    )
    real = (
        ("--request-seconds", 600.0, "longest time for one request"),
        ("--drain-seconds", 10.0, "time that running requests get when the server stops"),
        ("--follow-seconds", 2.0, "how often a run is checked for a new checkpoint; 0 keeps the first one"),
    )
    add_numbers(limits, int, "N", *integer)
    add_numbers(limits, float, "S", *real)
    parser.add_argument("--no-page", dest="page", action="store_false", help="only the API")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve."""
    from dataclasses import fields

    from smolforge.errors import BadInput
    from smolforge.serving.settings import KEY_VARIABLE, ServeSettings

    if args.api_key is None:
        args.api_key = os.environ.get(KEY_VARIABLE) or None
    args.cors_origins = tuple(origin.rstrip("/") for origin in args.cors_origins)
    # Each option has the name of its setting; some settings have no option.
    names = {field.name for field in fields(ServeSettings)}
    settings = ServeSettings(**{name: value for name, value in vars(args).items() if name in names})
    try:
        from smolforge.serving.server import serve
    except ModuleNotFoundError as error:
        hint = "Install it with: pip install 'smolforge[web]'"
        raise BadInput(f"serving needs the package {error.name}", hint=hint) from None
    return serve(settings)
