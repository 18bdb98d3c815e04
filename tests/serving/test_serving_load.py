"""Many streams at once, clients that leave, and nothing of it left behind."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import time

import httpx
import pytest

from serving_fixtures import metric, serving

CLIENTS = 64
NORMAL = {"prompt": "Once upon a time", "max_tokens": 30, "seed": 4}


@dataclasses.dataclass
class Seen:
    """What the clients saw."""

    finished: int = 0
    left: int = 0
    refused: int = 0
    problems: list[str] = dataclasses.field(default_factory=list)
    health: list[float] = dataclasses.field(default_factory=list)
    memory: list[tuple[float, int]] = dataclasses.field(default_factory=list)


def resident(pid: int) -> int:
    """Bytes of memory that a process really holds."""
    with open(f"/proc/{pid}/statm") as file:  # noqa: PTH123 (a kernel file)
        return int(file.read().split()[1]) * 4096


async def one_client(http: httpx.AsyncClient, number: int, end: float, seen: Seen) -> None:
    chance = random.Random(number)
    while time.monotonic() < end:
        body = {
            "prompt": "Once upon a time " * chance.choice([1, 1, 4, 12]), "max_tokens": chance.choice([1, 8, 40, 120]),
            "stream": True, "seed": number, "ignore_eos": True,
        }  # fmt: skip
        leave_after = chance.randrange(30) if chance.random() < 1 / 3 else None
        try:
            async with http.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code == 429:
                    assert response.headers["retry-after"]
                    seen.refused += 1
                    await asyncio.sleep(0.2)
                    continue
                if response.status_code != 200:
                    seen.problems.append(f"{response.status_code} {await response.aread()!r}")
                    continue
                events, last = 0, ""
                async for line in response.aiter_lines():
                    if line.startswith("data: "):
                        events, last = events + 1, line[6:]
                        if "error" in last[:20]:
                            seen.problems.append(last)
                        if leave_after is not None and events > leave_after:
                            break
                if leave_after is not None and events > leave_after:
                    seen.left += 1
                elif last == "[DONE]":
                    seen.finished += 1
                else:
                    seen.problems.append(f"a stream ended with {last[:200]!r}")
        except httpx.HTTPError as error:
            seen.problems.append(repr(error))


async def watch(url: str, pid: int, end: float, seen: Seen) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=30) as http:
        while time.monotonic() < end:
            began = time.monotonic()
            answer = await http.get("/health")
            seen.health.append(time.monotonic() - began)
            if answer.status_code != 200:
                seen.problems.append(f"health {answer.status_code}")
            seen.memory.append((time.monotonic(), resident(pid)))
            await asyncio.sleep(0.1)


def press(server, seconds: float) -> Seen:
    seen = Seen()

    async def run() -> None:
        end = time.monotonic() + seconds
        limits = httpx.Limits(max_connections=CLIENTS)
        async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits, headers=server.headers) as http:
            clients = [one_client(http, number, end, seen) for number in range(CLIENTS)]
            await asyncio.gather(watch(server.url, server.process.pid, end, seen), *clients)

    before = server.post("/v1/completions", NORMAL).json()["choices"]
    asyncio.run(run())
    assert seen.problems == []
    assert seen.finished > 0 and seen.left > 0
    assert server.idle(10), "a slot leaked"
    assert server.post("/v1/completions", NORMAL).json()["choices"] == before
    return seen


def test_many_streams_and_clients_that_leave(server):
    press(server, 6)


@pytest.mark.slow
def test_a_minute_of_streams_on_the_pocket_model(tmp_path):
    """Issue 5's load: the pocket model, 64 streams, 60 s; prints what was measured."""
    import torch

    from smolforge.checkpoint.format import write_model
    from smolforge.config import RunConfig, read_preset
    from smolforge.model.architecture import build_model
    from smolforge.tales import document
    from smolforge.tokenizer import Tokenizer

    config = RunConfig.model_validate(read_preset("pocket")).model
    texts = [document(i).text for i in range(1000)]
    tokenizer = Tokenizer.train(texts, config.vocab_size)
    torch.manual_seed(0)
    write_model(tmp_path / "pocket", config, build_model(config).state_dict(), tokenizer)
    with serving(tmp_path / "pocket", "--no-page") as server:
        press(server, 15)  # caches and allocators reach their size
        seen = press(server, 60)
        start = seen.memory[0][0]
        first = [bytes_ for at, bytes_ in seen.memory if at - start < 10]
        last = [bytes_ for at, bytes_ in seen.memory if at - start > 50]
        growth = (sum(last) / len(last)) / (sum(first) / len(first)) - 1
        p99 = sorted(seen.health)[int(0.99 * len(seen.health))]  # printed only: a busy machine decides
        rate = metric(server.get("/metrics").text, "smolforge_completion_tokens_total")
        figures = {
            "finished": seen.finished,
            "left": seen.left,
            "refused": seen.refused,
            "growth": growth,
            "health_p99": p99,
        }
        print(json.dumps({**figures, "tokens": rate}))
        assert growth < 0.05
        answers = (seen.finished + seen.left) / CLIENTS  # that one client got meanwhile
        assert len(seen.health) > answers, "who asks for the health waits behind the texts of others"
