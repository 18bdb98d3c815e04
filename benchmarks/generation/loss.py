"""What fewer bits cost, beside llama.cpp: bits per byte of a text, in each precision and of GGUF files.

    python benchmarks/generation/loss.py MODEL TEXT [--tokens 20000] [--llama-python PYTHON] [--kinds q8_0 q4_0 q4_1]
        [--own-kinds q4_0]

The text is one document, cut into windows of 2,048 tokens, the same for all. MODEL is scored in each of smolforge's
precisions, and then its GGUF export of each kind by smolforge as the file is (none), with int4's inputs (int4), and by
llama.cpp. `--own-kinds` are files that llama.cpp itself rounds, with a head of Q8_0 as in our exports. The last line is
one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
LENGTH = 2048


def llama_nats(python: str, file: Path, windows: Path, threads: int, own: str = "") -> float:
    """Nats of all targets by llama.cpp, of the file or of what llama.cpp rounds to `own` from it."""
    command = [python, str(HERE / "llama_loss.py"), str(file), str(windows), str(threads), *([own] if own else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])["nats"]


def main() -> None:
    """Score, print a table, and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--llama-python", default=None)
    parser.add_argument("--kinds", nargs="*", default=["q8_0", "q4_0", "q4_1"])
    parser.add_argument("--own-kinds", nargs="*", default=[])
    parser.add_argument("--precisions", nargs="*", default=["fp32", "bf16", "int8", "int4"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    import torch

    from smolforge.checkpoint.locate import load_model
    from smolforge.evaluation import evaluate_runner, tokenize_eval_set
    from smolforge.export.gguf import export_gguf
    from smolforge.generation.runners import select_runner
    from smolforge.model.loss import IGNORE

    torch.set_num_threads(args.threads)
    module, tokenizer, directory = load_model(args.model)
    piece = tokenize_eval_set([args.text.read_text(encoding="utf-8")], tokenizer, args.tokens)
    found: dict[str, float] = {}

    def tell(name: str, bits_per_byte: float) -> None:
        found[name] = bits_per_byte
        price = bits_per_byte / found[next(iter(found))] - 1
        print(f"{name:24} {bits_per_byte:.4f} {price:+.2%}", flush=True)

    def score(name: str, model: object, precision: str) -> None:
        tell(name, evaluate_runner(select_runner(model, precision)[0], piece, length=LENGTH).bits_per_byte)

    def score_llama(name: str, path: Path, own: str = "") -> None:
        tell(name, llama_nats(args.llama_python, path, windows, args.threads, own) / math.log(2) / piece.n_bytes)

    for precision in args.precisions:
        score(precision, module, precision)
    with tempfile.TemporaryDirectory() as place:
        windows = Path(place) / "windows.npz"
        tokens, targets, parts = piece.windows(LENGTH)
        counts = targets != IGNORE
        lengths = np.unique(parts[counts], return_counts=True)[1]
        np.savez(windows, tokens=tokens[counts], targets=targets[counts], lengths=lengths)
        for kind in args.kinds:
            path = export_gguf(directory, Path(place) / f"{kind}.gguf", kind=kind).path
            exported, _, _ = load_model(path)
            for precision in ("none", "int4") if kind.startswith("q4") else ("none",):
                score(f"{kind}, {precision}", exported, precision)
            if args.llama_python:
                score_llama(f"{kind}, llama.cpp", path)
        if args.own_kinds:
            path = export_gguf(directory, Path(place) / "f32.gguf", kind="f32").path
        for kind in args.own_kinds:
            score_llama(f"llama.cpp's own {kind}", path, kind)
    print(json.dumps({"tokens": len(piece.tokens) - 1, "bytes": piece.n_bytes, "bits_per_byte": found}))


if __name__ == "__main__":
    main()
