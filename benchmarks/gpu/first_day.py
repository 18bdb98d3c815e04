"""The first day on a GPU: everything that cannot be known without one, in one command of under ten minutes.

    PYTHONPATH=src python benchmarks/gpu/first_day.py [--out DIR] [--only PART ...] [--device cuda:0]
    python benchmarks/gpu/first_day.py --wheels DIR     what this machine lacks, and whether DIR has it
    python benchmarks/gpu/first_day.py --rehearse       all of it, small, on a CPU

Each part runs in a process of its own with a time limit, because an error on a GPU spoils its process. After every part
DIR/first_day.json and DIR/first_day.md are written anew: a cut leaves what was measured. A part that fails is reported,
and the next one runs. Needs torch 2.10 or newer, numpy, safetensors, tokenizers, pydantic, PyYAML and rich, no network;
pytest, hypothesis and transformers are used where they are installed. The parts are in `parts.py`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# Each part and its limit in seconds on a GPU; together 10 minutes. The most telling come first.
LIMITS = {
    "machine": 15, "kernels": 40, "speed": 130, "losses": 65, "resume": 60, "decoding": 60, "memory": 30,
    "peers": 80, "tests": 110,
}  # fmt: skip
REHEARSAL_SECONDS = 600  # of a part, on a busy machine with two cores
NEEDED = ("torch", "numpy", "safetensors", "tokenizers", "pydantic", "PyYAML", "rich")
OPTIONAL = ("pytest", "hypothesis", "transformers")


def wheels(folder: Path) -> int:
    """Print what this machine lacks and what `folder` has of it; the exit code."""
    names = [path.name.split("-")[0].lower().replace("_", "-") for path in folder.glob("*.whl")]
    missing = []
    for name in (*NEEDED, *OPTIONAL):
        try:
            print(f"{name:14}{importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found = name.lower() in names
            missing += [name] if found or name in NEEDED else []
            print(
                f"{name:14}missing{'' if name in NEEDED else ' (optional)'}, {'a' if found else 'no'} wheel in {folder}"
            )
    if missing:
        print(f"pip install --no-index --find-links {folder} {' '.join(missing)}")
    lacking = [name for name in missing if name.lower() not in names]
    if lacking:
        print(f"{folder} lacks {', '.join(lacking)}")
    return 1 if lacking else 0


def run_part(name: str, out: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run a part in a process of its own; what it found, or why it failed."""
    limit = REHEARSAL_SECONDS if args.rehearse else LIMITS[name]
    target = out / f"{name}.json"
    target.unlink(missing_ok=True)
    command = [
        sys.executable,
        str(HERE / "parts.py"),
        name,
        str(target),
        args.device,
        *(["--rehearse"] if args.rehearse else []),
    ]
    began, failure = time.perf_counter(), None
    log = out / f"{name}.log"
    with log.open("w") as sink:
        try:
            code = subprocess.run(command, stdout=sink, stderr=subprocess.STDOUT, timeout=limit, check=False).returncode
            if code:
                lines = log.read_text(errors="replace").strip().splitlines()
                failure = f"exit code {code}: {lines[-1][:300] if lines else 'no output'}"
        except subprocess.TimeoutExpired:
            failure = f"cut after {limit} s"
    found: dict[str, Any] = {"title": name, "rows": []}
    if target.is_file():
        found = json.loads(target.read_text())
    return {**found, "failure": failure, "seconds": round(time.perf_counter() - began, 1)}


def write(out: Path, results: dict[str, Any]) -> None:
    """All results so far, as one JSON object and as tables; each file is replaced as a whole."""
    for name, text in (("first_day.json", json.dumps(results, indent=1) + "\n"), ("first_day.md", markdown(results))):
        temporary = out / f".{name}"
        temporary.write_text(text)
        temporary.replace(out / name)


def markdown(results: dict[str, Any]) -> str:
    """A table for each part."""
    lines = ["# First day on a GPU", ""]
    for name, part in results.items():
        lines += [f"## {part['title']}", "", f"`{name}`, {part['seconds']} s"]
        lines += ["", f"**Failed: {part['failure']}**"] if part["failure"] else []
        rows = part["rows"]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        if columns:
            lines += ["", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
            lines += [f"| {' | '.join(_cell(row.get(key)) for key in columns)} |" for row in rows]
        lines += ["", *part.get("notes", []), ""]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "" if value is None else str(value).replace("|", "\\|").replace("\n", " ")


def main() -> int:
    """Run the parts; 0 where all of them passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("first_day"), help="where results and logs go")
    parser.add_argument(
        "--only", nargs="+", default=list(LIMITS), choices=list(LIMITS), metavar="PART", help=", ".join(LIMITS)
    )
    parser.add_argument("--device", default=None, help="cuda, cuda:N or cpu (default: cuda, cpu in a rehearsal)")
    parser.add_argument("--rehearse", action="store_true", help="everything small, on a CPU")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="only say what this machine lacks")
    args = parser.parse_args()
    if args.wheels:
        return wheels(args.wheels)
    args.device = args.device or ("cpu" if args.rehearse else "cuda")
    args.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    for name in args.only:
        print(f"{name} ...", flush=True)
        results[name] = run_part(name, args.out, args)
        write(args.out, results)
        print(f"{name}: {results[name]['failure'] or 'done'} ({results[name]['seconds']} s)", flush=True)
    print(f"{args.out / 'first_day.md'}")
    return int(any(part["failure"] for part in results.values()))


if __name__ == "__main__":
    sys.exit(main())
