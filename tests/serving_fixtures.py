"""A tiny run that has learned a little, and real servers of it as subprocesses."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from smolforge.serving.load_test import ServerProcess, serve_command, start_server

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STEPS = (5, 15, 160)
CONTEXT = 1024
TOLD = "Once upon a time there was a {a} {b} who lived in a {c}. One day the {b} found a {d}. \u2728 "


@dataclasses.dataclass
class Server(ServerProcess):
    """A running server."""

    key: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        """What shows the key."""
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def client(self, key: str | None = None, **options):
        """An official OpenAI client of it."""
        import openai

        shown = key or self.key or "none"
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=shown, max_retries=0, timeout=60, **options)

    def get(self, path: str) -> httpx.Response:
        """A GET with the key."""
        return httpx.get(self.url + path, timeout=30, headers=self.headers)

    def post(self, path: str, body=None, headers=None, **options) -> httpx.Response:
        """A POST with the key."""
        return httpx.post(
            self.url + path, json=body, timeout=60, headers={**self.headers, **(headers or {})}, **options
        )

    def idle(self, seconds: float = 20) -> bool:
        """Whether, within some time, nothing waits, nothing runs and nothing of the cache is held."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            text = self.get("/metrics").text
            held = metric(text, "smolforge_cache_bytes", kind="reserved")
            if metric(text, "smolforge_running") == metric(text, "smolforge_queue_length") == held == 0:
                return True
            time.sleep(0.05)
        return False


def metric(text: str, name: str, **labels: str) -> float:
    """The sum of a metric's samples that carry these labels."""
    total = 0.0
    for line in text.splitlines():
        match = re.match(rf"^{re.escape(name)}(?:\{{(.*)\}})? (\S+)$", line)
        if match and all(f'{key}="{value}"' in (match[1] or "") for key, value in labels.items()):
            total += float(match[2])
    return total


@contextlib.contextmanager
def serving(model: Path, *options: str, key: str | None = None, wait: bool = True) -> Iterator[Server]:
    """A server in a process of its own, on a free port."""
    environment = {
        "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1",
        "SMOLFORGE_API_KEY": key or "",
    }  # fmt: skip
    with start_server(serve_command(model, *options), environment=environment, wait=wait) as running:
        yield Server(running.process, running.url, running.log, key)


def wait_until(true, seconds: float, explain=lambda: "") -> None:
    """Wait for a condition; connection errors count as not yet."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(httpx.TransportError):
            if true():
                return
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s. {explain()}")


def write_run(place: Path, idle_layers: int = 0) -> Path:
    """A run of three checkpoints of a tiny model, with its logs.

    Args:
        idle_layers: wide layers that add nothing to the text but take time, for tests that must see it being written.
    """
    import torch

    from smolforge.checkpoint import commit
    from smolforge.checkpoint.format import write_model
    from smolforge.config import ModelConfig
    from smolforge.metrics_log import MetricsLog
    from smolforge.model.architecture import build_model
    from smolforge.run import Run
    from smolforge.tokenizer import Tokenizer

    words = {
        "a": ["little", "brave", "sleepy", "clever"],
        "b": ["fox", "bear", "owl", "mouse"],
        "c": ["forest", "castle", "cave", "garden"],
        "d": ["golden key", "silver bell", "red balloon", "tiny door"],
    }
    texts = [
        TOLD.format(a=a, b=b, c=c, d=d) for a in words["a"] for b in words["b"] for c in words["c"] for d in words["d"]
    ]
    texts += ["The future of artificial intelligence is small and bright.", "In the distant galaxy a star sang. 🌟"]
    tokenizer = Tokenizer.train(texts, 400)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT, rope_theta=10000.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = build_model(config)
    stream = [i for text in tokenizer.encode_batch(texts) for i in [*text, tokenizer.eos_id]]
    data = torch.tensor(stream)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    run = Run(place)
    run.checkpoints_path.mkdir(parents=True)
    run.config_path.write_text("model: {}\n")
    metrics, samples = MetricsLog(run.metrics_path), MetricsLog(run.samples_path)
    for step in range(1, STEPS[-1] + 1):
        rate = 4e-3 * min(1.0, step / 10, (STEPS[-1] + 1 - step) / 60)
        optimizer.param_groups[0]["lr"] = rate
        starts = torch.randint(0, len(data) - 65, (8,))
        batch = torch.stack([data[start : start + 65] for start in starts])
        loss = torch.nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        optimizer.step()
        row = {"step": step, "tokens": step * 512, "loss": loss.item(), "lr": rate, "grad_norm": norm}
        metrics.append({**row, "tokens_per_second": 20000.0 + 97 * (step % 7), "time": time.time()})
        if step in STEPS:
            shape, weights = with_idle_layers(config, model.state_dict(), idle_layers)
            commit.commit(
                run.checkpoints_path, step, lambda path, s=shape, w=weights: write_model(path, s, w, tokenizer)
            )
            validation = {"loss": loss.item() + 0.1, "perplexity": 3.0, "bits_per_byte": 1.0}
            metrics.append({"step": step, "tokens": step * 512, "validation": validation, "time": time.time()})
            samples.append(
                {"step": step, "prompt": "Once upon a time", "text": f" there was a sample of step {step}.",
                 "finish_reason": "length", "seed": 0}
            )  # fmt: skip
    return place


def with_idle_layers(config, weights, count: int):
    """The same model behind `count` more layers whose output projections are zero, all of them wide."""
    import torch

    if not count:
        return config, weights
    wide = 2048
    fields = {"intermediate_size": wide, "num_hidden_layers": config.num_hidden_layers + count}
    shape = config.model_copy(update=fields)
    found = {}
    for name, tensor in weights.items():
        if ".mlp." in name:  # zeros in the new columns and rows
            size = (wide, tensor.shape[1]) if "down" not in name else (tensor.shape[0], wide)
            padded = torch.zeros(size)
            padded[: tensor.shape[0], : tensor.shape[1]] = tensor
            tensor = padded
        found[name] = tensor
    for layer in range(config.num_hidden_layers, shape.num_hidden_layers):
        for name in [n for n in found if n.startswith("model.layers.0.")]:
            tensor = found[name]
            idle = torch.zeros_like(tensor) if "o_proj" in name or "down_proj" in name else tensor.clone()
            found[name.replace(".0.", f".{layer}.", 1)] = idle
    return shape, found


@pytest.fixture(scope="session")
def slow_run(tmp_path_factory) -> Path:
    """The same run, written slowly enough to be watched."""
    return write_run(tmp_path_factory.mktemp("runs") / "slow", idle_layers=72)


@pytest.fixture(scope="session")
def slow_server(slow_run) -> Iterator[Server]:
    """A server of the slow run that writes two sequences at once."""
    with serving(slow_run, "--max-batch", "2", "--no-page") as running:
        yield running


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> Path:
    """A run with three checkpoints."""
    return write_run(tmp_path_factory.mktemp("runs") / "tiny")


def write_chat_model(run: Path, place: Path, **generation) -> Path:
    """The last checkpoint of a run with a chat template; `generation`: what its generation_config.json says."""
    import shutil

    newest = max((run / "checkpoints").glob("step-*"))
    place.mkdir()
    for file in newest.iterdir():
        if file.is_file() and file.name != "manifest.json":
            shutil.copy(file, place)
    path = place / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": CHAT_TEMPLATE}))
    path = place / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **generation}))
    return place


@pytest.fixture(scope="session")
def chat_model(tiny_run, tmp_path_factory) -> Path:
    """The last checkpoint of the tiny run with a chat template."""
    return write_chat_model(tiny_run, tmp_path_factory.mktemp("models") / "tiny-chat")


@pytest.fixture(scope="session")
def server(chat_model) -> Iterator[Server]:
    """The server that most tests talk to: with a key, a page and a chat template."""
    with serving(chat_model, key="sesame-open-9") as running:
        yield running


@pytest.fixture(scope="session")
def tokenizer(chat_model):
    """Of the served model."""
    from smolforge.tokenizer import Tokenizer

    return Tokenizer.from_pretrained(chat_model)
