"""Tuning side by side: smolforge and TRL on the same questions and answers, every weight and an adapter.

    python benchmarks/finetuning/compare.py MODEL FAQ [--epochs 1] [--trl-python PYTHON] [--only smolforge trl]

FAQ is an Alpaca file (instruction, output), such as `faq-en-alpaca.jsonl` of the package zaragoza-construction-faq
(`pip download --no-deps zaragoza-construction-faq`); MODEL anything that smolforge reads. PYTHON is where `trl` and
`peft` can be imported. Each contestant has a process of its own. Reported are learned tokens per second between the
first and the last step, and the peak memory of the process. smolforge packs conversations into windows of 512 tokens,
TRL pads eight conversations to the longest: its packing needs flash attention to keep them apart, which a CPU does not
have. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
KINDS = ("full", "lora")


def run(command: list[str]) -> tuple[str, int]:
    """The output of a program, and the peak of its memory in bytes.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(command, stdout=said, stderr=said, text=True) as process,
    ):
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        text = said.read()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{text[-2000:]}")
    return text, usage.ru_maxrss * 1024


def smolforge(kind: str, args: argparse.Namespace, place: Path) -> dict[str, Any]:
    """smolforge's figures, without validations and with one checkpoint at the end."""
    out = place / f"smolforge-{kind}"
    never = [f"--set={key}.every=1000000" for key in ("checkpoint", "evaluation", "samples")]
    command = [
        sys.executable, "-m", "smolforge", "finetune", args.model, "--data", str(args.faq), "--out", str(out),
        "--epochs", str(args.epochs), "--set=data.holdout=0", "--set=logging={every: 1, trackers: []}", *never,
        *(["--lora", "16"] if kind == "lora" else []),
    ]  # fmt: skip
    text, memory = run(command)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    tokens = next(line for line in text.splitlines() if line.startswith("data: "))
    learned = int(tokens.split(" are learned")[0].split()[-1].replace(",", "")) * args.epochs
    seconds = (steps[-1]["time"] - steps[0]["time"]) * len(steps) / (len(steps) - 1)
    shutil.rmtree(out)
    return {"steps": len(steps), "tokens_per_second": learned / seconds, "seconds": seconds, "memory": memory}


def trl(kind: str, args: argparse.Namespace, place: Path) -> dict[str, Any]:
    """TRL's figures, from a directory of the same model."""
    model = place / "model"
    if not model.exists():
        run([sys.executable, "-m", "smolforge", "export", args.model, "--to", "checkpoint", "--out", str(model)])
    text, memory = run([args.trl_python, str(HERE / "peer.py"), kind, str(model), str(args.faq), str(args.epochs)])
    return {**json.loads(text.splitlines()[-1]), "memory": memory}


def main() -> None:
    """Measure, print a table, and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("faq", type=Path)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--trl-python", default=sys.executable)
    parser.add_argument("--only", nargs="*", default=["smolforge", "trl"])
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=KINDS)
    args = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as place:
        for name, measure in (("smolforge", smolforge), ("trl", trl)):
            for kind in args.kinds if name in args.only else ():
                found[f"{name} {kind}"] = figures = measure(kind, args, Path(place))
                print(
                    f"{name:<10} {kind:<5} {figures['tokens_per_second']:8.1f} learned tokens/s  "
                    f"{figures['steps']:4} steps in {figures['seconds']:6.1f} s  {figures['memory'] / 1e9:5.2f} GB",
                    flush=True,
                )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
