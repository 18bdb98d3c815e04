"""smolforge generate: continue prompts, streaming to the terminal."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from smolforge.cli.options import MODEL_HELP, add_inference, add_json, add_sampling, print_result, sampling_params
from smolforge.formatting import for_stdout, or_stdin

if TYPE_CHECKING:
    from smolforge.generation import Engine, SamplingParams
    from smolforge.generation.sequence import Prompt

EXAMPLES = """\
examples:
  smolforge generate runs/pocket                               the three default prompts
  smolforge generate runs/pocket "Once upon a time" --seed 7
  smolforge generate HuggingFaceTB/SmolLM2-135M "The sea" --max-tokens 200 --temperature 0.6
  smolforge generate HuggingFaceTB/SmolLM2-1.7B "The sea" --draft HuggingFaceTB/SmolLM2-135M
  echo "In the distant galaxy" | smolforge generate runs/pocket -
"""


def add(verbs: Any) -> None:
    """Describe the verb's arguments."""
    parser = verbs.add_parser(
        "generate",
        help="continue prompts",
        description="Continue prompts with a model. Without prompts it continues three default ones.",
        epilog=EXAMPLES,
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="texts to continue; - reads one from stdin")
    parser.add_argument("--chat", action="store_true", help="put each prompt into the model's chat template")
    parser.add_argument(
        "--special-tokens", action="store_true",
        help="read special tokens that a prompt writes out, such as <|im_start|>, as such and not as text",
    )  # fmt: skip
    add_sampling(parser)
    add_inference(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Generate."""
    from smolforge.config import THREE_PROMPTS
    from smolforge.generation import Engine

    sampling_params(args)  # an error now, not after the model is loaded
    prompts = [or_stdin(prompt) for prompt in args.prompts] or list(THREE_PROMPTS)
    engine = Engine.from_pretrained(args.model, quantize=args.quantize, draft=args.draft, adapter=args.adapter)
    for decision in engine.decisions:
        print(decision, file=sys.stderr)
    if engine.tokenizer.chat_template is not None and not (args.chat or args.special_tokens):
        print(f"note: continues the text as it is; `smolforge chat {args.model}` talks to this model", file=sys.stderr)
    params = sampling_params(args, engine)
    given = [_given(engine, prompt, args) for prompt in prompts]
    if args.json:
        print_result(args, _all_at_once(engine, prompts, given, params), "")
    else:
        _stream(engine, prompts, given, params)
    return 0


def _given(engine: Engine, prompt: str, args: argparse.Namespace) -> Prompt:
    """What the engine gets for a prompt."""
    if args.chat:
        return engine.tokenizer.encode_chat([{"role": "user", "content": prompt}])
    return engine.tokenizer.encode_prompt(prompt, special_tokens=True) if args.special_tokens else prompt


def _stream(engine: Engine, prompts: list[str], given: list[Prompt], params: SamplingParams) -> None:
    """Write one continuation after the other, so that the output reads like text being written."""
    for number, prompt in enumerate(prompts):
        texts, reasons = [""] * params.n, [""] * params.n
        for index in range(params.n):
            if number or index:
                print("\n" + "-" * 40)
            print(prompt + for_stdout(texts[index]), end="", flush=True)
            # The first is written while all of them are.
            for step in engine.stream([given[number]], params) if index == 0 else ():
                texts[step.index] += step.text
                reasons[step.index] = step.finish_reason or reasons[step.index]
                print(for_stdout(step.text if step.index == 0 else ""), end="", flush=True)
            print(flush=True)
            print(f"[{_REASONS.get(reasons[index], reasons[index])}]", file=sys.stderr)


_REASONS = {"stop": "end of text", "length": "maximum length reached"}


def _all_at_once(engine: Engine, prompts: list[str], given: list[Prompt], params: SamplingParams) -> dict[str, Any]:
    texts: dict[tuple[int, int], dict[str, Any]] = {}
    for step in engine.stream(given, params):
        entry = texts.setdefault(
            (step.request, step.index),
            {"prompt": prompts[step.request], "choice": step.index, "text": "", "tokens": 0, "finish_reason": None},
        )
        entry["text"] += step.text
        entry["tokens"] += step.token_id is not None and not step.prompt
        entry["finish_reason"] = step.finish_reason or entry["finish_reason"]
    return {"model": str(engine.directory), "completions": [texts[key] for key in sorted(texts)]}
