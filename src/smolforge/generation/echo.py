"""The prompt reported back, token by token, with what the model thought of each."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from smolforge.generation.detokenizer import Decoder
from smolforge.generation.sampler import SampledToken, describe


class Echo:
    """Reports a prompt's tokens as far as the model has read them.

    Args:
        prompt: token ids.
        decoder: a fresh stream decoder.
        top: how many alternatives to report, or None for no log-probabilities.
    """

    def __init__(self, prompt: list[int], decoder: Decoder, top: int | None) -> None:
        self._prompt, self._decoder, self._top = prompt, decoder, top
        self._at = 0
        self._follows: Tensor | None = None  # the logits that the last token read left for the next

    def report(self, upto: int, logits: Tensor | None = None) -> Iterator[tuple[SampledToken, str]]:
        """Tokens up to position `upto`, each with its text; the first has no log-probability.

        Args:
            logits: (upto - tokens reported, V), row i after the i-th of these tokens; None without logprobs.
        """
        first = self._at
        while self._at < upto:
            token_id, picked = self._prompt[self._at], None
            if logits is not None and self._top is not None:
                if self._follows is not None:
                    picked = describe(self._follows, token_id, self._top)
                self._follows = logits[self._at - first]
            text = self._decoder.push(token_id)
            self._at += 1
            if self._at == len(self._prompt):
                text += self._decoder.flush()
            yield picked or SampledToken(token_id), text
