"""A document that is read in pieces is scored as one: it has one end."""

from __future__ import annotations

from smolforge.evaluation import tokenize_eval_set
from smolforge.tokenizer import Tokenizer

TEXT = "A text that is cut into pieces where its lines end.\n" * 40


def test_pieces_are_one_document() -> None:
    tokenizer = Tokenizer.train([TEXT], 300)
    pieces = [TEXT[at : at + 520] for at in range(0, len(TEXT), 520)]
    whole = tokenize_eval_set([TEXT, "another"], tokenizer)
    parts = tokenize_eval_set([*((p, p is pieces[-1]) for p in pieces), ("another", True)], tokenizer)
    assert (parts.tokens == tokenizer.eos_id).sum() == (whole.tokens == tokenizer.eos_id).sum() == 3
    assert (parts.documents, parts.n_bytes) == (whole.documents, whole.n_bytes) == (2, len(TEXT) + 7)
    assert tokenizer.decode(parts.tokens.tolist()) == tokenizer.decode(whole.tokens.tolist())
    assert tokenize_eval_set([*((p, False) for p in pieces)], tokenizer, 50).documents == 1
