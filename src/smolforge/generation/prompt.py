"""A prompt as the engine takes it: text or token ids, checked before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from smolforge.errors import BadInput

if TYPE_CHECKING:
    from smolforge.tokenizer import Tokenizer


Prompt = str | Sequence[int]  # text, or token ids


def prompt_ids(prompt: Prompt, tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """The ids of a prompt, at least one, all below `vocab_size`.

    Args:
        prompt: text, in which special tokens are only text, or token ids.

    Raises:
        BadInput: it is empty, or holds what is no token id of the model.
    """
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt)
    else:
        ids = list(prompt)
        for token_id in ids:
            if isinstance(token_id, bool) or not isinstance(token_id, int):
                raise BadInput(f"token ids are whole numbers, not {token_id!r}", field="prompt")
    if not ids:
        raise BadInput("is empty", field="prompt", hint="Give at least one token to begin with.")
    for token_id in ids:
        if not 0 <= token_id < vocab_size:
            raise BadInput(
                f"token {token_id} is not in the vocabulary of {vocab_size}",
                field="prompt",
                hint=f"Token ids go from 0 to {vocab_size - 1}.",
            )
    return ids
