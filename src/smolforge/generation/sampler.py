"""From logits to a token: penalties, filters, and a draw by the inverse of the cumulative distribution (inverse CDF).

The uniform number of token t of sequence i is a hash of (seed, i, t). There is no generator state, so a request's text
cannot depend on what else runs, on the order of requests, or on tokens that were drafted and rejected.

Formulas, limits and order are those of transformers' logits processors: repetition penalty, temperature, top-k, top-p,
min-p, typical. Sorting 49,152 logits takes 1 to 3 ms, as long as half a decoding step, so the filters sort only the few
tokens at the border, and a draw sums whole blocks before it looks into one.

Shapes: V vocabulary.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import struct
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from smolforge.generation.sampling_params import SamplingParams

MOST_SORTED = 1024  # weights that are sorted at once
BLOCK = 256  # tokens of which one sum or maximum is taken first
BINS_PER_NAT, MOST_BINS = 64, 8192  # of weights by their logarithm; the weights of the last bin are 0 in fp32
IMPOSSIBLE = float("-inf")


class SampledToken(NamedTuple):
    """One drawn token, with the model's own (unfiltered, temperature 1) log-probabilities if asked for."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


def uniform(seed: int, index: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, a pure function of seed, sequence and number of the token."""
    address = struct.pack("<QII", seed % 2**64, index, position)
    return (int.from_bytes(hashlib.blake2b(address, digest_size=8).digest(), "little") >> 11) * 2.0**-53


class Sampler:
    """Draws the tokens of one sequence of one request.

    Args:
        params: the request's settings.
        prompt: ids, to which the repetition penalty applies as well.
        index: of the sequence, 0 <= index < n.
        stop_token_ids: tokens that end the text, impossible before `params.min_tokens`.
    """

    def __init__(
        self, params: SamplingParams, prompt: Sequence[int], seed: int, index: int = 0,
        stop_token_ids: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self.params, self.seed, self.index = params, seed, index
        self._written: Counter[int] = Counter()
        self._seen = set(prompt) if params.repetition_penalty != 1 else set()
        self._biased = torch.tensor(list(params.logit_bias), dtype=torch.long)
        self._bias = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)
        self._forbidden = torch.tensor(list(stop_token_ids), dtype=torch.long)
        self._matcher = params.grammar.matcher() if params.grammar is not None else None

    def observe(self, token_id: int) -> None:
        """Count a token that was written."""
        self._written[token_id] += 1
        if self.params.repetition_penalty != 1:
            self._seen.add(token_id)
        if self._matcher is not None:
            self._matcher.accept(token_id)

    @property
    def cut_off(self) -> bool:
        """Whether the text ends here because its grammar could not be followed further."""
        return self._matcher is not None and self._matcher.failed

    def fork(self) -> Sampler:
        """A sampler that draws the same, and may observe drafted tokens without changing this one."""
        other, p = copy.copy(self), self.params
        # Counts grow with the text, so they are copied only where a penalty uses them.
        other._written = self._written.copy() if p.frequency_penalty or p.presence_penalty else Counter()
        other._seen = self._seen.copy()
        other._matcher = self._matcher.fork() if self._matcher is not None else None
        return other

    def uniform(self, position: int) -> float:
        """The uniform number for token number `position` of this sequence."""
        return uniform(self.seed, self.index, position)

    def sample_id(self, logits: Tensor, position: int) -> int:
        """The id of token number `position` of this sequence, drawn from logits (V,), which stay as they are."""
        scores = self.penalize(logits, position)
        if self.params.greedy:
            return int(scores.argmax())
        return draw(*self.weights(scores), self.uniform(position))

    def sample(self, logits: Tensor, position: int) -> SampledToken:
        """As `sample_id`, with the log-probabilities that were asked for."""
        token_id = self.sample_id(logits, position)
        if self.params.logprobs is None:
            return SampledToken(token_id)
        return describe(logits, token_id, self.params.logprobs)

    def penalize(self, logits: Tensor, position: int) -> Tensor:
        """Logits (V,) after penalties, bias, forbidden tokens and the grammar; a copy where any of them applies."""
        p, forbids = self.params, position < self.params.min_tokens and len(self._forbidden)
        penalizes = self._written and (p.frequency_penalty or p.presence_penalty)
        if not (self._seen or penalizes or p.logit_bias or forbids or self._matcher is not None):
            return logits
        scores = logits.clone()
        if self._seen:
            seen = torch.tensor(sorted(self._seen))
            values = scores[seen]
            scores[seen] = torch.where(values < 0, values * p.repetition_penalty, values / p.repetition_penalty)
        if penalizes:
            counts = torch.tensor(list(self._written.values()), dtype=scores.dtype)
            scores[torch.tensor(list(self._written))] -= counts * p.frequency_penalty + p.presence_penalty
        if p.logit_bias:
            scores[self._biased] += self._bias
        if forbids:
            scores[self._forbidden] = IMPOSSIBLE
        if self._matcher is not None:
            scores[torch.from_numpy(~self._matcher.allowed())] = IMPOSSIBLE
        return scores

    def weights(self, scores: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """(ids ascending, weights) of what the filters keep of scores (V,); the greatest weight is 1."""
        p = self.params
        values = scores.numpy() / np.float32(p.temperature)
        ids = _all(len(values))
        if 0 < p.top_k < len(values):
            ids = _greatest(values, p.top_k)
            values = values[ids]
        below = values - values.max()
        weights = np.exp(below)
        if p.top_p < 1:
            kept = _nucleus(below, weights, p.top_p)
            ids, weights = ids[kept], weights[kept]
        if p.min_p > 0:
            kept = np.flatnonzero(weights >= p.min_p)
            ids, weights = ids[kept], weights[kept]
        if p.typical_p < 1:
            kept = _typical(weights, p.typical_p)
            ids, weights = ids[kept], weights[kept]
        return ids, weights


def draw(ids: np.ndarray, weights: np.ndarray, u: float) -> int:
    """The id whose interval of the cumulative weights, as a share of their sum, contains u in [0, 1)."""
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
    """0 .. count - 1. Allocating memory of this size costs more than what is done with it."""
    ids = np.arange(count)
    ids.flags.writeable = False
    return ids


def _greatest(values: np.ndarray, count: int) -> np.ndarray:
    """Ids, ascending, of the `count` greatest values (V,), and of those equal to the last of them."""
    # As many blocks as have a value at least as great as `bound`, so many values are at or above it.
    tops = np.maximum.reduceat(values, np.arange(0, len(values), max(1, min(BLOCK, len(values) // count))))
    bound = np.partition(tops, len(tops) - count)[len(tops) - count]
    ids = np.flatnonzero((values >= bound) & (values > IMPOSSIBLE))
    few = values[ids]
    return ids[few >= np.partition(few, len(few) - count)[len(few) - count]] if len(few) > count else ids


def _nucleus(below: np.ndarray, weights: np.ndarray, mass: float) -> np.ndarray:
    """Top-p (Holtzman et al. 2020): indices, ascending, of the fewest greatest weights that add up to `mass`.

    Args:
        below: logarithms of the weights (V,), 0 the greatest.
        mass: share of the sum, in (0, 1).
    """
    need = mass * weights.sum(dtype=np.float64)
    ids = np.flatnonzero(weights > np.float32(1e-3))  # of a trained model's tokens a few hundred, mostly enough
    if weights[ids].sum(dtype=np.float64) >= need:
        below, weights = below[ids], weights[ids]
    else:
        ids = _all(len(weights))
    keep, rest, taken = np.zeros(len(ids), bool), _all(len(ids)), 0.0
    if len(ids) > MOST_SORTED:  # only those in the bin where the border lies have to be sorted
        bins = np.minimum(below * np.float32(-BINS_PER_NAT), MOST_BINS).astype(np.intp)
        masses = np.cumsum(np.bincount(bins, weights))
        border = min(int(np.searchsorted(masses, need)), len(masses) - 1)
        keep, rest = bins < border, np.flatnonzero(bins == border)
        taken = masses[border - 1] if border else 0.0
    rest = rest[np.argsort(-weights[rest], kind="stable")]
    before = taken + np.concatenate(([0.0], np.cumsum(weights[rest], dtype=np.float64)[:-1]))
    keep[rest[before < need]] = True
    keep[weights.argmax()] = True  # at least one, whatever `mass` is
    return ids[np.flatnonzero(keep)]  # far faster than indexing with the mask itself


def _typical(weights: np.ndarray, mass: float) -> np.ndarray:
    """Typical sampling (Meister et al. 2022): indices of the tokens whose surprise is nearest the entropy."""
    probabilities = weights / weights.sum(dtype=np.float64)
    with np.errstate(divide="ignore"):
        surprise = -np.log(probabilities)
    entropy = float((probabilities * np.where(probabilities > 0, surprise, 0)).sum())
    distance = np.abs(surprise - entropy)
    order = np.argsort(distance, kind="stable")
    reached = np.cumsum(probabilities[order])
    last = min(int((reached < mass).sum()), len(order) - 1)
    return np.flatnonzero(distance <= distance[order[last]])
