"""smolforge export: a model for other programs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from smolforge.cli.options import MODEL_HELP, add_adapter, add_json, parse_sources, print_result, refuse_others
from smolforge.errors import BadInput

EXAMPLES = """\
examples:
  smolforge export runs/pocket --to gguf --out pocket.gguf                     for llama.cpp, in f16
  smolforge export runs/pocket --to gguf --out pocket.gguf --quantize q8_0
  smolforge export smollm2 --to gguf --out talker.gguf --quantize q4_1 --check  and compare its text in llama.cpp
  smolforge export smollm2 --to ollama --out talker                            ollama create talker -f talker/Modelfile
  smolforge export runs/pocket --to space --out pocket-space                   python pocket-space/app.py
  smolforge export runs/pocket --to checkpoint --out pocket-model              the model without training state
  smolforge export smollm2 --adapter runs/faq --to merged --out faq-model      one model of both
  smolforge export runs/pocket --to hub --out OWNER/NAME --dry-run             what would be uploaded
"""
KINDS = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1")
# Which options belong to which goal; another one is an error, not ignored.
_ONLY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("quantize", "name", "check", "calibration"), ("gguf", "ollama")),
    "title": ("space",), "adapter": ("merged",), "private": ("hub",), "dry_run": ("hub",),
}  # fmt: skip


def add(verbs: Any) -> None:
    """Describe the verb's arguments."""
    parser = verbs.add_parser(
        "export",
        help="a model for other programs: GGUF, Ollama, a Space, the Hub",
        description="Write a model as GGUF, for Ollama, as a Hugging Face Space or a plain directory, or upload it.",
        epilog=EXAMPLES,
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--to", required=True, choices=("gguf", "ollama", "space", "checkpoint", "merged", "hub"), help="what to make"
    )
    parser.add_argument("--out", required=True, metavar="PATH", help="the new file or directory; OWNER/NAME of the Hub")
    parser.add_argument("--quantize", choices=KINDS, help="gguf, ollama: type of the weights (default f16, q8_0)")
    parser.add_argument(
        "--calibration", nargs="+", action="extend", metavar="SRC[=WEIGHT]",
        help="q4_0, q4_1: text to choose the rounding by (default: text that the model writes)",
    )  # fmt: skip
    parser.add_argument("--name", help="gguf, ollama: the name in the file (default: the directory's)")
    parser.add_argument(
        "--check", action="store_true", default=None, help="gguf, ollama: compare greedy text of the file in llama.cpp"
    )
    add_adapter(parser)
    parser.add_argument("--title", help="space: its title (default: the model's name)")
    parser.add_argument("--private", action="store_true", default=None, help="hub: a new repository is private")
    parser.add_argument("--dry-run", action="store_true", default=None, help="hub: only list what would be uploaded")
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Export."""
    refuse_others(args, _ONLY, "--to ", args.to)
    outcome, lines = {
        "gguf": _gguf, "ollama": _ollama, "space": _space, "checkpoint": _checkpoint, "merged": _merged, "hub": _hub,
    }[args.to](args)  # fmt: skip
    print_result(args, outcome, "\n".join(lines))
    return 0


Outcome = tuple[dict[str, Any], list[str]]


def _gguf(args: argparse.Namespace) -> Outcome:
    from smolforge.export.gguf import export_gguf
    from smolforge.export.space import name_of

    done = export_gguf(args.model, Path(args.out), **_file_options(args, "f16", args.name or name_of(args.model)))
    outcome = {"to": "gguf", "path": str(done.path), "bytes": done.bytes, "kind": done.kind, "tensors": done.tensors}
    return outcome, [
        f"{done.path}: {done.kind}, {done.tensors} tensors, {done.bytes:,} bytes",
        *_check(args, done.path, outcome),
        f"run it:  llama-completion -m {done.path} -p 'Once upon a time' -n 100 -no-cnv",
    ]


def _file_options(args: argparse.Namespace, kind: str, name: str | None) -> dict[str, Any]:
    """What both exports of a GGUF file take; --check is refused before anything is written where it cannot be done."""
    if args.calibration and not (args.quantize or "").startswith("q4"):
        raise BadInput("belongs to --quantize q4_0 or q4_1", field="--calibration")
    sources = parse_sources(args.calibration, "--calibration") if args.calibration else None
    if args.check:
        from smolforge.export.check import require_llama_cpp

        require_llama_cpp()
    return {"kind": args.quantize or kind, "name": name, "calibration": sources}


def _check(args: argparse.Namespace, path: Path, outcome: dict[str, Any]) -> list[str]:
    """With --check, what llama.cpp writes from a file: into the outcome, and as a line for people."""
    if not args.check:
        return []
    from dataclasses import asdict

    from smolforge.export.check import compare_with_llama_cpp, summarize

    found = compare_with_llama_cpp(path)
    outcome["check"] = [asdict(each) for each in found]
    return [summarize(found)]


def _ollama(args: argparse.Namespace) -> Outcome:
    from smolforge.export.ollama import export_ollama

    done = export_ollama(args.model, Path(args.out), **_file_options(args, "q8_0", args.name))
    outcome = {"to": "ollama", "path": str(done.path), "bytes": done.bytes, "kind": done.kind}
    return outcome, [
        f"{done.path}: model.gguf ({done.kind}, {done.bytes:,} bytes) and Modelfile",
        *_check(args, done.path / "model.gguf", outcome),
        f"run it:  ollama create {done.path.name} -f {done.path / 'Modelfile'} && ollama run {done.path.name}",
    ]


def _space(args: argparse.Namespace) -> Outcome:
    from smolforge.export.space import export_space

    path = export_space(args.model, Path(args.out), title=args.title)
    return {"to": "space", "path": str(path)}, [
        f"{path}: a Space",
        f"run it here:         python {path / 'app.py'}",
        f"put it on the Hub:   hf upload OWNER/NAME {path} --repo-type space",
    ]


def _checkpoint(args: argparse.Namespace) -> Outcome:
    from smolforge.checkpoint.locate import resolve_model
    from smolforge.export.push import copy_model

    out = Path(args.out)
    copy_model(resolve_model(args.model), out)
    return {"to": "checkpoint", "path": str(out)}, [f"{out}: the model without training state"]


def _merged(args: argparse.Namespace) -> Outcome:
    from smolforge.export.push import export_merged

    out = Path(args.out)
    export_merged(args.model, args.adapter, out)
    return {"to": "merged", "path": str(out)}, [f"{out}: the model with its adapter merged"]


def _hub(args: argparse.Namespace) -> Outcome:
    from smolforge.export.push import push

    done = push(args.model, args.out, private=bool(args.private), dry_run=bool(args.dry_run))
    outcome = {
        "to": "hub", "repo": done.repo, "url": done.url, "dry_run": done.url is None,
        "files": [{"name": name, "bytes": size} for name, size in done.files], "notes": done.notes,
    }  # fmt: skip
    verb = "uploaded" if done.url else "would be uploaded"
    lines = [f"{size:>14,}  {name}" for name, size in done.files]
    total = sum(size for _, size in done.files)
    lines.append(f"{total:>14,}  bytes in {len(done.files)} files {verb} to {done.repo}")
    lines += [f"note: {note}" for note in done.notes]
    return outcome, lines + ([done.url] if done.url else [])
