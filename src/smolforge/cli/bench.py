"""smolforge bench and build-native: how fast this machine trains, writes, serves and reads, and the kernels for it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from smolforge.cli.options import PRECISIONS, above_zero, add_device, add_json, positive, print_result

EXAMPLES = """\
examples:
  smolforge bench train                        the 135M model, 4 x 512 tokens a step
  smolforge bench generate --json              tokens/s per precision, beside the memory's bandwidth
  smolforge bench data --data my_texts/*.parquet

Peers (transformers, llama.cpp, LitGPT) beside smolforge in one run: see benchmarks/ in the repository.
"""
NATIVE_EXAMPLES = """\
examples:
  smolforge build-native                       into the user's cache, where smolforge looks for it
  smolforge build-native --directory native/   into another folder

An installed wheel brings native code for most processors and needs no compiler; SMOLFORGE_KERNELS=native prefers what
this command compiles. An installation from source compiles when it first needs the code; this command does it before,
for example while an image is built. It uses $CXX, g++, clang++, c++ or the package ziglang (pip install ziglang).
"""


def add(verbs: Any) -> None:
    """Describe the arguments of both verbs."""
    parser = verbs.add_parser(
        "bench",
        help="measure training, writing, serving and reading on this machine",
        description="Measure this machine with smolforge on it, each figure beside the limit it cannot pass.",
        epilog=EXAMPLES,
    )
    parts = parser.add_subparsers(dest="part", metavar="train|generate|serve|data", required=True)
    train = parts.add_parser("train", help="tokens/s, share of the matmul limit, memory", description=_train.__doc__)
    train.add_argument("preset", nargs="?", default="smollm2-135m", metavar="PRESET|FILE", help="whose model to train")
    train.add_argument("--length", type=positive, default=512, metavar="N", help="tokens in a sequence (default 512)")
    train.add_argument("--batch", type=positive, default=4, metavar="N", help="sequences in a step (default 4)")
    train.add_argument("--steps", type=positive, default=5, metavar="N", help="measured steps (default 5)")
    train.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="as of train")
    add_device(train)
    train.set_defaults(run=_train)
    generate = parts.add_parser("generate", help="tokens/s, first token, memory", description=_generate.__doc__)
    generate.add_argument("model", nargs="?", metavar="MODEL", help="what writes (default: 135M random weights)")
    generate.add_argument("--tokens", type=positive, default=64, metavar="N", help="tokens to decode (default 64)")
    generate.add_argument("--quantize", nargs="+", choices=PRECISIONS, help="default: all four, on a GPU bf16")
    add_device(generate)
    generate.set_defaults(run=_generate)
    serve = parts.add_parser("serve", help="tokens/s and first token by clients", description=_serve.__doc__)
    serve.add_argument("model", nargs="?", metavar="MODEL", help="what to serve (default: 135M random weights)")
    serve.add_argument("--clients", nargs="+", type=positive, default=[1, 4, 8, 16], metavar="N", help="number at once")
    serve.add_argument("--tokens", type=positive, default=64, metavar="N", help="length of each answer (default 64)")
    serve.add_argument("--quantize", default="auto", choices=("auto", "none", *PRECISIONS))
    serve.set_defaults(run=_serve)
    data = parts.add_parser("data", help="tokens/s of the data pipeline alone", description=_data.__doc__)
    data.add_argument("--data", nargs="+", action="extend", default=[], metavar="SRC", help="sources (default: tales)")
    data.add_argument("--tokenizer", metavar="DIR|ID", help="tokenizer (default: one trained on the source)")
    data.add_argument("--seconds", type=above_zero, default=10.0, metavar="S", help="how long (default 10)")
    data.set_defaults(run=_data)
    native = verbs.add_parser(
        "build-native",
        help="compile the native code for this processor ahead of time",
        description="Compile the native code for this processor, unless it is compiled already, and print its path.",
        epilog=NATIVE_EXAMPLES,
    )
    native.add_argument("--directory", type=Path, metavar="DIR", help="where to put it (default: the user's cache)")
    native.set_defaults(run=_build_native)
    for part in (train, generate, serve, data, native):
        add_json(part)


def _train(args: argparse.Namespace) -> int:
    """Train for some steps and say where the time and the memory go."""
    from smolforge.training import bench

    shape = {"length": args.length, "micro_batch": args.batch, "steps": args.steps}
    return _print(args, bench, bench.measure(args.preset, **shape, overrides=args.overrides))


def _generate(args: argparse.Namespace) -> int:
    """Write with a model at each precision and say what share of the memory's bandwidth it reaches."""
    from smolforge.checkpoint import locate
    from smolforge.generation import bench

    module = locate.load_model(args.model)[0] if args.model else None
    return _print(args, bench, bench.measure(module, precisions=args.quantize, tokens=args.tokens))


def _serve(args: argparse.Namespace) -> int:
    """Serve a model to 1, 4, 8 and 16 clients and say what each of them sees."""
    from smolforge.serving import load_test

    result = load_test.measure(args.model, clients=args.clients, tokens=args.tokens, quantize=args.quantize)
    return _print(args, load_test, result)


def _data(args: argparse.Namespace) -> int:
    """Read, tokenize and pack without a model, and say how much training that feeds."""
    from smolforge.data import bench

    return _print(args, bench, bench.measure(args.data, tokenizer=args.tokenizer, seconds=args.seconds))


def _build_native(args: argparse.Namespace) -> int:
    from smolforge.kernels.build import build

    path = str(build(args.directory))
    print_result(args, {"library": path}, path)
    return 0


def _print(args: argparse.Namespace, bench: Any, result: dict[str, Any]) -> int:
    print_result(args, result, bench.table(result))
    return 0
