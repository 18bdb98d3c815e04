"""SmolLM2-135M, trained on with your own text.

    python examples/continue_smollm2.py notes/ --steps 200

It knows English already, so a few notes are enough to turn its style. The learning rate is a thirtieth of that of new
weights, so that it forgets little. SmolLM2-135M is fetched from the Hub the first time; --init takes any other model.
"""

from __future__ import annotations

import argparse

import smolforge


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="a file or folder")
    parser.add_argument("--init", default="HuggingFaceTB/SmolLM2-135M")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--window", type=int, default=256, help="tokens of a window")
    parser.add_argument("--out", default="runs/continued")
    args = parser.parse_args(words)
    before = smolforge.evaluate(args.init, args.text, held_out=True, tokens=5000)
    run = smolforge.train(
        "continue",
        init=args.init,
        data=args.text,
        steps=args.steps,
        out=args.out,
        config={
            "data": {"sequence_length": args.window},
            "training": {"tokens_per_step": 4 * args.window},
        },
    )
    after = smolforge.evaluate(run.path, args.text, held_out=True, tokens=5000)
    print(f"held-out text: {before.bits_per_byte:.3f} bits per byte before, {after.bits_per_byte:.3f} after")
    print(smolforge.load(run.path).generate("Today", max_tokens=80, seed=1))


if __name__ == "__main__":
    main()
