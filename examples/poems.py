"""A model of poems, with a tokenizer that is trained on them.

    python examples/poems.py poems/ --vocabulary 2000

A small vocabulary keeps more of a small model for the poems themselves. The line that a poem begins with decides what
follows, so attention stays within one poem (data.mask_documents, as in the preset).
"""

from __future__ import annotations

import argparse

import smolforge


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("poems", help="a file or folder; in one file, poems are separated by <|endoftext|>")
    parser.add_argument("--vocabulary", type=int, default=2000, help="tokens of the tokenizer")
    parser.add_argument("--epochs", type=float, default=8)
    parser.add_argument("--out", default="runs/poems")
    args = parser.parse_args(words)
    size = {"vocab_size": args.vocabulary}
    run = smolforge.train(
        "pocket",
        data=args.poems,
        epochs=args.epochs,
        out=args.out,
        config={"model": size, "tokenizer": {"train": size}},
    )
    model = smolforge.load(run.path)
    print(f"{model.tokenizer.vocab_size:,} tokens, such as {model.tokenizer.decode(range(600, 612))!r}")
    for poem in model.generate(["The", "O", "My love"], max_tokens=80, temperature=0.7, seed=1):
        print("---", poem, sep="\n")


if __name__ == "__main__":
    main()
