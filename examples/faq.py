"""A model that answers the questions of a FAQ.

    python examples/faq.py faq.csv --init smollm2

The file has columns question and answer (or any other form that docs/finetuning.md lists). Without --init it starts
from SmolLM2-135M-Instruct, which is fetched the first time.
"""

from __future__ import annotations

import argparse

import smolforge


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faq", help="a file of questions and answers")
    parser.add_argument("--init", default="smollm2", help="the model to tune")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--question", default="What can I ask you?")
    parser.add_argument("--out", default="runs/faq")
    args = parser.parse_args(words)
    window = 256
    run = smolforge.train(
        "sft",
        init=args.init,
        data=args.faq,
        epochs=args.epochs,
        out=args.out,
        config={"data": {"sequence_length": window}, "training": {"tokens_per_step": 8 * window}},
    )
    model = smolforge.load(run.path)
    print(args.question)
    print(model.chat([{"role": "user", "content": args.question}], max_tokens=60, seed=1))


if __name__ == "__main__":
    main()
