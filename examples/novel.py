"""A model of your own novel, or of any folder of texts.

    python examples/novel.py novel.txt --minutes 10

Size and length follow from the text and the minutes. What it writes has the style of the text and no sense: a novel is
about a thousandth of what a small model needs.
"""

from __future__ import annotations

import argparse

import smolforge


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="a file or folder")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--out", default="runs/novel")
    args = parser.parse_args(words)
    run = smolforge.train(data=args.text, minutes=args.minutes, out=args.out)
    model = smolforge.load(run.path)
    for seed in range(3):
        print(model.generate("It was", max_tokens=120, seed=seed), "\n---")
    held_out = smolforge.evaluate(run.path, args.text, held_out=True)
    print(f"{held_out.bits_per_byte:.3f} bits per byte on {held_out.n_bytes:,} bytes that it has not seen")


if __name__ == "__main__":
    main()
