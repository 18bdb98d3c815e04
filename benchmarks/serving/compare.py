"""Serving side by side: smolforge, transformers and llama.cpp answer 1, 4, 8 and 16 clients on the same weights.

    python benchmarks/serving/compare.py [--llama-python PYTHON] [--tokens 48] [--rounds 1] [--only NAME ...]

Each server runs alone, in a process of its own, and gets the load of `smolforge bench serve` through /v1/completions.
The model has SmolLM2-135M's shape and random weights, so that every answer has its full length. transformers is
`transformers serve` with continuous batching. llama.cpp is its own server with 16 slots, from the package xllamacpp
(`pip install xllamacpp`, in a virtual environment of its own whose PYTHON is given).

Needs about 4 GB of memory and 2 GB of disk under --workspace. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from smolforge.errors import RunFailed
from smolforge.logging import show
from smolforge.serving import load_test

HERE = Path(__file__).parent
SLOTS = max(load_test.CLIENTS)
CONTEXT = 512  # positions of one slot


def commands(model: Path, port: int, llama_python: str | None, threads: int) -> dict[str, list[str]]:
    """The command of each server. Names end in the precision of the weights."""
    python = sys.executable
    ours = [python, "-m", "smolforge", "serve", str(model), "--port", str(port), "--no-page", "--max-batch", str(SLOTS)]
    theirs = [
        python, "-m", "transformers.cli.transformers", "serve", str(model), "--port", str(port), "--device", "cpu",
        "--continuous-batching",
    ]  # fmt: skip
    found = {
        "smolforge-int8": [*ours, "--quantize", "int8"],
        "smolforge-bf16": [*ours, "--quantize", "bf16"],
        "transformers-bf16": [*theirs, "--dtype", "bfloat16"],
    }
    if llama_python:
        llama = [llama_python, str(HERE / "llama_server.py")]
        for kind in ("q8_0", "bf16"):
            file = str(model.parent / f"{kind}.gguf")
            found[f"llama.cpp-{kind}"] = [*llama, file, str(port), str(SLOTS), str(CONTEXT), str(threads)]
    return found


def prepare(workspace: Path, llama_python: str | None) -> Path:
    """The model as a Hugging Face directory and, for llama.cpp, as GGUF files."""
    model = workspace / "smollm2-135m-shape"
    if not model.is_dir():
        load_test.make_model(model)
    for kind in ("q8_0", "bf16") if llama_python else ():
        out = workspace / f"{kind}.gguf"
        if not out.is_file():
            command = [sys.executable, "-m", "smolforge", "export", str(model), "--to", "gguf", "--quantize", kind]
            subprocess.run([*command, "--out", str(out)], check=True)
    return model


def main() -> None:
    """Measure, print a table, and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-python", default=None)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--workspace", type=Path, default=Path(tempfile.gettempdir()) / "smolforge-serving")
    parser.add_argument("--only", nargs="*", default=None, help="servers to run, by name")
    args = parser.parse_args()
    show()
    model = prepare(args.workspace, args.llama_python)
    results: dict[str, list[dict[str, float]]] = {}
    for name in commands(model, 0, args.llama_python, args.threads):
        if args.only is not None and name not in args.only:
            continue
        with socket.create_server(("127.0.0.1", 0)) as found:
            port = found.getsockname()[1]
        command = commands(model, port, args.llama_python, args.threads)[name]
        environment = {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
        # smolforge names its model; transformers loads the one in the request; llama.cpp ignores the field.
        asked = str(model) if name.startswith("transformers") else model.name
        try:
            address = f"http://127.0.0.1:{port}"
            print(name, file=sys.stderr)
            with load_test.start_server(command, url=address, environment=environment) as server:
                results[name] = load_test.sweep(server.url, asked, load_test.CLIENTS, args.tokens, args.rounds)
        except RunFailed as error:  # a server that cannot run here must not end the comparison
            print(f"{name}: {error}", file=sys.stderr)
    for name, levels in results.items():
        print(
            load_test.table(
                {"model": name, "tokens": args.tokens, "quantize": name.rpartition("-")[2], "levels": levels}
            )
        )
    print(json.dumps({"benchmark": "serving", "tokens": args.tokens, "threads": args.threads, "results": results}))


if __name__ == "__main__":
    main()
