"""From logits to a token: one uniform number per token, looked up in the cumulative distribution.

The uniform of token t of choice c is a hash of (seed, c, t). There is no generator state, so a request's
text cannot depend on what else runs, on the order of requests, or on tokens that were drafted and thrown away.

Sorting 49,152 logits costs 1 to 3 ms, as long as half a token of the model, so the filters sort only the few that lie
at the border, and a draw sums whole blocks before it looks into one. They keep the same tokens as `processors.chain`.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import struct
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from smolforge.generation import processors
from smolforge.generation.sampling_params import SamplingParams

FEW = 1024  # weights that are sorted at once
BLOCK = 256  # tokens that are looked at as one first
BINS_PER_NAT, MOST_BINS = 64, 8192  # of weights by their logarithm; the last one's are 0 in fp32
NO_TOP: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class SampledToken:
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
        self, sampling: SamplingParams, prompt: Sequence[int], seed: int, choice: int = 0, end_ids: Sequence[int] = ()
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
        return draw(*self.weights(scores), uniform(self.seed, self.choice, index))

    def pick(self, logits: Tensor, index: int) -> SampledToken:
        """As `choose`, with the log-probabilities that were asked for."""
        token_id = self.choose(logits, index)
        if self.sampling.logprobs is None:
            return SampledToken(token_id)
        return describe(logits, token_id, self.sampling.logprobs)

    def weights(self, scores: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """(ids ascending, weights) of what the filters keep of scores (V,); the greatest weighs 1, the impossible 0."""
        s = self.sampling
        if s.typical_p < 1:
            for process in self._chain:
                scores = process(scores)
            values = scores.numpy()
            ids = np.flatnonzero(values > processors.NEVER)
            values = values[ids]
            return ids, np.exp(values - values.max())
        values = scores.numpy() / np.float32(s.temperature)
        ids = _all(len(values))
        if 0 < s.top_k < len(values):
            ids = _greatest(values, s.top_k)
            values = values[ids]
        below = values - values.max()
        weights = np.exp(below)
        if s.top_p < 1:
            kept = _nucleus(below, weights, s.top_p)
            ids, weights = ids[kept], weights[kept]
        if s.min_p > 0:
            kept = np.flatnonzero(weights >= s.min_p)
            ids, weights = ids[kept], weights[kept]
        return ids, weights

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


def draw(ids: np.ndarray, weights: np.ndarray, u: float) -> int:
    """The id whose interval of the cumulative weights, taken as a share of their sum, holds u in [0, 1)."""
    blocks = np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), BLOCK), dtype=np.float64))
    wanted = u * blocks[-1]
    block = min(int(np.searchsorted(blocks, wanted, side="right")), len(blocks) - 1)
    inside = weights[block * BLOCK : (block + 1) * BLOCK]
    cumulative = np.cumsum(inside, dtype=np.float64) + (blocks[block - 1] if block else 0.0)
    # The two sums round differently: what lies behind the last interval belongs to it, not to a weight of 0.
    last = int(np.flatnonzero(inside)[-1])
    return int(ids[block * BLOCK + min(int(np.searchsorted(cumulative, wanted, side="right")), last)])


def describe(logits: Tensor, token_id: int, top: int) -> SampledToken:
    """A token with its log-probability and the `top` likeliest alternatives, under plain softmax of logits (V,)."""
    total = torch.logsumexp(logits, -1)
    best = torch.topk(logits, top) if top else None
    alternatives = zip(best.indices.tolist(), (best.values - total).tolist(), strict=True) if best else ()
    return SampledToken(token_id, float(logits[token_id] - total), tuple(alternatives))


@functools.lru_cache(8)
def _all(count: int) -> np.ndarray:
    """0 .. count - 1. New memory of this size costs more than what is done with it."""
    ids = np.arange(count)
    ids.flags.writeable = False
    return ids


def _greatest(values: np.ndarray, count: int) -> np.ndarray:
    """Ids, ascending, of the `count` greatest values (V,), and of those equal to the last of them."""
    # As many blocks as hold a value at least as great as `bound`, so many values lie at or above it.
    tops = np.maximum.reduceat(values, np.arange(0, len(values), max(1, min(BLOCK, len(values) // count))))
    bound = np.partition(tops, len(tops) - count)[len(tops) - count]
    ids = np.flatnonzero((values >= bound) & (values > processors.NEVER))
    few = values[ids]
    return ids[few >= np.partition(few, len(few) - count)[len(few) - count]] if len(few) > count else ids


def _nucleus(below: np.ndarray, weights: np.ndarray, mass: float) -> np.ndarray:
    """Indices, ascending, of the fewest greatest weights (V,) that make up `mass` of their sum.

    Args:
        below: logarithms of the weights, 0 the greatest.
        weights: their exponentials.
        mass: in (0, 1).
    """
    need = mass * weights.sum(dtype=np.float64)
    ids = np.flatnonzero(weights > np.float32(1e-3))  # of a trained model's tokens a few hundred, mostly enough
    if weights[ids].sum(dtype=np.float64) >= need:
        below, weights = below[ids], weights[ids]
    else:
        ids = _all(len(weights))
    keep, rest, taken = np.zeros(len(ids), bool), _all(len(ids)), 0.0
    if len(ids) > FEW:  # only those in the bin where the border lies have to be sorted
        bins = np.minimum(below * np.float32(-BINS_PER_NAT), MOST_BINS).astype(np.intp)
        masses = np.cumsum(np.bincount(bins, weights))
        border = min(int(np.searchsorted(masses, need)), len(masses) - 1)
        keep, rest = bins < border, np.flatnonzero(bins == border)
        taken = masses[border - 1] if border else 0.0
    rest = rest[np.argsort(-weights[rest], kind="stable")]
    before = taken + np.concatenate(([0.0], np.cumsum(weights[rest], dtype=np.float64)[:-1]))
    keep[rest[before < need]] = True
    keep[weights.argmax()] = True  # one at least, whatever `mass` is
    return ids[np.flatnonzero(keep)]  # far faster than by the mask itself
