"""Which documents fed a step: the stream replayed from a cursor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from smolforge.data.corpus import Corpus
from smolforge.data.document import Address
from smolforge.data.loader import Loader
from smolforge.data.packing import Encoder
from smolforge.errors import BadInput


def which(
    corpus: Corpus,
    tokenizer: Encoder,
    cursor: dict[str, Any] | None,
    step: int,
    *,
    sequences_per_step: int,
    skip_steps: Sequence[tuple[int, int]] = (),
) -> list[Address]:
    """Addresses of the documents whose tokens fed a step, in the order of its sequences.

    Args:
        corpus: the run's corpus.
        tokenizer: the run's tokenizer; document borders fall by its tokens.
        cursor: the run's (merged) cursor at or before the step; the beginning where None.
        step: number of the step, from 0.
        sequences_per_step: S of the run.
        skip_steps: what the run left out.

    Raises:
        BadInput: the cursor lies behind the step, or the run left the step out.
        SmolforgeError: as `Loader`.
    """
    if step < 0 or (cursor is not None and cursor.get("step", 0) > step):
        raise BadInput(f"step {step} lies before the cursor's step {cursor['step'] if cursor else 0}", field="--step")
    if any(a <= step < b for a, b in skip_steps):
        raise BadInput(f"step {step} was left out of the run", field="--step")
    # Passing over the steps between costs no batches: they are left out like any skipped range.
    begin = cursor["step"] if cursor else 0
    with Loader(
        corpus,
        tokenizer,
        sequences_per_step=sequences_per_step,
        cursor=cursor,
        skip_steps=[(begin, step)] if begin < step else [],
        workers=0,
    ) as loader:
        return next(loader).documents
