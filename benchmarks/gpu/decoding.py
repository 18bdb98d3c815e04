"""Generation on one GPU: smolforge beside transformers, on the same random weights of SmolLM2-135M's shape.

    python benchmarks/gpu/decoding.py [--rounds 5] [--batches 1 64] [--only NAME ...]

A job is a prompt of 32 tokens and 128 new ones for every sequence, greedily, prompts included. The contestants take
turns, job by job; reported are medians. smolforge runs its engine, whose `CudaRunner` replays one CUDA graph for each
step and picks the tokens on the device. transformers runs `generate` in bf16, with its dynamic cache, and with its
static cache compiled in `reduce-overhead` mode (CUDA graphs) where that works. Read bandwidth is measured in the
same run; the share of it is that of the weights alone, each read once for a step.

Needs a CUDA device, transformers, and 1 GB of disk under --workspace. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPT, NEW = 32, 128
NAMES = ("smolforge-bf16", "transformers-bf16", "transformers-bf16-static-compiled")


class Contestant:
    """run(rows) writes NEW tokens behind each row; logits(row) are those of a prompt's next token, on the CPU."""

    def __init__(self, weight_bytes: int, run: Callable, logits: Callable, about: str) -> None:
        self.weight_bytes, self.run, self.logits, self.about = weight_bytes, run, logits, about


def prompts(batch: int, vocab: int) -> list[list[int]]:
    """The same tokens for every contestant."""
    return [[(17 + 7919 * (i + 1000 * row)) % vocab for i in range(PROMPT)] for row in range(batch)]


def smolforge(directory: Path, precision: str, device: str) -> Contestant:
    """The engine, which samples on the device; greedy, as the others."""
    import torch

    from smolforge.checkpoint.locate import load_model
    from smolforge.generation import Engine, SamplingParams

    module, tokenizer, _ = load_model(directory, device=device)
    engine = Engine.from_model(module, tokenizer, quantize=precision, max_batch=64)
    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)

    def run(rows: list[list[int]]) -> None:
        for _ in engine.stream(rows, params):
            pass

    @torch.inference_mode()
    def logits(row: list[int]) -> Any:
        return engine.runner.module(torch.tensor([row], device=device))[0, -1].float().cpu()  # type: ignore[attr-defined]

    weights = sum(p.nbytes for p in engine.runner.module.parameters())  # type: ignore[attr-defined]
    return Contestant(weights, run, logits, engine.runner.name)


def transformers(directory: Path, static: bool, device: str) -> Contestant:
    """`generate`, as its documentation has it."""
    import torch
    from transformers import AutoModelForCausalLM, CompileConfig

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).to(device).eval()
    options: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    if static:
        options |= {"cache_implementation": "static", "compile_config": CompileConfig(mode="reduce-overhead")}

    def run(rows: list[list[int]]) -> None:
        ids = torch.tensor(rows, device=device)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        if out.shape[1] != PROMPT + NEW:
            raise RuntimeError(f"generate wrote {out.shape[1] - PROMPT} tokens instead of {NEW}")
        out.cpu()

    @torch.inference_mode()
    def logits(row: list[int]) -> Any:
        return model(torch.tensor([row], device=device)).logits[0, -1].float().cpu()

    about = "static cache, compiled, reduce-overhead" if static else "dynamic cache, eager"
    return Contestant(sum(p.nbytes for p in model.parameters()), run, logits, about)


def make(name: str, directory: Path, device: str) -> Contestant:
    """A contestant by its name."""
    if name.startswith("smolforge"):
        return smolforge(directory, name.rpartition("-")[2], device)
    return transformers(directory, name.endswith("compiled"), device)


def measure(directory: Path, names: list[str], batches: list[int], rounds: int, device: str, vocab: int) -> dict:
    """Seconds of every contestant's jobs by batch; who fails is left out, and why is told."""
    from smolforge.errors import in_one_line
    from smolforge.generation.bench import wait

    peers: dict[str, Contestant] = {}
    failed: dict[str, str] = {}
    times: dict[str, dict[int, list[float]]] = {name: {batch: [] for batch in batches} for name in names}

    def attempt(name: str, job: Callable) -> Any:
        try:
            return job()
        except Exception as problem:
            if name.startswith("smolforge"):
                raise
            failed[name] = in_one_line(problem)
            print(f"{name} does not work here: {failed[name]}", file=sys.stderr)
            return None

    for name in names:
        peer = attempt(name, lambda name=name: make(name, directory, device))
        if peer:
            peers[name] = peer
    for turn in range(rounds + 2):  # two turns warm up: one compiles and records, one finds all of it there
        for batch in batches:
            rows = prompts(batch, vocab)
            for name, peer in peers.items():
                if name in failed:
                    continue
                wait(device)
                began = time.perf_counter()
                attempt(name, lambda peer=peer, rows=rows: peer.run(rows))
                wait(device)
                if turn >= 2:
                    times[name][batch].append(time.perf_counter() - began)
    reference = peers["transformers-bf16"].logits(prompts(1, vocab)[0]) if "transformers-bf16" in peers else None
    found: dict[str, Any] = {}
    for name, peer in peers.items():
        if name not in failed:
            mine = peer.logits(prompts(1, vocab)[0]) if reference is not None else None
            far = float((mine - reference).norm() / reference.norm()) if mine is not None else None
            seconds = {batch: statistics.median(times[name][batch]) for batch in batches}
            found[name] = {
                "seconds": seconds, "tokens_per_second": {b: b * NEW / s for b, s in seconds.items()},
                "weight_bytes": peer.weight_bytes, "logits_distance": far, "about": peer.about,
            }  # fmt: skip
    return {"peers": found, "failed": failed}


def main() -> None:
    """Measure, print a table, and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--only", nargs="+", default=list(NAMES), choices=NAMES, help="contestants to run, by name")
    parser.add_argument("--workspace", type=Path, default=Path(tempfile.gettempdir()) / "smolforge-compare")
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        sys.exit("decoding.py: there is no CUDA device, or torch was installed without CUDA; compare.py is for CPUs")
    sys.path.insert(0, str(Path(__file__).parents[1] / "generation"))
    from compare import make_model

    from smolforge.config import ModelConfig
    from smolforge.generation.bench import bandwidth

    make_model(args.workspace, None)
    read, gpu = bandwidth("cuda"), torch.cuda.get_device_name()
    vocab = ModelConfig().vocab_size
    result = measure(args.workspace / "hf", args.only, args.batches, args.rounds, "cuda", vocab)
    result = {
        "gpu": gpu, "torch": torch.__version__, "read_bytes_per_second": round(read), "rounds": args.rounds,
        "prompt": PROMPT, "new": NEW, **result,
    }  # fmt: skip
    print(f"{gpu} reads {read / 1e9:.0f} GB/s; tokens/s, medians of {args.rounds}; share of the reading by weights")
    heads = "".join(f"{f'{b} seq.':>11}{'share':>7}" for b in args.batches)
    print(f"{'':34}{heads}{'from transformers':>19}  what runs")
    for name, row in result["peers"].items():
        row["share_of_read_bandwidth"] = {
            batch: row["weight_bytes"] * NEW / seconds / read for batch, seconds in row["seconds"].items()
        }
        cells = "".join(
            f"{row['tokens_per_second'][b]:11,.0f}{row['share_of_read_bandwidth'][b]:7.1%}" for b in args.batches
        )
        far = "-" if row["logits_distance"] is None else f"{row['logits_distance']:.2%}"
        print(f"{name:34}{cells}{far:>19}  {row['about']}")
    for name, why in result["failed"].items():
        print(f"{name:34} did not work: {why}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
