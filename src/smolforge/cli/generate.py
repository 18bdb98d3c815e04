"""smolforge generate: continue prompts, streaming to the terminal."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smolforge.generation.engine import Engine
    from smolforge.generation.sampling_params import SamplingParams

EXAMPLES = """\
examples:
  smolforge generate runs/pocket                               the three prompts of every demo
  smolforge generate runs/pocket "Once upon a time" --seed 7
  smolforge generate HuggingFaceTB/SmolLM2-135M "The sea" --max-tokens 200 --temperature 0.6
  smolforge generate HuggingFaceTB/SmolLM2-1.7B "The sea" --draft HuggingFaceTB/SmolLM2-135M
  echo "In the distant galaxy" | smolforge generate runs/pocket -

MODEL and DRAFT_MODEL are a run (its newest whole checkpoint), a checkpoint, any Hugging Face Llama directory, or a
Hub id.
"""


def add(verbs: Any) -> None:
    """Describe the verb's arguments."""
    parser = verbs.add_parser(
        "generate",
        help="continue prompts",
        description="Write with a model. Without prompts it continues the three of every demo.",
        epilog=EXAMPLES,
    )
    parser.add_argument("model", metavar="MODEL", help="a run, a checkpoint, a model directory or a Hub id")
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="texts to continue; - reads one from stdin")
    add_sampling(parser)
    parser.add_argument(
        "--draft", metavar="DRAFT_MODEL",
        help="a smaller model of the same tokenizer that guesses ahead while that pays; the text stays the same",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of streaming")
    parser.set_defaults(run=run)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """The options of sampling, with the seed project's defaults."""
    parser.add_argument("--max-tokens", type=int, default=100, metavar="N", help="most new tokens (default 100)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="0 takes the likeliest (default 0.8)"
    )
    parser.add_argument(
        "--top-p", type=float, default=0.9, metavar="P", help="smallest set with this mass (default 0.9)"
    )
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="only the K likeliest; 0 for all")
    parser.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="only what has P times the top's probability"
    )
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1 repeats less")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text (may be repeated)"
    )
    parser.add_argument("--seed", type=int, default=None, metavar="N", help="equal seeds write equal texts")
    parser.add_argument("--n", type=int, default=1, metavar="N", help="continuations of each prompt")
    parser.add_argument(
        "--quantize", default="auto", choices=("auto", "none", "fp32", "bf16", "int8", "int4"),
        help="precision of the weights (default: the fastest that keeps the quality)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Generate."""
    from smolforge.config import THREE_PROMPTS
    from smolforge.generation.engine import Engine
    from smolforge.generation.sampling_params import SamplingParams

    sampling = SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        stop=tuple(args.stop),
        seed=args.seed,
        n=args.n,
    )
    prompts = [sys.stdin.read() if prompt == "-" else prompt for prompt in args.prompts] or list(THREE_PROMPTS)
    engine = Engine.from_pretrained(args.model, quantize=args.quantize, draft=args.draft)
    for decision in engine.decisions:
        print(decision, file=sys.stderr)
    if args.json:
        return _as_json(engine, prompts, sampling)
    return _streaming(engine, prompts, sampling)


def _streaming(engine: Engine, prompts: list[str], sampling: SamplingParams) -> int:
    # One continuation at a time, so that the stream reads like writing.
    from dataclasses import replace

    single = replace(sampling, n=1)
    for number, prompt in enumerate(prompts):
        for choice in range(sampling.n):
            if number or choice:
                print("\n" + "-" * 40)
            print(prompt, end="", flush=True)
            seed = None if sampling.seed is None else sampling.seed + choice
            reason = None
            for step in engine.stream([prompt], replace(single, seed=seed)):
                print(step.text, end="", flush=True)
                reason = step.finish_reason or reason
            print(flush=True)
            print(f"[{_REASONS.get(reason or '', reason)}]", file=sys.stderr)
    return 0


_REASONS = {"stop": "the text ended", "length": "the length limit was reached"}


def _as_json(engine: Engine, prompts: list[str], sampling: SamplingParams) -> int:
    import json

    texts: dict[tuple[int, int], dict[str, Any]] = {}
    for step in engine.stream(prompts, sampling):
        entry = texts.setdefault(
            (step.request, step.index),
            {"prompt": prompts[step.request], "choice": step.index, "text": "", "tokens": 0, "finish_reason": None},
        )
        entry["text"] += step.text
        entry["tokens"] += step.token_id is not None and not step.prompt
        entry["finish_reason"] = step.finish_reason or entry["finish_reason"]
    completions = [texts[key] for key in sorted(texts)]
    print(json.dumps({"model": str(engine.directory), "completions": completions}, ensure_ascii=False))
    return 0
