"""Tuning runs small enough to be made many times over, and how they are started, killed and compared."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

from smolforge import tales
from smolforge.checkpoint.format import write_model
from smolforge.cli import run as smolforge
from smolforge.config import ModelConfig
from smolforge.metrics_log import read_metrics
from smolforge.model.architecture import build_model
from smolforge.run import Run
from smolforge.tokenizer import Tokenizer

SHAPE = ModelConfig(
    vocab_size=420, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, rope_theta=10000.0,
)  # fmt: skip
QUICK = [
    "--set", "training.precision=fp32", "--set", "training.threads=1", "--set", "training.compile=off",
    "--set", "logging={every: 1, trackers: []}", "--set", "samples.max_tokens=8", "--set", "data.holdout=0.1",
    "--set", "data.workers=1", "--set", "checkpoint.every=4", "--set", "evaluation.every=6", "--batch-size", "4",
]  # fmt: skip
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def make_base(path: Path, **changes: int) -> Path:
    """A model without a chat template; `changes` to its shape."""
    shape = SHAPE.model_copy(update=changes)
    tokenizer = Tokenizer.train([tales.document(i).text for i in range(60)], SHAPE.vocab_size)
    write_model(path, shape, build_model(shape, seed=1).state_dict(), tokenizer)
    return path


def words(base: Path, data: Path, out: Path, *more: str) -> list[str]:
    length = [] if any(word.startswith("training.steps=") for word in more) else ["--epochs", "3"]
    return ["finetune", str(base), "--data", str(data), "--out", str(out), *length, *QUICK, *more]


def steps_of(run: Run) -> list[tuple[int, float, str]]:
    return [(row["step"], row["loss"], row["data_digest"]) for row in read_metrics(run) if "loss" in row]


def weights_of(run: Run) -> bytes:
    return (run.checkpoints_path / "last" / "model.safetensors").read_bytes()


def start(arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "smolforge", *arguments],
        env={**ENVIRONMENT, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def kill_and_resume(command: list[str], run: Run, *, whole: Run) -> None:
    """Kill a run in the middle and start it again; it must end as the whole one did, bit for bit."""
    process = start(command)
    wanted = random.Random(3).randint(5, 8)
    while process.poll() is None and max((step for step, *_ in steps_of(run)), default=0) < wanted:
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert 0 < len(steps_of(run)) < len(steps_of(whole))
    assert smolforge(command) == 0
    assert steps_of(run) == steps_of(whole) and weights_of(run) == weights_of(whole)


def run_on_two_ranks(command: list[str]) -> None:
    """Run a command in two processes that share the work."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
              "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
    processes = [start(command, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(2)]
    for process in processes:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output[-2000:]
