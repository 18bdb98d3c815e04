"""No body makes the server fail: schemathesis over its own OpenAPI document, and plain nonsense."""

from __future__ import annotations

import json
import random
import string

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

PATHS = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/page/write", "/page/timelapse"]
WORDS = [
    "prompt", "model", "max_tokens", "temperature", "top_p", "n", "stream", "stop", "seed", "logprobs", "echo", "logit_bias",
    "messages", "role", "content", "user", "stream_options", "tokens", "ids", "steps", "top_k", "suffix", "type", "text",
]  # fmt: skip
EXAMPLES = 12


@pytest.fixture(scope="module")
def schema(server):
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json", headers=server.headers)


def test_schemathesis_finds_no_server_error(server, schema):
    checks = [not_a_server_error, content_type_conformance, response_schema_conformance]
    operations = [result.ok() for result in schema.get_all_operations()]
    assert {operation.path for operation in operations} >= {"/v1/completions", "/v1/models", "/health", "/tokenize"}
    for operation in operations:
        options = settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))

        def check(case) -> None:
            if isinstance(case.body, dict) and isinstance(case.body.get("max_tokens"), int):
                case.body["max_tokens"] %= 8  # what is checked is the answer's form, not the model's patience
            case.call_and_validate(checks=checks, timeout=30, headers=server.headers)

        schemathesis_run(operation, check, options)


def schemathesis_run(operation, check, options) -> None:
    """Run `check` on generated cases of one operation."""
    from hypothesis import given

    @options
    @given(case=operation.as_strategy())
    def run(case) -> None:
        check(case)

    run()


def nonsense(chance: random.Random, depth: int = 0):
    """A random JSON value, or nearly one."""
    kind = chance.randrange(9 if depth < 4 else 6)
    if kind == 0:
        return chance.choice([None, True, False, 0, -1, 2**63, 10**25, 1.5, -0.0, 1e308])
    if kind == 1:
        return chance.randint(-500, 500)
    if kind in (2, 3):
        return "".join(chance.choices(string.printable + "é語🌟\u200d\x00", k=chance.randrange(20)))
    if kind in (4, 5):
        return chance.choice([*WORDS, "\ud800", "<|endoftext|>", "9" * 50])
    if kind == 6:
        return [nonsense(chance, depth + 1) for _ in range(chance.randrange(5))]
    return {chance.choice(WORDS): nonsense(chance, depth + 1) for _ in range(chance.randrange(6))}


def body(chance: random.Random) -> bytes:
    """A malformed body: broken JSON, JSON of the wrong shape, or a good request with something wrong in it."""
    kind = chance.randrange(4)
    if kind == 0:
        return chance.randbytes(chance.randrange(200))
    value = nonsense(chance)
    if kind == 1 and isinstance(value, dict):
        value = {
            "prompt": "a",
            "messages": [{"role": "user", "content": "a"}],
            "max_tokens": 2,
            **value,
            "n": chance.choice([0, -1, "x"]),
        }
    data = json.dumps(value).encode()
    if kind == 2:
        data = data[: chance.randrange(len(data) + 1)] + chance.choice([b"", b"\xff", b"[" * 3000, b'{"a":', b"NaN"])
    return data


def bombard(server, count: int, seed: int) -> None:
    chance = random.Random(seed)
    accepted = 0
    with httpx.Client(base_url=server.url, timeout=30, headers=server.headers) as http:
        for _ in range(count):
            data = body(chance)
            path = chance.choice(PATHS)
            types = ["application/json"] * 9 + ["text/plain"]
            response = http.post(path, content=data, headers={"Content-Type": chance.choice(types)})
            assert response.status_code < 500, (path, data, response.text)
            if response.status_code == 200:
                accepted += 1
                continue
            assert response.json()["error"]["message"], (path, data)
        assert accepted < count / 4, "most of these are wrong"
        assert http.get("/health").status_code == 200
        answer = http.post("/v1/completions", json={"prompt": "Once upon", "max_tokens": 4, "temperature": 0})
        assert answer.json()["usage"]["completion_tokens"] == 4


def test_malformed_bodies_get_a_message(server):
    bombard(server, 300, seed=1)


@pytest.mark.slow
def test_five_thousand_malformed_bodies(server):
    bombard(server, 5000, seed=2)
