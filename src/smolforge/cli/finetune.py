"""smolforge finetune: tune a model on conversations."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from pathlib import Path
from typing import Any

from smolforge.cli import options
from smolforge.cli.options import MODEL_HELP, parse_positive, parse_sources
from smolforge.cli.train import print_outcome

logger = logging.getLogger(__name__)

EXAMPLES = """\
examples:
  smolforge finetune runs/pocket --data dialogues.jsonl           a model of your own learns to answer
  smolforge finetune smollm2 --data faq.csv --epochs 3 --lr 5e-5
  smolforge finetune smollm2 --data faq.csv --lora 16            an adapter, in half the memory
  smolforge finetune HuggingFaceTB/SmolLM2-135M --data chat.parquet=0.8 faq.jsonl=0.2
  smolforge chat runs/pocket-sft                                  and talk to it

Rows are conversations: messages, conversations (ShareGPT), prompt and completion, instruction and output
(Alpaca), question and answer; the columns tell which. A model without a chat template gets ChatML.
The same command continues a run that was interrupted. docs/finetuning.md has a walk through all of it.
"""
BATCH = 8  # windows in one update unless another number is asked for


def add(verbs: Any) -> None:
    """Describe the verb's arguments."""
    parser = verbs.add_parser(
        "finetune",
        help="tune a model on conversations",
        description="Tune a model on conversations, so that it answers.",
        epilog=EXAMPLES,
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--data", nargs="+", action="extend", required=True, metavar="SRC[=WEIGHT]", help="sources of conversations"
    )
    parser.add_argument(
        "--lora", metavar="RANK", help="learn an adapter of this rank beside the weights, which stay as they are"
    )
    parser.add_argument("--preset", metavar="PRESET|FILE.yaml", help="settings (default: sft; lora with --lora)")
    options.add_usual(parser, epochs="sft: 3", lr="sft: 1e-4, lora: by the width", batch=f"default {BATCH}")
    options.add_run(parser, out="runs/MODEL-PRESET", setting="data.too_long=truncate")
    options.add_device(parser)
    options.add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Tune."""
    from smolforge.checkpoint import commit
    from smolforge.training.launch import launch
    from smolforge.training.setup import TrainRequest
    from smolforge.training.train import run_training

    args.preset = args.preset or ("lora" if args.lora else "sft")
    time_limit = options.parse_seconds(args.time_limit, "--time-limit") if args.time_limit else None
    request = TrainRequest(
        base=args.preset, overrides=args.overrides, layers=_layers(args), fresh=args.fresh, must_resume=args.resume,
        out=args.out or Path("runs") / f"{_name_of(args.model)}-{Path(args.preset).stem}", time_limit=time_limit,
        command=shlex.join(["smolforge", *args.words]),
    )  # fmt: skip
    if args.dry_run:
        from smolforge.training.dry_run import rehearse

        rehearse(request)
        return 0
    if (code := launch(request, args.nproc, args.words)) is not None:
        return code
    finished, shutdown = run_training(request)
    if args.json:
        print_outcome(finished)
    elif shutdown.exit_code == 0:
        best, last = (finished.checkpoints_path / name for name in (commit.BEST, commit.LAST))
        differs = best.exists() and best.resolve() != last.resolve()
        if differs:
            logger.info(f"lowest held-out loss: {best.resolve().name}, in {best}")
        logger.info(f"talk to it: smolforge chat {shlex.quote(str(best if differs else finished.path))}")
    sys.stdout.flush()
    return shutdown.exit_code


def _layers(args: argparse.Namespace) -> dict[str, Any]:
    """The sections that the options set; windows are as long as the model's context where that is shorter."""
    from smolforge.checkpoint.format import read_config
    from smolforge.checkpoint.locate import resolve_model
    from smolforge.config import build_config

    positions = read_config(resolve_model(args.model)).max_position_embeddings
    layers = {"init": args.model, "data": {"sources": parse_sources(args.data)}, **options.usual_layers(args)}
    if args.lora is not None:
        layers["lora"] = {"r": parse_positive(args.lora, "--lora")}
    length = build_config(args.preset, args.overrides, **layers).data.sequence_length
    if length > positions and not any(override.startswith("data.sequence_length=") for override in args.overrides):
        layers["data"]["sequence_length"] = length = positions
    batch = parse_positive(args.batch_size, "--batch-size") if args.batch_size is not None else BATCH
    if args.batch_size is not None or not any(o.startswith("training.tokens_per_step=") for o in args.overrides):
        layers.setdefault("training", {})["tokens_per_step"] = batch * length
    return layers


def _name_of(model: str) -> str:
    path = Path(model)
    return path.parent.parent.name if path.parent.name == "checkpoints" else path.name.removesuffix(".gguf")
