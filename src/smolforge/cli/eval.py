"""smolforge eval: how well a model predicts a source."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

EXAMPLES = """\
examples:
  smolforge eval runs/pocket --data tales                 beside the source's own entropy
  smolforge eval runs/pocket --data my_texts/*.txt --tokens 200k
  smolforge eval HuggingFaceTB/SmolLM2-135M --data wiki.jsonl --json
  smolforge eval runs/pocket --data tales --quantize int8 int4       what fewer bits cost
  smolforge eval HuggingFaceTB/SmolLM2-135M --tasks hellaswag,arc_easy
  smolforge eval runs/pocket --tasks my_task --task-files my_tasks/     YAML files of one's own, no network
"""


def add(verbs: Any) -> None:
    """Describe the verb's arguments."""
    parser = verbs.add_parser(
        "eval",
        help="loss, perplexity and bits per byte on any source",
        description="Score a model on text: loss in nats per token, perplexity, and bits per byte, which can be\n"
        "compared between models with different tokenizers.",
        epilog=EXAMPLES,
    )
    parser.add_argument("model", metavar="MODEL", help="a run, a checkpoint, a model directory or a Hub id")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", nargs="+", action="extend", metavar="SRC", help="sources of text")
    what.add_argument("--tasks", metavar="A,B,...", help="tasks of lm-eval (pip install 'smolforge[eval]')")
    parser.add_argument("--tokens", default="100k", metavar="N", help="most tokens to score (default 100k)")
    parser.add_argument(
        "--length", type=int, metavar="N", help="context in tokens (default: the model's, at most 2,048)"
    )
    parser.add_argument("--held-out", action="store_true", help="only the documents that training never sees")
    parser.add_argument(
        "--quantize", nargs="+", choices=("fp32", "bf16", "int8", "int4"), metavar="P",
        help="score each of these precisions as well, as the CPU serves it, and say what it costs",
    )  # fmt: skip
    parser.add_argument("--text-column", default="text", metavar="NAME", help="column of the text (default: text)")
    tasks = parser.add_argument_group("with --tasks")
    tasks.add_argument("--task-files", type=Path, metavar="DIR", help="a folder of task files, before lm-eval's own")
    tasks.add_argument("--shots", type=int, metavar="N", help="examples before each question (default: the task's)")
    tasks.add_argument("--limit", type=int, metavar="N", help="questions of each task (default: all)")
    tasks.add_argument("--batch", type=int, default=8, metavar="N", help="questions at a time (default 8)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Evaluate."""
    if args.tasks is not None:
        return _run_tasks(args)
    import json

    from smolforge.checkpoint import locate
    from smolforge.cli.train import parse_sources
    from smolforge.config import DataConfig, parse_count
    from smolforge.data import Corpus
    from smolforge.errors import BadInput
    from smolforge.evaluation import evaluate, evaluate_runner, tokenize_eval_set
    from smolforge.generation.runners import select_runner

    try:
        tokens = parse_count(args.tokens)
    except ValueError as error:
        raise BadInput(str(error), field="--tokens") from None
    model, tokenizer, directory = locate.load_model(args.model)
    positions = model.config.max_position_embeddings
    length = args.length or min(positions, 2048)
    if not 1 <= length <= positions:
        raise BadInput(f"{length} does not fit the model's {positions} positions", field="--length")
    corpus = Corpus.open(DataConfig(sources=parse_sources(args.data), text_column=args.text_column))
    texts = (document.text for document in corpus.documents(held_out=True if args.held_out else None))
    piece = tokenize_eval_set(texts, tokenizer, tokens)
    windows = -(-(len(piece.tokens) - 1) // length)
    score = evaluate(model, piece, length=min(length, len(piece.tokens) - 1), batch=min(4, windows))
    outcome: dict[str, Any] = {"model": str(directory), "data": args.data, **score.to_json()}
    if corpus.entropy_bits_per_byte:
        outcome["entropy_bits_per_byte"] = corpus.entropy_bits_per_byte
    if args.quantize:
        outcome["precisions"] = {}
        for precision in dict.fromkeys(args.quantize):
            runner, _ = select_runner(model, precision)
            served = evaluate_runner(runner, piece, length=min(length, len(piece.tokens) - 1))
            price = served.bits_per_byte / score.bits_per_byte - 1
            outcome["precisions"][precision] = {**served.to_json(), "price": price, "runner": runner.name}
    if args.json:
        print(json.dumps(outcome))
        return 0
    print(f"loss           {score.loss:.4f} nats per token")
    print(f"perplexity     {score.perplexity:.2f}")
    print(f"bits per byte  {score.bits_per_byte:.4f}")
    floor = corpus.entropy_bits_per_byte
    if floor:
        above = score.bits_per_byte / floor - 1
        print(f"entropy        {floor:.4f} bits per byte of the source itself; the model is {above:.1%} above")
    print(f"text           {score.tokens:,} tokens, {score.n_bytes:,} bytes, {score.documents:,} documents")
    for precision, served in outcome.get("precisions", {}).items():
        print(
            f"{precision:<14} {served['bits_per_byte']:.4f} bits per byte, {served['price']:+.2%} ({served['runner']})"
        )
    return 0


def _run_tasks(args: argparse.Namespace) -> int:
    import contextlib
    import json

    import torch

    from smolforge.checkpoint import locate
    from smolforge.errors import BadInput

    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    for option, value in (("--shots", args.shots), ("--limit", args.limit), ("--batch", args.batch)):
        if value is not None and value < (0 if option == "--shots" else 1):
            raise BadInput(f"{value} is too small", field=option)
    if not names:
        raise BadInput("names no task", field="--tasks", hint="Write --tasks hellaswag,arc_easy.")
    try:
        from smolforge.evaluation.tasks import run_tasks
    except ModuleNotFoundError as error:
        raise BadInput(
            f"tasks need the package {error.name}", field="--tasks", hint="Install it: pip install 'smolforge[eval]'"
        ) from None
    model, tokenizer, directory = locate.load_model(args.model, device="cuda" if torch.cuda.is_available() else "cpu")
    say = lambda text: print(text, file=sys.stderr)  # noqa: E731
    with contextlib.redirect_stdout(sys.stderr):  # lm-eval and the tasks print what they like
        found = run_tasks(
            model, tokenizer, names, task_files=args.task_files, shots=args.shots, limit=args.limit, batch=args.batch,
            say=say,
        )  # fmt: skip
    if args.json:
        print(json.dumps({"model": str(directory), "tasks": found}))
        return 0
    for task, metrics in found.items():
        for metric, value in metrics.items():
            if not metric.startswith(("sample_len", "alias")) and "_stderr" not in metric:
                error = metrics.get(metric.replace(metric.split(" ")[0], metric.split(" ")[0] + "_stderr", 1))
                print(f"{task:<24} {metric:<18} {value:.4f}" + (f" ± {error:.4f}" if error is not None else ""))
    return 0
