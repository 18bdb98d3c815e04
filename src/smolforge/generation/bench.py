"""Generation on this machine: tokens/s per precision and batch, compared with the bandwidth that limits decoding.

Each decoded token reads every weight once, so tokens/s times the bytes of the weights is the bandwidth reached. Every
step ends with its logits or tokens on the CPU, so no time is taken while a GPU still works.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Sequence as Many
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from smolforge.config import ModelConfig
from smolforge.devices import choose_device
from smolforge.generation.runners import DeviceSampler, Runner, select_runner
from smolforge.generation.sampling_params import SamplingParams
from smolforge.generation.scheduler import CHUNK
from smolforge.generation.sequence import Request, ScheduledChunk, Sequence
from smolforge.model.architecture import build_model

PRECISIONS = {"cpu": ("fp32", "bf16", "int8", "int4"), "cuda": ("bf16",)}
BATCHES = {"cpu": (1, 8), "cuda": (1, 64)}
PROMPT = 32

logger = logging.getLogger(__name__)


def measure(
    module: Any = None, *, precisions: Many[str] | None = None, batches: Many[int] | None = None, tokens: int = 64,
    prompt: int = 512, rounds: int = 3,
) -> dict[str, Any]:  # fmt: skip
    """Decode greedily with each precision, on a CUDA device where there is one.

    Args:
        module: a model of `smolforge.model`; SmolLM2-135M's shape with random weights unless given.
        precisions: those of `PRECISIONS` for the device unless given.
        batches: sequences decoded together; those of `BATCHES` unless given.
        tokens: decoded for each sequence.
        prompt: length of the prompt whose first token is timed.
        rounds: timed repetitions after one warm-up; medians are reported.
    """
    if module is None:
        logger.info("making a model of SmolLM2-135M's shape with random weights")
        module = build_model(ModelConfig(), seed=0)
    place = choose_device()
    device = place.type
    module.to(place)
    precisions, batches = precisions or PRECISIONS[device], batches or BATCHES[device]
    read = bandwidth(device)
    result: dict[str, Any] = {"read_bytes_per_second": read, "threads": torch.get_num_threads(), "precisions": {}}
    if device == "cuda":
        result["device"] = torch.cuda.get_device_name()
    for precision in precisions:
        held = resident_bytes()
        runner, decisions = select_runner(module, precision)
        grown = resident_bytes() - held
        for line in decisions if device == "cuda" else decisions[-1:]:
            logger.info(line)
        rates = {}
        for batch in batches:
            seconds = [_decode(runner, batch, tokens) for _ in range(rounds + 1)][1:]
            rates[str(batch)] = batch * tokens / statistics.median(seconds)
        first = statistics.median([_first(runner, prompt) for _ in range(rounds + 1)][1:])
        result["precisions"][precision] = {
            "runner": runner.name,
            "tokens_per_second": rates,
            "first_token_seconds": first,
            "weight_bytes": runner.weight_bytes,
            "process_grew_bytes": grown if device == "cpu" else None,
            "cache_bytes_per_token": runner.cache_bytes(1024) // 1024,
            "share_of_read_bandwidth": rates[str(batches[0])] / batches[0] * runner.weight_bytes / read,
        }
    return result


def bandwidth(device: str = "cpu") -> float:
    """Bytes per second read from memory: the best of five sums over 512 MiB, on a GPU over 2 GiB."""
    data = torch.ones(1 << (26 if device == "cpu" else 28), dtype=torch.int64, device=device)
    best = float("inf")
    for _ in range(5):
        wait(device)
        began = time.perf_counter()
        data.sum()
        wait(device)
        best = min(best, time.perf_counter() - began)
    return data.nbytes / best


def wait(device: str) -> None:
    """Until the device has done what it was told; a CPU always has."""
    if device != "cpu":
        torch.cuda.synchronize()


def resident_bytes() -> int:
    """Memory of its own that this process holds, mapped files not counted; 0 where the kernel does not say."""
    try:
        lines = Path("/proc/self/status").read_text("ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon")), 0)


def _first(runner: Runner, length: int) -> float:
    """Seconds from a prompt of so many tokens to the logits of its first new one."""
    cache, row = runner.new_cache(length + 1), [3 + i % 300 for i in range(length)]
    began = time.perf_counter()
    for at in range(0, length, CHUNK):
        runner.forward([ScheduledChunk(cache, row[at : at + CHUNK], at, int(at + CHUNK >= length))])
    return time.perf_counter() - began


def _decode(runner: Runner, batch: int, tokens: int) -> float:
    """Seconds of decoding so many tokens of each sequence, their prompts not counted."""
    caches = [runner.new_cache(PROMPT + tokens) for _ in range(batch)]
    prompts = [[3 + (i + row) % 300 for i in range(PROMPT)] for row in range(batch)]
    following = [
        int(runner.forward([ScheduledChunk(cache, row, 0, 1)]).argmax())
        for cache, row in zip(caches, prompts, strict=True)
    ]
    if isinstance(runner, DeviceSampler):
        return _decode_on_device(runner, prompts, following, caches, tokens)
    began = time.perf_counter()
    for at in range(PROMPT, PROMPT + tokens):
        chunks = [ScheduledChunk(cache, [token], at, 1) for cache, token in zip(caches, following, strict=True)]
        following = runner.forward(chunks).argmax(-1).tolist()
    return time.perf_counter() - began


def _decode_on_device(sampler: DeviceSampler, prompts: Any, following: Any, caches: Any, tokens: int) -> float:
    """As `_decode`, where the runner picks the tokens."""
    params, sequences = SamplingParams(temperature=0, max_tokens=tokens + 1), []
    no_text: Any = SimpleNamespace(special_ids=frozenset(), token_bytes=lambda token_id: b"")  # a tokenizer
    for prompt, token_id, cache in zip(prompts, following, caches, strict=True):
        sequence = Sequence(Request(0, prompt, params, 0), 0, no_text, PROMPT + tokens, frozenset())
        sequence.tokens.append(token_id)
        sequence.cache, sequence.computed = cache, PROMPT
        sequences.append(sequence)
    began = time.perf_counter()
    for _ in range(tokens):
        for sequence, token_id in zip(sequences, sampler.sample(sequences), strict=True):
            sequence.tokens.append(token_id)
            sequence.computed += 1
    return time.perf_counter() - began


def table(result: dict[str, Any]) -> str:
    """One line per precision."""
    found = result["precisions"]
    batches = list(next(iter(found.values()))["tokens_per_second"])
    head = "".join(f"{'tok/s' if b == '1' else f'{b} seqs':>9}" for b in batches)
    columns = f"{'first ms':>9} {'weights MB':>11} {'process MB':>11} {'cache/token':>12} {'of bandwidth':>13}"
    lines = [f"{'':<6}{head} {columns}  runner"]
    for name, row in found.items():
        grew = row["process_grew_bytes"]
        rates = "".join(f"{rate:9.1f}" for rate in row["tokens_per_second"].values())
        lines.append(
            f"{name:<6}{rates} {1000 * row['first_token_seconds']:9.0f} {row['weight_bytes'] / 1e6:11.0f} "
            f"{f'+{grew / 1e6:.0f}' if grew else '-':>11} "
            f"{row['cache_bytes_per_token']:12,} {row['share_of_read_bandwidth']:13.0%}  {row['runner']}"
        )
    reader = f"on {result['device']}" if "device" in result else f"with {result['threads']} threads"
    lines.append(f"reads {result['read_bytes_per_second'] / 1e9:.1f} GB/s {reader}")
    return "\n".join(lines)
