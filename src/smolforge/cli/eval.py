"""smolforge eval: how well a model predicts a source, or answers lm-eval's tasks."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from smolforge.cli import options
from smolforge.cli.options import MODEL_HELP, PRECISIONS, add_json, at_least, parse_sources, positive, print_result
from smolforge.errors import BadInput

EXAMPLES = """\
examples:
  smolforge eval runs/pocket --data tales                 next to the source's own entropy
  smolforge eval runs/pocket --data my_texts/*.txt --tokens 200k
  smolforge eval runs/pocket --data A.jsonl=0.7 B.txt=0.3     the mixture by weight, and each source by itself
  smolforge eval HuggingFaceTB/SmolLM2-135M --data wiki.jsonl --json
  smolforge eval runs/pocket --data tales --quantize int8 int4       what fewer bits cost
  smolforge eval HuggingFaceTB/SmolLM2-135M --tasks hellaswag,arc_easy
  smolforge eval smollm2 --tasks arc_easy --apply-chat-template
  smolforge eval runs/pocket --tasks my_task --task-files my_tasks/     your own YAML files, without a network
"""


# Which options belong to which question; another one is an error, not ignored.
_ONLY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("tokens", "length", "held_out", "quantize", "text_column"), ("data",)),
    **dict.fromkeys(("task_files", "shots", "limit", "batch", "apply_chat_template"), ("tasks",)),
}


def add(verbs: Any) -> None:
    """Describe the verb's arguments."""
    parser = verbs.add_parser(
        "eval",
        help="loss, perplexity and bits per byte on any source; lm-eval's tasks",
        description="Score a model on text: loss in nats per token, perplexity, and bits per byte, which can be\n"
        "compared between models with different tokenizers.",
        epilog=EXAMPLES,
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", nargs="+", action="extend", metavar="SRC[=WEIGHT]", help="sources of text")
    what.add_argument("--tasks", metavar="A,B,...", help="tasks of lm-eval (pip install 'smolforge[eval]')")
    parser.add_argument(
        "--tokens", metavar="N",
        help="maximum number of tokens to score, of the mixture and of each source (default 100k)",
    )  # fmt: skip
    parser.add_argument(
        "--length", type=positive, metavar="N", help="context in tokens (default: the model's, at most 2,048)"
    )
    parser.add_argument("--held-out", action="store_true", default=None, help="only text that training never sees")
    parser.add_argument(
        "--quantize", nargs="+", choices=("none", *PRECISIONS), metavar="P",
        help="also score these precisions (none: that of the file), as the CPU serves them, and show what each costs",
    )  # fmt: skip
    parser.add_argument("--text-column", metavar="NAME", help="column of the text (default: text)")
    options.add_adapter(parser)
    tasks = parser.add_argument_group("with --tasks")
    tasks.add_argument("--task-files", type=Path, metavar="DIR", help="a folder of task files, used before lm-eval's")
    tasks.add_argument(
        "--shots", type=at_least(0), metavar="N", help="examples before each question (default: the task's)"
    )
    tasks.add_argument("--limit", type=positive, metavar="N", help="questions of each task (default: all)")
    tasks.add_argument("--batch", type=positive, metavar="N", help="questions at a time (default 8)")
    tasks.add_argument(
        "--apply-chat-template", action="store_true", default=None,
        help="ask each question as a message of a conversation",
    )  # fmt: skip
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Evaluate."""
    options.refuse_others(args, _ONLY, "--", "data" if args.tasks is None else "tasks")
    return _score_text(args) if args.tasks is None else _score_tasks(args)


def _score_text(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from smolforge.checkpoint.locate import load_model, run_of
    from smolforge.evaluation.loss import evaluate_runner, held_out_by, score_sources
    from smolforge.generation.runners import select_runner

    tokens = options.parse_positive(args.tokens or "100k", "--tokens")
    model, tokenizer, directory = load_model(args.model, adapter=args.adapter)
    trained = held_out_by(run_of(directory)) if args.held_out else None
    if args.held_out and trained is None:
        print("note: MODEL is not a run on text, so what the defaults would hold out is scored", file=sys.stderr)

    def score(sources: dict[str, float]) -> Any:
        return score_sources(
            model, tokenizer, sources, tokens=tokens, length=args.length,
            held_out=bool(args.held_out), trained=trained, text_column=args.text_column,
        )  # fmt: skip

    def described(one: Any) -> dict[str, Any]:
        entropy = one.entropy_bits_per_byte
        return asdict(one.score) | ({"entropy_bits_per_byte": entropy} if entropy else {})

    sources = parse_sources(args.data)
    whole = score(sources)
    outcome: dict[str, Any] = {"model": str(directory), "data": args.data, **described(whole)}
    if len(sources) > 1:
        outcome["sources"] = {source: described(score({source: 1.0})) for source in sources}
    if args.quantize:
        outcome["precisions"] = {}
        for precision in dict.fromkeys(args.quantize):
            runner, _ = select_runner(model, precision)
            served = evaluate_runner(runner, whole.text, length=whole.length)
            price = served.bits_per_byte / whole.score.bits_per_byte - 1
            outcome["precisions"][precision] = {**asdict(served), "price": price, "runner": runner.name}
    print_result(args, outcome, _score_table(outcome))
    return 0


def _score_table(outcome: dict[str, Any]) -> str:
    bits, entropy = outcome["bits_per_byte"], outcome.get("entropy_bits_per_byte")
    lines = [
        f"loss           {outcome['loss']:.4f} nats per token",
        f"perplexity     {outcome['perplexity']:.2f}",
        f"bits per byte  {bits:.4f}",
    ]
    if entropy:
        above = bits / entropy - 1
        lines.append(f"entropy        {entropy:.4f} bits per byte of the source itself; the model is {above:.1%} above")
    text = f"{outcome['tokens']:,} tokens, {outcome['n_bytes']:,} bytes, {outcome['documents']:,} documents"
    lines.append(f"text           {text}")
    for source, one in outcome.get("sources", {}).items():
        size = f"{one['tokens']:,} tokens, {one['documents']:,} documents"
        lines.append(f"of {source}: {one['bits_per_byte']:.4f} bits per byte, loss {one['loss']:.4f} ({size})")
    for precision, served in outcome.get("precisions", {}).items():
        price, runner = served["price"], served["runner"]
        lines.append(f"{precision:<14} {served['bits_per_byte']:.4f} bits per byte, {price:+.2%} ({runner})")
    return "\n".join(lines)


def _score_tasks(args: argparse.Namespace) -> int:
    import contextlib

    from smolforge.checkpoint.locate import resolve_model

    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if not names:
        raise BadInput("names no task", field="--tasks", hint="Write --tasks hellaswag,arc_easy.")
    try:
        from smolforge.evaluation.tasks import run_tasks
    except ModuleNotFoundError as error:
        hint = "Install it: pip install 'smolforge[eval]'"
        raise BadInput(f"tasks need the package {error.name}", field="--tasks", hint=hint) from None
    if args.adapter is not None:
        hint = "`smolforge export MODEL --adapter DIR --to merged --out NEW` makes a model of both."
        raise BadInput("tasks are given to a whole model", field="--adapter", hint=hint)
    directory = resolve_model(args.model)
    with contextlib.redirect_stdout(sys.stderr):  # lm-eval and its tasks print to stdout
        found = run_tasks(
            directory, names, task_files=args.task_files, shots=args.shots, limit=args.limit, batch=args.batch or 8,
            apply_chat_template=bool(args.apply_chat_template),
        )  # fmt: skip
    print_result(args, {"model": str(directory), "tasks": found}, _task_table(found))
    return 0


def _task_table(found: dict[str, dict[str, Any]]) -> str:
    lines = []
    for task, metrics in found.items():
        for metric, value in metrics.items():
            if not metric.startswith(("sample_len", "alias")) and "_stderr" not in metric:
                name, space, which = metric.partition(" ")
                error = metrics.get(f"{name}_stderr{space}{which}")
                deviation = "" if error is None else f" ± {error:.4f}"
                lines.append(f"{task:<24} {metric:<18} {value:.4f}{deviation}")
    return "\n".join(lines)
