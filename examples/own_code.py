"""A model that continues your own code.

    python examples/own_code.py src/ --minutes 30

A folder of source code is read as it is. Windows are longer than those for prose, since a function refers to what was
defined far above it.
"""

from __future__ import annotations

import argparse

import smolforge


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a folder of source code")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--prompt", default="def main(")
    parser.add_argument("--out", default="runs/code")
    args = parser.parse_args(words)
    window = 1024
    run = smolforge.train(
        "llama-5m",
        data=args.folder,
        minutes=args.minutes,
        out=args.out,
        config={"data": {"sequence_length": window}, "training": {"tokens_per_step": 4 * window}},
    )
    model = smolforge.load(run.path)
    print(args.prompt, end="")
    for text in model.stream(args.prompt, max_tokens=200, temperature=0.4, seed=1):
        print(text, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
