"""smolforge data: which documents fed a step, what is learned of conversations, the embedded corpus as a file."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from smolforge.cli.options import MODEL_HELP, add_json, parse_sources, positive, print_result

SET_HELP = "any key of the configuration, e.g. data.loss_on=all (may be repeated)"


def add(verbs: Any) -> None:
    """Describe the verb's arguments."""
    parser = verbs.add_parser(
        "data",
        help="which documents fed a step; what is learned of conversations; write the embedded corpus",
        description="Questions about data. `which` names the documents whose tokens fed a step of a run;\n"
        "`show` prints conversations as a model gets them, with what it learns of them in colour;\n"
        "`write` puts documents of the embedded corpus `tales` into a file.",
    )
    parts = parser.add_subparsers(dest="part", metavar="which|show|write", required=True)
    which = parts.add_parser("which", help="the documents that fed a step", description=_which.__doc__)
    which.add_argument("path", metavar="RUN", help="directory of the run")
    which.add_argument("--step", type=positive, required=True, metavar="N", help="step as in metrics.jsonl, from 1")
    add_json(which)
    which.set_defaults(run=_which)
    show = parts.add_parser("show", help="what is learned of conversations", description=_show.__doc__)
    show.add_argument("sources", nargs="+", metavar="SRC", help="sources of conversations")
    show.add_argument("--model", required=True, metavar="MODEL", help=f"whose chat template is used: {MODEL_HELP}")
    show.add_argument("--count", type=positive, default=3, metavar="N", help="how many conversations (default 3)")
    show.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help=SET_HELP)
    show.set_defaults(run=_show)
    write = parts.add_parser("write", help="write documents of `tales`", description=_write.__doc__)
    write.add_argument("path", metavar="FILE", help="file ending in .parquet, .jsonl, .jsonl.gz, .jsonl.zst or .txt")
    write.add_argument("--documents", type=positive, default=1000, metavar="N", help="how many (default 1000)")
    write.add_argument("--seed", type=int, default=0, metavar="N", help="other seeds give other documents")
    write.add_argument("--chat", action="store_true", help="conversations, for .jsonl: the request and the text")
    write.set_defaults(run=_write)


def _which(args: argparse.Namespace) -> int:
    """Name the documents (source, file, row group, row) whose tokens fed a step."""
    from smolforge import config as configuration
    from smolforge.checkpoint import commit
    from smolforge.checkpoint.state import load_state
    from smolforge.data import Corpus, batch_of_step
    from smolforge.data.loader import merged
    from smolforge.data.order import accepted_cursor
    from smolforge.errors import BadInput
    from smolforge.run import Run
    from smolforge.tokenizer import Tokenizer

    run = Run(args.path)
    if not run.exists:
        raise BadInput(f"{run.path} holds no run")
    config = configuration.build_config(str(run.config_path))
    if not 1 <= args.step <= config.total_steps:
        raise BadInput(f"{args.step} is not a step; they are 1 to {config.total_steps:,}", field="--step")
    newest = commit.newest_whole(run.checkpoints_path)
    source = newest or (run.path / "tokenizer" if not isinstance(config.tokenizer, str) else config.tokenizer)
    index = run.read_index()
    for change in (index or {}).get("accepted", []):
        if args.step <= change["step"]:
            changed = f"it changed after step {change['step']} ({change['problem']})"
            raise BadInput(f"the data of step {args.step} is not here any more: {changed}", field="--step")
    corpus = Corpus.open(config.data, index=index, cache_dir=run.path / "cache")
    # The nearest cursor at or before the step saves replaying the run from its beginning.
    cursor, skip, done = None, [], 0
    for step in commit.steps(run.checkpoints_path):
        directory = run.checkpoints_path / commit.step_name(step)
        if commit.verify(directory):
            continue
        saved = load_state(directory / "training")
        skip = [(a, b) for a, b in saved["skip"]]
        if step < args.step:
            cursor, done = accepted_cursor(saved["cursor"], corpus.index), step
    address = (cursor["step"] if cursor else 0) + args.step - 1 - done
    for a, b in merged(skip):
        if (cursor["step"] if cursor else 0) <= a <= address:
            address += b - a
    batch = batch_of_step(
        corpus, Tokenizer.from_pretrained(source), cursor, address,
        sequences_per_step=config.sequences_per_step, skip_steps=skip,
    )  # fmt: skip
    lines = [f"{found.source}  {found.file}  row group {found.row_group}  row {found.row}" for found in batch.documents]
    lines += [f"left out: {found.problem}" for found in batch.left_out]
    left_out = [{**found.address._asdict(), "problem": found.problem} for found in batch.left_out]
    outcome = {"step": args.step, "documents": [found._asdict() for found in batch.documents], "left_out": left_out}
    print_result(args, outcome, "\n".join(lines))
    return 0


def _show(args: argparse.Namespace) -> int:
    """Print the first conversations of a source as a model gets them. What it learns is green, or between ⟦ and ⟧."""
    import itertools

    from smolforge import config as configuration
    from smolforge.checkpoint.locate import resolve_model
    from smolforge.data import Corpus
    from smolforge.data.conversations import ChatEncoder, encoded, show_learned, survey
    from smolforge.tokenizer import Tokenizer
    from smolforge.training.finetuning import with_chat_template

    layers = {"init": args.model, "data": {"sources": parse_sources(args.sources)}}
    config = configuration.build_config("sft", args.overrides, **layers).data
    tokenizer = with_chat_template(Tokenizer.from_pretrained(resolve_model(args.model)))
    marks = ("\x1b[32m", "\x1b[0m") if sys.stdout.isatty() else ("⟦", "⟧")
    encoder = ChatEncoder(tokenizer, config)
    with Corpus.open(config) as corpus:
        for conversation in itertools.islice(encoded(corpus, encoder, held_out=False), args.count):
            at, state = conversation.address, "" if encoder.usable(conversation) else ", left out"
            size = f"{len(conversation.ids):,} tokens, {int(conversation.learned.sum()):,} learned{state}"
            print(f"--- {at.file}, row group {at.row_group}, row {at.row}: {size}")
            print(show_learned(conversation, tokenizer, marks))
        print(survey(corpus, tokenizer).report(config), file=sys.stderr)
    return 0


def _write(args: argparse.Namespace) -> int:
    """Write documents of the embedded corpus into a file, in Cosmopedia-v2's schema."""
    from smolforge.errors import BadInput
    from smolforge.tales.source import KINDS, write

    kind = next((kind for kind in KINDS if args.path.endswith(f".{kind}")), None)
    if kind is None:
        endings = ", .".join(KINDS)
        raise BadInput(f"{args.path} has none of the endings .{endings}", field="FILE")
    if args.chat and kind != "jsonl":
        raise BadInput("conversations are written as .jsonl", field="--chat")
    write(args.path, kind=kind, documents=range(args.documents), seed=args.seed, chat=args.chat)
    print(f"{args.documents:,} documents in {args.path}", file=sys.stderr)
    return 0
