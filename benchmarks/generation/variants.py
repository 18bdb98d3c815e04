"""Decoding with each prebuilt library that this processor can run, compared with the one compiled for it.

    python -m smolforge.kernels.build --all
    python benchmarks/generation/variants.py [--threads 2] [--rounds 30] [--precisions fp32 bf16 int8 int4]

All libraries take turns in one process, a few tokens each, so that a slow moment of the machine meets all of them.
Times of one thread are processor times, which other programs disturb less. Printed are tokens/s and the median of the
ratios of neighbouring turns. The model has SmolLM2-135M's shape.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable

import torch

from smolforge.config import ModelConfig
from smolforge.generation.runners import cpu
from smolforge.generation.sequence import ScheduledChunk
from smolforge.kernels import build, variants
from smolforge.model.architecture import build_model

SHAPE = ModelConfig(
    hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
    vocab_size=49152, max_position_embeddings=2048,
)  # fmt: skip
JOBS = {"decode": 8, "batch of 8": 16, "prompt": 64}  # tokens of one turn


def jobs(runner: cpu.CpuRunner) -> dict[str, Callable[[], object]]:
    """What a library does in its turn."""
    ids = torch.randint(0, SHAPE.vocab_size, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    caches = [runner.new_cache(64) for _ in range(8)]
    runner.forward([ScheduledChunk(cache, ids[:32], 0, 1) for cache in caches])

    def decode(batch: list[object], steps: int) -> None:
        for at in range(32, 32 + steps):
            runner.forward([ScheduledChunk(cache, [ids[at]], at, 1) for cache in batch])  # type: ignore[arg-type]

    return {
        "decode": lambda: decode(caches[:1], 8),
        "batch of 8": lambda: decode(caches, 2),
        "prompt": lambda: runner.forward([ScheduledChunk(caches[0], ids, 0, 1)]),
    }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16", "int8", "int4"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    fits = [v for v in variants.prebuilt(variants.this_platform()) if v.flags <= variants.cpu_flags()]
    libraries = {"compiled here": build.build(), **{v.level: v.path for v in fits}}
    model = build_model(SHAPE).eval()
    for precision in args.precisions:
        work = {}
        for name, path in libraries.items():
            library = ctypes.CDLL(str(path))
            cpu.library = lambda library=library: library  # type: ignore[assignment]
            work[name] = jobs(cpu.CpuRunner(model, precision, threads=args.threads))
        for job, tokens in JOBS.items():
            times: dict[str, list[float]] = {name: [] for name in libraries}
            for _ in range(args.rounds + 1):
                for name in libraries:
                    start = clock()
                    work[name][job]()
                    times[name].append(clock() - start)
            ours = times["compiled here"][1:]  # the first turn warms up
            for name, taken in times.items():
                ratio = statistics.median(a / b for a, b in zip(ours, taken[1:], strict=True))
                speed = tokens / statistics.median(taken[1:])
                print(f"{precision:5} {job:10} {name:14} {speed:7.0f} tokens/s  {ratio:.2f}", flush=True)


if __name__ == "__main__":
    main()
