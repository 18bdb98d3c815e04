"""A server beside a training: `train --serve`."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import httpx
import pytest
from launch import PATIENCE, finish, start, wait_until
from tiny import tiny_file

from smolforge.errors import BadInput
from smolforge.run import Run
from smolforge.serving.sidecar import sidecar


def test_train_serve_follows_the_run_and_ends_with_it(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    words = [tiny_file(tmp_path), "--out", str(tmp_path / "run"), "--steps", "1000000", "--set", "checkpoint.every=50"]
    # Little is printed, for nobody reads it before the end: a full pipe would stop the training.
    rarely = [word for key in ("evaluation", "samples", "logging") for word in ("--set", f"{key}.every=100000")]
    process = start([*words, *rarely, "--serve", str(port)])
    seen: list[int] = []

    def asked() -> bool:
        """Write through the server, as long as it takes for three checkpoints to have passed."""
        try:
            answer = httpx.post(f"{url}/v1/completions", json={"prompt": "Once", "max_tokens": 8}, timeout=PATIENCE)
        except httpx.ConnectError:
            assert not seen, "it was there before"
            return False
        if answer.status_code == 200:
            seen.append(int(answer.json()["system_fingerprint"].rpartition("-")[2]))
        else:
            assert answer.status_code == 503 and not seen, answer.text
        return len(set(seen)) >= 3

    try:
        assert wait_until(asked, process, 0.2)
        assert seen == sorted(seen), "each answer comes from the newest checkpoint"
        assert httpx.get(f"{url}/page/run", timeout=PATIENCE).json()["live"]
    finally:
        process.send_signal(signal.SIGINT)
    finish(process, 130)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


def test_a_port_that_cannot_be_had_is_said_before_training(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for port in (taken.getsockname()[1], 0, 70000):
            with pytest.raises(BadInput) as error, sidecar(Run(tmp_path), port):
                pass
            assert error.value.field == "--serve" and str(port) in str(error.value)
