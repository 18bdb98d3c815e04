"""One contestant of the comparison: loads a model, then answers jobs on stdin with seconds on stdout.

    python peer.py NAME WORKSPACE THREADS

A job is one line, `decode PROMPT NEW`, `batch SEQUENCES PROMPT NEW` or `first PROMPT`; the answer is one JSON line.
`decode` and `batch` time only what comes after the prompt; `first` times a prompt and its first token. Every
contestant lives in a process of its own, so that no one's idle threads disturb another's turn.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not sys.argv[1:] or not sys.argv[1].startswith("llama"):
    # smolforge's own settings, which torch's peers profit from too; llama.cpp's barriers want the default.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("GOMP_SPINCOUNT", "50000")  # between kernels and steps threads are best awake for a while
VOCAB = 49152


def prompt_of(length: int, row: int = 0) -> list[int]:
    """The same tokens for every contestant."""
    return [(17 + 7919 * (i + 1000 * row)) % VOCAB for i in range(length)]


def forget(engine: Any) -> None:
    """Drop the positions that an engine keeps of finished texts, so that every prompt is read."""
    engine.scheduler.pool.old.clear()
    engine.scheduler.pool.kept = 0


class Contestant:
    """prefill(rows) reads prompts; decode(count) writes `count` tokens for each of them, greedily."""

    prefill: Callable[[list[list[int]]], None]
    decode: Callable[[int], None]
    load_seconds = 0.0
    weight_bytes = 0


def smolforge(variant: str, workspace: Path, threads: int) -> Contestant:
    """variant: native-PRECISION, directly on the runner."""
    import torch

    from smolforge.checkpoint.locate import load_model
    from smolforge.generation.runners.cpu import CpuRunner
    from smolforge.generation.scheduler import CHUNK
    from smolforge.generation.sequence import ScheduledChunk

    torch.set_num_threads(threads)
    precision = variant.split("-")[1]
    start = time.perf_counter()
    module, _, _ = load_model(workspace / ("file.gguf" if precision == "file" else "hf"))
    runner = CpuRunner(module, precision)  # type: ignore[arg-type]
    me = Contestant()
    me.load_seconds, me.weight_bytes = time.perf_counter() - start, runner.weight_bytes
    state: dict = {}

    def prefill(rows: list[list[int]]) -> None:
        length = len(rows[0])
        state.update(caches=[runner.new_cache(length + 256) for _ in rows], at=length)
        for at in range(0, length, CHUNK):
            chunks = [
                ScheduledChunk(cache, row[at : at + CHUNK], at, int(at + CHUNK >= length))
                for cache, row in zip(state["caches"], rows, strict=True)
            ]
            logits = runner.forward(chunks)
        state["next"] = logits.argmax(-1).tolist()

    def decode(count: int) -> None:
        for _ in range(count):
            at, tokens = state["at"], zip(state["caches"], state["next"], strict=True)
            chunks = [ScheduledChunk(cache, [token], at, 1) for cache, token in tokens]
            state["next"] = runner.forward(chunks).argmax(-1).tolist()
            state["at"] += 1

    me.prefill, me.decode = prefill, decode
    return me


def engine(variant: str, workspace: Path, threads: int) -> Contestant:
    """The whole engine with the seed's own sampling (temperature 0.8, top-p 0.9): what a user gets."""
    import torch

    from smolforge.generation import Engine, SamplingParams

    torch.set_num_threads(threads)
    start = time.perf_counter()
    whole = Engine.from_pretrained(workspace / "hf", quantize=variant.split("-")[1])
    me = Contestant()
    me.load_seconds, me.weight_bytes = time.perf_counter() - start, whole.runner.weight_bytes
    requests: list = []

    def prefill(rows: list[list[int]]) -> None:
        for request in requests:
            whole.cancel(request)
        forget(whole)
        sampling = SamplingParams(max_tokens=256, seed=0, ignore_eos=True)
        requests[:] = [whole.add(row, sampling) for row in rows]
        while any(request.sequences[0].written == 0 for request in requests):
            whole.step()

    def decode(count: int) -> None:
        for _ in range(count):
            whole.step()

    me.prefill, me.decode = prefill, decode
    return me


def llama_cpp(variant: str, workspace: Path, threads: int) -> Contestant:
    """llama.cpp through llama-cpp-python's low-level interface; variant names a GGUF file."""
    import ctypes

    import llama_cpp as L
    import numpy as np

    @L.llama_log_callback
    def silent(*_: object) -> None:
        pass

    L.llama_log_set(silent, ctypes.c_void_p(0))
    L.llama_backend_init()
    path = workspace / f"{variant.removeprefix('llama.cpp-')}.gguf"
    start = time.perf_counter()
    params = L.llama_model_default_params()
    params.n_gpu_layers = 0
    model = L.llama_model_load_from_file(str(path).encode(), params)
    me = Contestant()
    me.load_seconds, me.weight_bytes = time.perf_counter() - start, path.stat().st_size
    me.log = silent  # type: ignore[attr-defined]  # the library keeps only a pointer to it
    contexts: dict = {}
    batch = L.llama_batch_init(512, 0, 1)
    state: dict = {}

    def context(sequences: int):
        if sequences not in contexts:
            p = L.llama_context_default_params()
            p.n_ctx, p.n_batch, p.n_ubatch, p.n_seq_max = 1024 * sequences, 512, 512, sequences
            p.n_threads = p.n_threads_batch = threads
            contexts[sequences] = L.llama_init_from_model(model, p)
        return contexts[sequences]

    def run(ctx, tokens, positions, sequences, wanted) -> None:
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, positions[i], 1
            batch.seq_id[i][0], batch.logits[i] = sequences[i], int(i in wanted)
        assert L.llama_decode(ctx, batch) == 0

    def best(ctx, row: int) -> int:
        return int(np.ctypeslib.as_array(L.llama_get_logits_ith(ctx, row), (VOCAB,)).argmax())

    def prefill(rows: list[list[int]]) -> None:
        ctx = context(len(rows))
        L.llama_memory_clear(L.llama_get_memory(ctx), True)
        nexts = []
        for s, row in enumerate(rows):
            run(ctx, row, range(len(row)), [s] * len(row), {len(row) - 1})
            nexts.append(best(ctx, -1))
        state.update(ctx=ctx, next=nexts, at=len(rows[0]))

    def decode(count: int) -> None:
        ctx, n = state["ctx"], len(state["next"])
        for _ in range(count):
            run(ctx, state["next"], [state["at"]] * n, range(n), set(range(n)))
            state["next"] = [best(ctx, i) for i in range(n)]
            state["at"] += 1

    me.prefill, me.decode = prefill, decode
    return me


def transformers(variant: str, workspace: Path, threads: int) -> Contestant:
    """transformers' model; variant ends in the dtype. With its default (dynamic) cache, or -compiled: a static cache,
    and one step of one token compiled (prompts are read by the model as it is)."""
    import torch
    from transformers import AutoModelForCausalLM, StaticCache

    torch.set_num_threads(threads)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[variant.split("-")[-1]]
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(workspace / "hf", dtype=dtype).eval()
    me = Contestant()
    me.load_seconds = time.perf_counter() - start
    me.weight_bytes = sum(p.nbytes for p in model.parameters())
    state: dict = {}

    compiled = "compiled" in variant
    one_token = torch.compile(model.forward, dynamic=False) if compiled else model.forward

    def forward(run, ids, past):
        with torch.no_grad():
            out = run(torch.tensor(ids), past_key_values=past, use_cache=True, logits_to_keep=1)
        state.update(past=out.past_key_values, next=out.logits[:, -1].argmax(-1, keepdim=True).tolist())

    def decode(count: int) -> None:
        for _ in range(count):
            forward(one_token, state["next"], state["past"])

    def prefill(rows: list[list[int]]) -> None:
        room = len(rows[0]) + 64  # a static cache is read whole in every step: no longer than the jobs need
        forward(model.forward, rows, StaticCache(config=model.config, max_cache_len=room) if compiled else None)

    me.prefill, me.decode = prefill, decode
    return me


def seed_loop(variant: str, workspace: Path, threads: int) -> Contestant:
    """The seed's loop: the whole text goes through the fp32 model again for every token."""
    import torch

    from smolforge.checkpoint.locate import load_model

    torch.set_num_threads(threads)
    start = time.perf_counter()
    module = load_model(workspace / "hf", dtype=torch.float32)[0]
    me = Contestant()
    me.load_seconds = time.perf_counter() - start
    me.weight_bytes = sum(p.nbytes for p in module.parameters())
    state: dict = {}

    @torch.inference_mode()
    def decode(count: int) -> None:
        for _ in range(count):
            nexts = module(torch.tensor(state["rows"]))[:, -1].argmax(-1).tolist()
            state["rows"] = [[*row, token] for row, token in zip(state["rows"], nexts, strict=True)]

    def prefill(rows: list[list[int]]) -> None:
        state["rows"] = rows
        decode(1)

    me.prefill, me.decode = prefill, decode
    return me


MAKERS = {
    "native": smolforge, "engine": engine, "llama.cpp": llama_cpp,
    "transformers": transformers, "seed": seed_loop,
}  # fmt: skip


def main() -> None:
    """Answer jobs until stdin ends."""
    name, workspace, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    me = MAKERS[name.split("-")[0]](name, workspace, threads)
    print(json.dumps({"load_seconds": me.load_seconds, "weight_bytes": me.weight_bytes}), file=answers, flush=True)
    for line in sys.stdin:
        job, *numbers = line.split()
        sizes = [int(number) for number in numbers]
        start = time.perf_counter()
        if job == "first":
            me.prefill([prompt_of(sizes[0])])
        else:
            sequences, length, count = sizes if job == "batch" else (1, *sizes)
            me.prefill([prompt_of(length, row) for row in range(sequences)])
            start = time.perf_counter()
            me.decode(count)
        print(json.dumps({"seconds": time.perf_counter() - start}), file=answers, flush=True)


if __name__ == "__main__":
    main()
