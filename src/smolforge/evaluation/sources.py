"""The score of a model on sources of text, as of `smolforge eval`."""

from __future__ import annotations

from dataclasses import dataclass

from smolforge.config import DataConfig
from smolforge.data import Corpus
from smolforge.errors import BadInput
from smolforge.evaluation.loss import EvalSlice, Score, evaluate, tokenize_eval_set
from smolforge.model.architecture import CausalLM
from smolforge.tokenizer import Tokenizer

LONGEST = 2048  # context in tokens unless another is given


@dataclass(frozen=True)
class SourceScore:
    """A score, the text that was scored, the length of its windows, and the entropy of the source where it is known."""

    score: Score
    text: EvalSlice
    length: int
    entropy_bits_per_byte: float | None


def score_sources(
    model: CausalLM, tokenizer: Tokenizer, sources: dict[str, float], *,
    tokens: int, length: int | None = None, held_out: bool = False, text_column: str = "text",
) -> SourceScore:  # fmt: skip
    """Score the mixture of some sources by their weights; rows that cannot be read are told and left out.

    Args:
        tokens: maximum number of tokens to score.
        length: context in tokens; the model's, at most `LONGEST`, unless given.
        held_out: only the documents that training never sees.

    Raises:
        DataError: a source is missing or has no text.
        BadInput: the model has no context of that length.
    """
    positions = model.config.max_position_embeddings
    length = min(positions, LONGEST) if length is None else length
    if not 1 <= length <= positions:
        raise BadInput(f"{length} does not fit the model's {positions} positions", field="length")
    config = DataConfig(sources=sources, text_column=text_column, on_error="skip")
    with Corpus.open(config) as corpus:
        texts = corpus.parts(held_out=True if held_out else None)
        text, entropy = tokenize_eval_set(texts, tokenizer, tokens), corpus.entropy_bits_per_byte
    windows = -(-(len(text.tokens) - 1) // length)
    length = min(length, len(text.tokens) - 1)
    return SourceScore(evaluate(model, text, length=length, batch=min(4, windows)), text, length, entropy)
