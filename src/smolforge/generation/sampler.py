"""From logits to a token: one uniform number per token, looked up in the cumulative distribution.

The uniform of token t of choice c is a hash of (seed, c, t). There is no generator state, so a request's
text cannot depend on what else runs, on the order of requests, or on tokens that were drafted and thrown away.

Sorting 49,152 logits costs 3 ms, as long as half a token of the model, so the filters are applied without sorting
more than the few that lie at the border (`_kept`). They keep the same tokens as `processors.chain` does.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import struct
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from smolforge.generation import processors
from smolforge.generation.sampling import Sampling

FEW = 1024  # weights that are sorted at once
NO_TOP: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Picked:
    """One drawn token, with the model's own (unfiltered, temperature 1) log-probabilities if asked for."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = NO_TOP


def uniform(seed: int, choice: int, index: int) -> float:
    """A number in [0, 1) that is a pure function of its address, with 53 random bits."""
    address = struct.pack("<QII", seed % 2**64, choice, index)
    return (int.from_bytes(hashlib.blake2b(address, digest_size=8).digest(), "little") >> 11) * 2.0**-53


class Sampler:
    """Draws the tokens of one choice of one request.

    Args:
        sampling: the request's settings.
        prompt: ids of the prompt, which the repetition penalty sees.
        seed: of the request.
        choice: index of the continuation, 0 <= choice < n.
        end_ids: tokens that end the text, impossible before `sampling.min_tokens`.
    """

    def __init__(
        self, sampling: Sampling, prompt: Sequence[int], seed: int, choice: int = 0, end_ids: Sequence[int] = ()
    ) -> None:
        self.sampling = sampling
        self.seed, self.choice = seed, choice
        self._written: Counter[int] = Counter()
        self._seen = set(prompt) if sampling.repetition_penalty != 1 else set()
        self._bias = processors.bias(sampling.logit_bias) if sampling.logit_bias else None
        self._forbid = processors.forbid(list(end_ids)) if end_ids and sampling.min_tokens else None
        self._chain = processors.chain(sampling)

    def observe(self, token_id: int) -> None:
        """Count a token that was really written."""
        self._written[token_id] += 1
        if self.sampling.repetition_penalty != 1:
            self._seen.add(token_id)

    def ahead(self) -> Sampler:
        """One that draws the same from the same logits, and may observe guesses: this one never hears of them."""
        other, s = copy.copy(self), self.sampling
        # Counts grow with the text, so they are copied only where a penalty looks at them.
        other._written = self._written.copy() if s.frequency_penalty or s.presence_penalty else Counter()
        other._seen = self._seen.copy()
        return other

    def choose(self, logits: Tensor, index: int) -> int:
        """The id of token number `index` of this choice, drawn from logits (V,), which are left as they are."""
        scores = self._penalise(logits, index)
        if self.sampling.greedy:
            return int(scores.argmax())
        return draw(*self.distribution(scores), uniform(self.seed, self.choice, index))

    def pick(self, logits: Tensor, index: int) -> Picked:
        """As `choose`, with the log-probabilities that were asked for."""
        token_id = self.choose(logits, index)
        if self.sampling.logprobs is None:
            return Picked(token_id)
        return describe(logits, token_id, self.sampling.logprobs)

    def distribution(self, scores: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """(ids ascending, probabilities in float64) of the tokens that the filters keep of scores (V,)."""
        if self.sampling.typical_p < 1:
            for process in self._chain:
                scores = process(scores)
            values = scores.numpy()
            ids = np.flatnonzero(values > processors.NEVER)
        else:
            values = scores.numpy() / np.float32(self.sampling.temperature)
            ids = _kept(values, self.sampling)
        weights = values[ids].astype(np.float64)
        weights = np.exp(weights - weights.max())
        return ids, weights / weights.sum()

    def _penalise(self, scores: Tensor, index: int) -> Tensor:
        s = self.sampling
        if s.repetition_penalty != 1 and self._seen:
            scores = processors.repetition(scores, torch.tensor(sorted(self._seen)), s.repetition_penalty)
        if (s.frequency_penalty or s.presence_penalty) and self._written:
            ids = torch.tensor(list(self._written))
            counts = torch.tensor(list(self._written.values()), dtype=scores.dtype)
            scores = processors.frequency_and_presence(scores, ids, counts, s.frequency_penalty, s.presence_penalty)
        if self._bias is not None:
            scores = self._bias(scores)
        if self._forbid is not None and index < s.min_tokens:
            scores = self._forbid(scores)
        return scores


def draw(ids: np.ndarray, probabilities: np.ndarray, u: float) -> int:
    """The id whose interval of the cumulative distribution holds u in [0, 1)."""
    cumulative = np.cumsum(probabilities)
    position = int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))
    return int(ids[min(position, len(ids) - 1)])


def describe(logits: Tensor, token_id: int, top: int) -> Picked:
    """A token with its log-probability and the `top` likeliest alternatives, under plain softmax of logits (V,)."""
    total = torch.logsumexp(logits, -1)
    best = torch.topk(logits, top) if top else None
    alternatives = zip(best.indices.tolist(), (best.values - total).tolist(), strict=True) if best else ()
    return Picked(token_id, float(logits[token_id] - total), tuple(alternatives))


def _kept(values: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Ids, ascending, that top-k, top-p and min-p keep of the scores after temperature (V,)."""
    least = np.float32(processors.NEVER)
    if 0 < sampling.top_k < len(values):
        least = torch.topk(torch.from_numpy(values), sampling.top_k).values[-1].numpy()  # ties with it stay
    keep = values >= least if least > processors.NEVER else values > least
    if sampling.top_p < 1:
        keep = _nucleus(np.exp(values - values.max()) * keep, sampling.top_p)
    if sampling.min_p > 0:
        keep &= values >= values.max() + np.log(sampling.min_p)
    return np.flatnonzero(keep)


def _nucleus(weights: np.ndarray, mass: float) -> np.ndarray:
    """Which of the weights (V,), 1 the greatest, are the fewest greatest that make up `mass` of their sum; (V,) bool.

    The border lies between two weights, `top` and `floor`. `floor` goes down from 1 by a factor until enough lies
    above it, then the factor shrinks, until what lies between them is few enough to be sorted.
    """
    need = mass * weights.sum(dtype=np.float64)
    top, taken, floor, factor = 1.0, 0.0, 0.0, 0.08  # taken: the mass above top
    while top > 1e-30 and factor < 0.999:
        above = weights > np.float32(top * factor)
        within = (weights * above).sum(dtype=np.float64)
        if within < need:
            top, taken = top * factor, within
            continue
        floor, factor = top * factor, factor**0.5
        if np.count_nonzero(above) - np.count_nonzero(weights > np.float32(top)) <= FEW:
            break
    keep = weights > np.float32(top)
    rest = np.flatnonzero((weights > np.float32(floor)) & ~keep)
    rest = rest[np.argsort(-weights[rest], kind="stable")]
    before = taken + np.concatenate(([0.0], np.cumsum(weights[rest], dtype=np.float64)[:-1]))
    keep[rest[before < need]] = True
    keep[weights.argmax()] = True  # one at least, whatever `mass` is
    return keep
