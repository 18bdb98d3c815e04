"""How a server holds up as clients join: tokens/s of all together, and how long each waits for its first token.

Any server that speaks OpenAI's completions can be pressed; benchmarks/serving puts others beside ours this way.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from smolforge.errors import RunFailed

CLIENTS = (1, 4, 8, 16)
PROMPT_LETTERS = 160  # about 40 tokens
START_SECONDS = 180.0


def measure(
    model: str | None = None,
    *,
    clients: Sequence[int] = CLIENTS,
    tokens: int = 64,
    rounds: int = 2,
    quantize: str = "auto",
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Serve a model in a process of its own and run_load it with ever more clients.

    Args:
        model: what to serve; SmolLM2-135M's shape with random weights unless given.
        clients: how many ask at once, level by level.
        tokens: length of each answer.
        rounds: answers that each client asks for, one after the other.
        quantize: as of `smolforge serve`.

    Returns:
        The model, the settings, and of each level what `run_load` found.

    Raises:
        SmolforgeError: the server did not start, or answered with an error.
    """
    with contextlib.ExitStack() as stack:
        if model is None:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="smolforge-bench-")))
            say("making a model of SmolLM2-135M's shape with random weights")
            model = str(make_model(place / "smollm2-135m-shape"))
        port = free_port()
        options = ["--port", str(port), "--quantize", quantize, "--no-page"]
        command = [sys.executable, "-m", "smolforge", "serve", model, *options]
        url = stack.enter_context(running(command, f"http://127.0.0.1:{port}"))
        name = httpx.get(f"{url}/v1/models", timeout=30).json()["data"][0]["id"]
        levels = sweep(url, name, clients, tokens, rounds, say, ignore_eos=True)
    settings = {"tokens": tokens, "rounds": rounds, "quantize": quantize, "threads": os.cpu_count()}
    return {"bench": "serve", "model": name, **settings, "levels": levels}


def table(result: dict[str, Any]) -> str:
    """The levels as text, one a line."""
    lines = [
        f"{result['model']}, {result['tokens']} tokens an answer, precision {result['quantize']}",
        f"{'clients':>7} {'tokens/s':>9} {'each':>7} {'first token':>12} {'slowest':>9}",
    ]
    for level in result["levels"]:
        rate, clients = level["tokens_per_second"], level["clients"]
        median, slowest = level["first_token_seconds"] * 1e3, level["slowest_first_token_seconds"] * 1e3
        lines.append(f"{clients:>7} {rate:>9.1f} {rate / clients:>7.1f} {median:>9.0f} ms {slowest:>6.0f} ms")
    return "\n".join(lines)


def sweep(
    url: str, model: str, clients: Sequence[int], tokens: int, rounds: int, say: Callable[[str], None], **extra: Any
) -> list[dict[str, Any]]:
    """`run_load` with each number of clients; `extra` goes into every request. No prompt is used twice."""
    prompts = _prompts()
    asyncio.run(_run_load(url, model, 1, 8, 1, prompts, extra))  # what is made at the first request
    levels = []
    for count in clients:
        levels.append(run_load(url, model, count, tokens, rounds, prompts, **extra))
        say(f"{count} clients: {levels[-1]['tokens_per_second']:.1f} tokens/s")
    return levels


def run_load(
    url: str, model: str, clients: int, tokens: int, rounds: int, prompts: Iterator[str], **extra: Any
) -> dict[str, Any]:
    """Let clients ask at once.

    Returns:
        clients, tokens (written in all), seconds (wall time of all), tokens_per_second (aggregate),
        first_token_seconds (median over all answers) and slowest_first_token_seconds.

    Raises:
        RunFailed: an answer was an error.
    """
    began = time.perf_counter()
    answers = asyncio.run(_run_load(url, model, clients, tokens, rounds, prompts, extra))
    seconds = time.perf_counter() - began
    written, waits = sum(count for count, _ in answers), [wait for _, wait in answers]
    return {
        "clients": clients, "tokens": written, "seconds": seconds, "tokens_per_second": written / seconds,
        "first_token_seconds": statistics.median(waits), "slowest_first_token_seconds": max(waits),
    }  # fmt: skip


async def _run_load(
    url: str, model: str, clients: int, tokens: int, rounds: int, prompts: Iterator[str], extra: dict[str, Any]
) -> list[tuple[int, float]]:
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=clients)) as http:

        async def client() -> list[tuple[int, float]]:
            body = {"model": model, "max_tokens": tokens, "stream": True, **extra}
            return [await _ask(http, {**body, "prompt": next(prompts)}) for _ in range(rounds)]

        return [answer for answers in await asyncio.gather(*(client() for _ in range(clients))) for answer in answers]


async def _ask(http: httpx.AsyncClient, body: dict[str, Any]) -> tuple[int, float]:
    """(tokens, seconds until the first text) of one streamed answer."""
    began, first, pieces, whole = time.perf_counter(), None, 0, False
    async with http.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RunFailed(f"the server answered {response.status_code}: {(await response.aread())[:500]!r}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            news = json.loads(line[6:])
            if "error" in news:
                raise RunFailed(f"the server broke off: {news['error']}")
            for choice in news.get("choices", ()):
                whole = whole or choice.get("finish_reason") == "length"
                if choice.get("text"):
                    pieces += 1
                    first = first or time.perf_counter()
    # A piece may hold several tokens, or none of its own while a character is not whole: only the limit is exact.
    return body["max_tokens"] if whole else pieces, (first or time.perf_counter()) - began


def _prompts() -> Iterator[str]:
    from smolforge.tales import document

    return (document(i).text[:PROMPT_LETTERS].rstrip() for i in itertools.count())


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


@contextlib.contextmanager
def running(command: list[str], url: str, environment: dict[str, str] | None = None) -> Iterator[str]:
    """A server's process, from when its /health answers 200 to the end of the block.

    Raises:
        RunFailed: it ended, or did not answer within three minutes.
    """
    process = subprocess.Popen(
        command, env={**os.environ, **(environment or {})}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        end = time.monotonic() + START_SECONDS
        while not _healthy(url):
            if process.poll() is not None or time.monotonic() > end:
                raise RunFailed("the server did not start", hint=f"Run it by hand to see why: {' '.join(command)}")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=10).status_code == 200
    except httpx.TransportError:
        return False


def make_model(place: Path) -> Path:
    """A model of SmolLM2-135M's shape: random weights, and a tokenizer that has a text for each of its ids."""
    from smolforge.checkpoint.format import write_model
    from smolforge.config import ModelConfig
    from smolforge.model.architecture import build_model
    from smolforge.tales import document
    from smolforge.tokenizer import Tokenizer

    config = ModelConfig()
    texts = [document(i).text for i in range(300)]
    place.mkdir(parents=True)
    write_model(place, config, build_model(config, seed=0).state_dict(), Tokenizer.train(texts, 2048))
    path = place / "tokenizer.json"
    rules = json.loads(path.read_text())
    taken = {*rules["model"]["vocab"].values(), *(token["id"] for token in rules["added_tokens"])}
    free = (i for i in range(config.vocab_size) if i not in taken)
    rules["model"]["vocab"].update({f"\u0120word{i}": i for i in free})
    path.write_text(json.dumps(rules))
    return place
