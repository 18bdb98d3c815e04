"""Generation side by side: smolforge, llama.cpp, transformers and the seed's loop, on the same weights.

    python benchmarks/generation/compare.py [--model MODEL] [--llama-python PYTHON] [--ik-bench PROGRAM]
                                            [--rounds 7] [--threads 2] [--only NAME ...]

Contestants live in processes of their own and take turns, job by job, so that a machine that is slow for a while
is slow for all. Reported are medians, and medians of the ratios of neighbouring turns. llama.cpp runs where
PYTHON can import `llama_cpp` (a virtual environment with `pip install llama-cpp-python`). Without MODEL the weights
are random and of SmolLM2-135M's shape. PROGRAM is `llama-bench` of ik_llama.cpp, whose authors call it the fastest
on a CPU; it reads the same GGUF files, and runs each job in a process of its own.
Where MODEL is a GGUF file, native-file, llama.cpp-file and ik-file run that very file.
Read bandwidth is measured in the same run by summing an array beyond the caches, and
the bare loop (bare.cpp: the same matrices times one row, nothing else) takes its turn with the others where the
processor has AVX-512 with VNNI and bf16.

Needs about 4 GB of memory and 2 GB of disk under --workspace. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
# ours: (theirs, wanted ratio of decoding)
PAIRS = {
    "native-fp32": ("llama.cpp-f32", 0.95), "native-bf16": ("llama.cpp-bf16", 1.3),
    "native-int8": ("llama.cpp-q8_0", 2.0), "native-int4": ("llama.cpp-q4_0", 1.7),
    "native-file": ("llama.cpp-file", 1.7),
}  # fmt: skip
IK_PAIRS = {
    "native-fp32": ("ik-f32", 1.0), "native-bf16": ("ik-bf16", 1.5), "native-int8": ("ik-q8_0", 1.5),
    "native-int4": ("ik-q4_0", 1.5), "native-file": ("ik-file", 1.5),
}  # fmt: skip
OTHERS = ["engine-int8", "transformers-fp32", "transformers-bf16", "transformers-compiled-bf16", "seed-fp32"]
BARE = {"native-fp32": (32, None), "native-bf16": (16, 0.8), "native-int8": (8, 0.8), "native-int4": (4, 0.7)}
JOBS = {"decode": "decode 32 64", "batch8": "batch 8 32 32", "first512": "first 512"}
TOKENS = {"decode": 64, "batch8": 256, "first512": 1}


class Bare:
    """The bare loop, built for this machine; runs afresh in each turn."""

    def __init__(self, workspace: Path, threads: int) -> None:
        self._program, self._threads = workspace / "bare", threads
        compiler = shutil.which("g++") or shutil.which("clang++") or "c++"
        command = [compiler, "-O3", "-march=native", "-pthread", str(HERE / "bare.cpp"), "-o", str(self._program)]
        self.available = subprocess.run(command, capture_output=True, check=False).returncode == 0

    def run(self, bits: int) -> float:
        """Seconds for the products of one token."""
        command = [str(self._program), str(bits), str(self._threads), "40"]
        return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["seconds"]


class Peer:
    """A contestant's process."""

    def __init__(self, name: str, python: str, workspace: Path, threads: int) -> None:
        self.name = name
        command = [python, str(HERE / "peer.py"), name, str(workspace), str(threads)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={**{k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}, "OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip
        line = self._process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise RuntimeError(f"{name} did not start: run {' '.join(command)}")
        self.facts = json.loads(line)

    def run(self, job: str) -> float:
        """Seconds of one job."""
        self._process.stdin.write(job + "\n")  # type: ignore[union-attr]
        self._process.stdin.flush()  # type: ignore[union-attr]
        line = self._process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise RuntimeError(f"{self.name} died of {job!r}; run peer.py by hand to see why")
        return json.loads(line)["seconds"]

    def resident(self) -> int:
        """Bytes of memory of the process now."""
        pages = Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait(60)


class IkBench:
    """llama-bench of ik_llama.cpp on one GGUF file: a process for each job, which warms up and measures once."""

    def __init__(self, program: str, model: Path, threads: int) -> None:
        self._command = [program, "-m", str(model), "-t", str(threads), "-o", "json", "-fa", "1"]
        self.facts = {"load_seconds": 0.0, "weight_bytes": model.stat().st_size}
        jobs = {JOBS["decode"]: ["-p", "0", "-n", "64"], JOBS["first512"]: ["-p", "512", "-n", "0"]}
        # Repacking the weights as they are loaded helps some types and harms others: each job gets what is faster.
        self._jobs = {
            job: min(([*words, "-rtr", packed] for packed in "01"), key=lambda words: self._bench(words, rounds=5))
            for job, words in jobs.items()
        }

    def _bench(self, words: list[str], rounds: int = 1) -> float:
        command = [*self._command, *words, "-r", str(rounds)]
        answer = subprocess.run(command, capture_output=True, check=True, text=True).stdout
        return json.loads(answer[answer.index("[") :])[0]["avg_ns"] / 1e9

    def run(self, job: str) -> float | None:
        """Seconds of one job; None for what it cannot do: several sequences."""
        return self._bench(self._jobs[job]) if job in self._jobs else None

    def resident(self) -> None:
        """Not known: each job has a process of its own."""

    def close(self) -> None:
        """Nothing is left open."""


def make_model(workspace: Path, llama_python: str | None, model: str | None = None) -> None:
    """A model, or one of random weights, as a Hugging Face directory and, for llama.cpp, as GGUF files."""
    from smolforge.checkpoint.format import write_model
    from smolforge.checkpoint.locate import load_model, resolve_model
    from smolforge.config import ModelConfig
    from smolforge.export.gguf import export_gguf
    from smolforge.gguf_file import is_gguf
    from smolforge.model.architecture import build_model
    from smolforge.tokenizer import Tokenizer

    if not (workspace / "hf").is_dir():
        if model:
            module, tokenizer, _ = load_model(model)
        else:
            module, tokenizer = build_model(ModelConfig(), seed=0), Tokenizer.train(["once upon a time"], 300)
        (workspace / "hf").mkdir(parents=True)
        write_model(workspace / "hf", module.config, module.state_dict(), tokenizer)
    if model and is_gguf(resolve_model(model)) and not (workspace / "file.gguf").exists():
        (workspace / "file.gguf").symlink_to(resolve_model(model).resolve())
    for kind in ("f32", "bf16", "q8_0", "q4_0"):
        if llama_python and not (workspace / f"{kind}.gguf").is_file():
            export_gguf(workspace / "hf", workspace / f"{kind}.gguf", kind=kind)


def bandwidth(threads: int) -> float:
    """Bytes per second that `threads` threads read from memory: the best of ten sums over 1 GiB on large pages."""
    os.environ["THP_MEM_ALLOC_ENABLE"] = "1"
    import torch

    torch.set_num_threads(threads)
    data = torch.ones(1 << 27, dtype=torch.int64)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        data.sum()
        seconds.append(time.perf_counter() - start)
    return data.nbytes / min(seconds)


def main() -> None:
    """Measure, print a table, and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--llama-python", default=None)
    parser.add_argument("--ik-bench", default=None, help="llama-bench of ik_llama.cpp")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--workspace", type=Path, default=Path(tempfile.gettempdir()) / "smolforge-compare")
    parser.add_argument("--only", nargs="*", default=None, help="contestants to run, by name")
    args = parser.parse_args()
    llama = args.llama_python and shutil.which(args.llama_python)
    make_model(args.workspace, llama, args.model)
    pairs = [*PAIRS.items(), *IK_PAIRS.items(), *(("native-int8", (other, 10.0)) for other in OTHERS[1:3])]
    names = list(dict.fromkeys([name for ours, (theirs, _) in pairs for name in (ours, theirs)] + OTHERS))
    names = [n for n in names if (args.only is None or n in args.only) and (llama or not n.startswith("llama"))]
    names = [n for n in names if args.ik_bench or not n.startswith("ik-")]
    names = [n for n in names if not n.endswith("-file") or (args.workspace / "file.gguf").exists()]
    read = bandwidth(args.threads)
    peers: dict[str, Peer | IkBench] = {}
    for name in names:
        if name.startswith("ik-"):
            model = args.workspace / f"{name.removeprefix('ik-')}.gguf"
            peers[name] = IkBench(args.ik_bench, model, args.threads)
            continue
        python = llama if name.startswith("llama") else sys.executable
        peers[name] = Peer(name, str(python), args.workspace, args.threads)
    times: dict[str, dict[str, list[float]]] = {name: {job: [] for job in JOBS} for name in names}
    bare = Bare(args.workspace, args.threads)
    bare_times: dict[str, list[float]] = {name: [] for name in BARE if name in names and bare.available}
    for turn in range(args.rounds + 1):  # the first turn warms up
        for name, seconds in bare_times.items():
            measured = bare.run(BARE[name][0])
            if turn:
                seconds.append(measured)
        for job, line in JOBS.items():
            for name in names:
                if name.startswith("seed") and (turn > 1 or job == "batch8"):
                    continue
                count = "8" if name.startswith("seed") else None
                seconds = peers[name].run(line if count is None else line.replace(" 64", f" {count}"))
                if turn and seconds is not None:
                    seconds *= 8 if count and job == "decode" else 1
                    times[name][job].append(seconds)
    result = {"threads": args.threads, "rounds": args.rounds, "read_bytes_per_second": round(read), "peers": {}}
    print(f"{'':20} {'tokens/s':>9} {'8 seqs':>8} {'first ms':>9} {'load s':>7} {'weights MB':>11} {'% of read':>10}")
    for name in names:
        middle = {job: statistics.median(t) if t else None for job, t in times[name].items()}
        rate = {job: TOKENS[job] / s if s else None for job, s in middle.items()}
        facts = peers[name].facts
        share = facts["weight_bytes"] * (rate["decode"] or 0) / read
        result["peers"][name] = {
            "tokens_per_second": rate["decode"], "tokens_per_second_of_8": rate["batch8"],
            "first_token_seconds": middle["first512"], "share_of_read_bandwidth": share,
            "resident_bytes": peers[name].resident(), **facts,
        }  # fmt: skip
        batch = f"{rate['batch8']:8.1f}" if rate["batch8"] else f"{'-':>8}"
        print(
            f"{name:20} {rate['decode'] or 0:9.1f} {batch} {1000 * (middle['first512'] or 0):9.0f} "
            f"{facts['load_seconds']:7.2f} {facts['weight_bytes'] / 1e6:11.0f} {100 * share:10.0f}"
        )
    result["ratios"] = {}
    for ours, (theirs, wanted) in pairs:
        if ours in times and theirs in times:
            ratios = {
                job: statistics.median([b / a for a, b in zip(times[ours][job], times[theirs][job], strict=True)])
                for job in JOBS
                if times[theirs][job]
            }
            result["ratios"][f"{ours} / {theirs}"] = {**ratios, "wanted_decode": wanted}
            several = f" 8 sequences {ratios['batch8']:.2f} (1.2)," if "batch8" in ratios else ""
            print(
                f"{ours} / {theirs}: decode {ratios['decode']:.2f} (wanted {wanted}),{several} "
                f"first token in {1 / ratios['first512']:.2f} of the time (0.7)"
            )
    for name, loop in bare_times.items():
        own = [seconds / TOKENS["decode"] for seconds in times[name]["decode"]]
        share = statistics.median([b / a for a, b in zip(own, loop, strict=True)])
        result["ratios"][f"{name} / bare loop"] = {"decode": share, "wanted_decode": BARE[name][1]}
        wanted = f" (wanted {BARE[name][1]:.0%})" if BARE[name][1] else ""
        print(f"{name}: {share:.0%} of the bare loop's {1 / statistics.median(loop):.1f} tokens/s{wanted}")
    for peer in peers.values():
        peer.close()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
