"""Chats without max_tokens: all run at once, hold what they use, and take no step from a stream that runs."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving_fixtures import Server, metric, serving, wait_until, write_chat_model
from smolforge.generation import Engine
from smolforge.generation.scheduler import GROWTH

CHATS, CONTEXT = 16, 32_768  # sixteen whole contexts would take more than the budget
# Without drafts, which repetitions would bring, a step writes one token of each stream.
BODY = {"temperature": 2.0, "top_p": 1.0, "stream": True, "stream_options": {"include_usage": True}}


@pytest.fixture(scope="module")
def model(slow_run, tmp_path_factory) -> Path:
    """A chat model that takes its time, with a long context."""
    place = write_chat_model(slow_run, tmp_path_factory.mktemp("models") / "long")
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, "max_position_embeddings": CONTEXT}))
    return place


@pytest.fixture(scope="module")
def long_server(model) -> Iterator[Server]:
    with serving(model, "--no-page", "--max-batch", str(CHATS + 1)) as running:
        yield running


def memory_of(server: Server) -> int:
    """Bytes of its own that the server's process holds."""
    lines = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def cpu_of(server: Server) -> float:
    """Seconds of processor time that the server's process has taken."""
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def running(server: Server) -> float:
    return metric(server.get("/metrics").text, "smolforge_running")


@pytest.mark.slow
@pytest.mark.parametrize("limit", [None, 500])
def test_sixteen_chats_beside_a_stream_that_runs(long_server, model, limit) -> None:
    bytes_for = Engine.from_pretrained(model).scheduler.pool.bytes_for
    assert bytes_for(CONTEXT) * CHATS > metric(long_server.get("/metrics").text, "smolforge_cache_bytes", kind="budget")

    def ask(number: int, tokens: int | None):
        """A chat that has its first token."""
        messages = [{"role": "user", "content": f"Once upon a time {number}"}]
        stream = long_server.client().chat.completions.create(
            model="long", messages=messages, max_tokens=tokens, extra_body={"ignore_eos": True}, **BODY
        )
        assert any(chunk.choices and chunk.choices[0].delta.content for chunk in iter(lambda: next(stream), None))
        return stream

    before, held = long_server.get("/metrics").text, memory_of(long_server)
    first = ask(0, 1000)
    began = cpu_of(long_server)
    chats = [ask(number, limit) for number in range(1, CHATS + 1)]
    now, grown = long_server.get("/metrics").text, memory_of(long_server) - held
    print(
        f"limit {limit}: all have a token after {cpu_of(long_server) - began:.2f} s of processor time; {grown >> 20} MiB"
    )
    for chat in chats:
        chat.close()
    wait_until(lambda: running(long_server) <= 1, 20)
    usage = next(chunk.usage for chunk in first if chunk.usage)
    assert long_server.idle()
    after = long_server.get("/metrics").text

    def grew(text: str, name: str) -> float:
        return metric(text, f"smolforge_{name}") - metric(before, f"smolforge_{name}")

    assert metric(now, "smolforge_running") == CHATS + 1 and metric(now, "smolforge_queue_length") == 0
    used = grew(now, "prompt_tokens_total") + grew(now, "completion_tokens_total")
    reserved = metric(now, "smolforge_cache_bytes", kind="reserved")
    # What is counted ahead of each text, and tokens of the last steps, which the server has not counted yet.
    assert reserved <= bytes_for(int(used) + (CHATS + 1) * 2 * GROWTH)
    if limit is None:  # small caches are cleared as a whole, which a short limit makes of these
        assert grown < 2 * reserved + (32 << 20)
    assert usage.completion_tokens == 1000
    assert grew(after, "step_seconds_count") <= usage.completion_tokens, (
        "the running stream waited for a step of others"
    )
