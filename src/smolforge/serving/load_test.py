"""How a server holds up as clients join: tokens/s of all clients together, and the time each waits for its first token.

`run_load` works with any server that speaks OpenAI's completions; benchmarks/serving compares other servers with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import logging
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from smolforge.errors import RunFailed

logger = logging.getLogger(__name__)
CLIENTS = (1, 4, 8, 16)
PROMPT_CHARACTERS = 160  # about 40 tokens
START_SECONDS = 180.0
STOP_SECONDS = 30.0


def measure(
    model: str | None = None,
    *,
    clients: Sequence[int] = CLIENTS,
    tokens: int = 64,
    rounds: int = 2,
    quantize: str = "auto",
) -> dict[str, Any]:
    """Serve a model, or random weights in the shape of SmolLM2-135M, to each number of clients that ask at once.

    Each client asks for `rounds` answers of `tokens` tokens, one after the other.

    Returns:
        The model, the settings, and the result of `run_load` for each number of clients. SmolforgeError where the
        server did not start, or answered with an error.
    """
    with contextlib.ExitStack() as stack:
        if model is None:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="smolforge-bench-")))
            logger.info("making a model with random weights in the shape of SmolLM2-135M")
            model = str(make_model(place / "smollm2-135m-shape"))
        command = serve_command(model, "--quantize", quantize, "--no-page")
        url = stack.enter_context(start_server(command)).url
        name = httpx.get(f"{url}/v1/models", timeout=30).json()["data"][0]["id"]
        levels = sweep(url, name, clients, tokens, rounds, ignore_eos=True)
    settings = {"tokens": tokens, "rounds": rounds, "quantize": quantize, "threads": os.cpu_count()}
    return {"bench": "serve", "model": name, **settings, "levels": levels}


def table(result: dict[str, Any]) -> str:
    """The levels as text, one per line."""
    lines = [
        f"{result['model']}, {result['tokens']} tokens per answer, precision {result['quantize']}",
        f"{'clients':>7} {'tokens/s':>9} {'each':>7} {'first token':>12} {'slowest':>9}",
    ]
    for level in result["levels"]:
        rate, clients = level["tokens_per_second"], level["clients"]
        median, slowest = level["first_token_seconds"] * 1e3, level["slowest_first_token_seconds"] * 1e3
        lines.append(f"{clients:>7} {rate:>9.1f} {rate / clients:>7.1f} {median:>9.0f} ms {slowest:>6.0f} ms")
    return "\n".join(lines)


def sweep(url: str, model: str, clients: Sequence[int], tokens: int, rounds: int, **extra: Any) -> list[dict[str, Any]]:
    """`run_load` with each number of clients; `extra` goes into every request. No prompt is used twice."""
    from smolforge.tales import document

    prompts = (document(i).text[:PROMPT_CHARACTERS].rstrip() for i in itertools.count())
    run_load(url, model, 1, 8, 1, prompts, **extra)  # what is prepared at the first request
    levels = []
    for count in clients:
        levels.append(run_load(url, model, count, tokens, rounds, prompts, **extra))
        logger.info("%d clients: %.1f tokens/s", count, levels[-1]["tokens_per_second"])
    return levels


def run_load(
    url: str, model: str, clients: int, tokens: int, rounds: int, prompts: Iterator[str], **extra: Any
) -> dict[str, Any]:
    """Let clients ask at once; tokens, seconds and tokens/s of all together, and the median and slowest first token.

    Raises:
        RunFailed: an answer was an error.
    """
    body = {"model": model, "max_tokens": tokens, "stream": True, **extra}

    async def run() -> list[tuple[int, float]]:
        async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=clients)) as http:

            async def client() -> list[tuple[int, float]]:
                return [await _ask(http, {**body, "prompt": next(prompts)}) for _ in range(rounds)]

            return list(itertools.chain(*await asyncio.gather(*(client() for _ in range(clients)))))

    began = time.perf_counter()
    answers = asyncio.run(run())
    seconds = time.perf_counter() - began
    written, waits = sum(count for count, _ in answers), [wait for _, wait in answers]
    return {
        "clients": clients, "tokens": written, "seconds": seconds, "tokens_per_second": written / seconds,
        "first_token_seconds": statistics.median(waits), "slowest_first_token_seconds": max(waits),
    }  # fmt: skip


async def _ask(http: httpx.AsyncClient, body: dict[str, Any]) -> tuple[int, float]:
    """(tokens, seconds until the first text) of one streamed answer."""
    began, first, events, complete = time.perf_counter(), None, 0, False
    async with http.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RunFailed(f"the server answered {response.status_code}: {(await response.aread())[:500]!r}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            news = json.loads(line[6:])
            if "error" in news:
                raise RunFailed(f"the server ended a stream: {news['error']}")
            for choice in news.get("choices", ()):
                complete = complete or choice.get("finish_reason") == "length"
                if choice.get("text"):
                    events += 1
                    first = first or time.perf_counter()
    # An event can bring several tokens, or none while a character is incomplete: only the limit is exact.
    return body["max_tokens"] if complete else events, (first or time.perf_counter()) - began


@dataclasses.dataclass
class ServerProcess:
    """A server in a process of its own, and what it wrote to stderr."""

    process: subprocess.Popen[str]
    url: str
    log: list[str]

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait; returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def serve_command(model: str | Path, *options: str) -> list[str]:
    """The command that serves `model` on a free port."""
    return [sys.executable, "-m", "smolforge", "serve", str(model), "--port", "0", *options]


@contextlib.contextmanager
def start_server(
    command: list[str], *, url: str | None = None, environment: dict[str, str] | None = None, wait: bool = True
) -> Iterator[ServerProcess]:
    """Run a server until the end of the block; `wait` until its /health answers 200.

    Args:
        url: its address; the one that smolforge's server prints unless given.
        environment: variables for the process besides those of this one.

    Raises:
        RunFailed: it ended, or did not answer within three minutes; with the end of what it printed.
    """
    variables = {**os.environ, **(environment or {})}
    process = subprocess.Popen(
        command, env=variables, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True
    )
    assert process.stderr is not None
    log: list[str] = []
    reader = threading.Thread(target=log.extend, args=(process.stderr,), daemon=True)
    server = ServerProcess(process, url or "", log)
    try:
        while not server.url and (line := process.stderr.readline()):
            log.append(line)
            found = re.search(r"on (http://\S+)$", line.strip())
            server.url = found[1] if found else ""
        reader.start()
        end = time.monotonic() + START_SECONDS
        while not server.url or (wait and not _healthy(server.url)):
            if not server.url or process.poll() is not None or time.monotonic() > end:
                reader.join(1)
                hint = f"It printed: {''.join(log)[-2000:].strip() or 'nothing'}"
                raise RunFailed(f"the server did not start: {' '.join(command)}", hint=hint)
            time.sleep(0.05)
        yield server
    finally:
        server.stop()


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=10).status_code == 200
    except httpx.TransportError:
        return False


def make_model(place: Path) -> Path:
    """A model of SmolLM2-135M's shape: random weights, and a tokenizer with a text for each of its ids."""
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
