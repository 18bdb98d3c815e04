"""Speculative decoding: choose n-gram drafts, model drafts or none by expected speed.

The model runs drafted tokens next to the last one in a single step, and each is compared with what the sampler draws in
its place. A draw is a pure function of logits and position (`sampler.py`), so the text is the same, token for token,
with drafts or without: not only in distribution, as where drafts are accepted by chance.

N-gram drafts (prompt lookup, Saxena 2023): where the last few tokens occurred before, what followed them is proposed.
"""

from __future__ import annotations

import collections
import math
import statistics
from typing import Any

from smolforge.errors import BadInput
from smolforge.generation.draft_model import DraftModel
from smolforge.generation.runners import Runner, select_runner
from smolforge.generation.scheduler import MOST_DRAFTED
from smolforge.generation.sequence import Sequence, Work
from smolforge.tokenizer import Tokenizer

LONGEST, SHORTEST = 4, 2  # tokens that must agree; a longer agreement is tried first
ROW_COST = 0.25  # of one more row, in steps of one row (benchmarks/generation: 0.12 in fp32 to 0.35 in int4)
MEMORY = 0.15  # weight of the newest draft in the running rate
RECOVERY = 0.004  # by which the rate rises in a step without drafts, so that they are tried again
WINDOW = 31  # times of each model; their median, since a step that another program interrupted tells nothing
ENOUGH = 8  # times of each model before they are used
FORGET = 256  # steps without drafts after which the draft's times are dropped: one bad moment must not count for ever


class AcceptanceRate:
    """Running share of drafted tokens that were accepted: `value`, in [0, 1]."""

    def __init__(self, value: float = 0.6) -> None:
        self.value = value

    def learn(self, proposed: int, accepted: int) -> None:
        """Of so many drafted tokens the first `accepted` were drawn."""
        for _ in range(accepted):
            self.value += MEMORY * (1 - self.value)
        if accepted < proposed:
            self.value -= MEMORY * self.value

    def rest(self) -> None:
        """A step ran without drafts, because the rate is too low."""
        self.value = min(1.0, self.value + RECOVERY)


def row_share(running: int) -> float:
    """What one more row costs, in units of a token's own cost in a step of so many sequences."""
    return running * ROW_COST / (1 + (running - 1) * ROW_COST)


def worthwhile(rate: float, running: int) -> int:
    """How many n-gram drafts pay: the k-th is accepted with probability rate^k and costs one row of the step."""
    share = row_share(running)
    if rate <= share:
        return 0
    return MOST_DRAFTED if rate >= 1 else min(MOST_DRAFTED, int(math.log(share) / math.log(rate)))


def speed(rate: float, count: int, share: float) -> float:
    """Tokens for the cost of one without drafts: 1 with none, where each of `count` drafts costs `share` of it."""
    return sum(rate**i for i in range(count + 1)) / (1 + count * share)


def fastest(rate: float, share: float) -> int:
    """The number of drafts, 0 to MOST_DRAFTED, with the greatest `speed`; the fewest of equals."""
    return max(range(MOST_DRAFTED + 1), key=lambda count: speed(rate, count, share))


class NgramDraft:
    """N-gram drafts for one sequence; `tokens` is its list, prompt included, which grows while it is written."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens
        self._followers: dict[tuple[int, ...], int] = {}  # n-gram: the position after its last occurrence
        self._indexed = 0
        self.rate = AcceptanceRate()

    def propose(self, running: int, room: int) -> list[int]:
        """Drafts of the next tokens, at most `room`, as many as pay in a step of `running` sequences; often none."""
        self._index()
        count = min(worthwhile(self.rate.value, running), room)
        if count <= 0:
            self.rate.rest()
            return []
        for size in range(LONGEST, SHORTEST - 1, -1):
            at = self._followers.get(tuple(self._tokens[-size:]))
            if at is not None:
                period = len(self._tokens) - at  # what repeats is continued past its end
                return [self._tokens[at + i % period] for i in range(count)]
        return []

    def _index(self) -> None:
        for at in range(max(self._indexed, SHORTEST), len(self._tokens)):
            for size in range(SHORTEST, min(LONGEST, at) + 1):
                self._followers[tuple(self._tokens[at - size : at])] = at
        self._indexed = len(self._tokens)


class DraftCost:
    """The time of a step of the draft model over the time of a step of the model, of one row each.

    Decoding reads every weight once, so `bytes_ratio`, that of the weights, holds until both models have been timed.
    """

    def __init__(self, bytes_ratio: float) -> None:
        self.bytes_ratio = bytes_ratio
        self._draft: collections.deque[float] = collections.deque(maxlen=WINDOW)
        self._model: collections.deque[float] = collections.deque(maxlen=WINDOW)
        self._undrafted = 0

    @property
    def value(self) -> float:
        """The ratio, as known now."""
        if min(len(self._draft), len(self._model)) < ENOUGH:
            return self.bytes_ratio
        return statistics.median(self._draft) / statistics.median(self._model)

    def draft_took(self, rows: int, seconds: float) -> None:
        """Record a step of the draft model, its draws included."""
        self._draft.append(_one_row(rows, seconds))
        self._undrafted = 0

    def model_took(self, rows: int, seconds: float) -> None:
        """Record a step of the model, its draws included and the draft model's time not."""
        self._model.append(_one_row(rows, seconds))
        self._undrafted += 1
        if self._undrafted > FORGET:
            self._draft.clear()


def _one_row(rows: int, seconds: float) -> float:
    return seconds / (1 + (rows - 1) * ROW_COST)


class SequenceDrafts:
    """The drafts of one sequence: its n-grams, and how often a draft model's are accepted."""

    def __init__(self, tokens: list[int], model_rate: float) -> None:
        self.ngram, self.model_rate = NgramDraft(tokens), AcceptanceRate(model_rate)


class Speculation:
    """Drafts for everything that runs."""

    def __init__(self, draft: DraftModel | None = None) -> None:
        self.draft = draft
        self.cost = DraftCost(draft.bytes_ratio if draft is not None else 0.0)
        self.rate = AcceptanceRate()  # of the draft model over all texts; new texts start with it
        self.proposed = self.accepted = 0  # tokens drafted so far, and those of them that were drawn
        self._learning: dict[Sequence, list[AcceptanceRate]] = {}  # whose drafts the sequences of this step have

    def drafts_of(self, sequence: Sequence) -> SequenceDrafts:
        """The state of a sequence's drafts."""
        if sequence.drafts is None:
            sequence.drafts = SequenceDrafts(sequence.tokens, self.rate.value)
        return sequence.drafts

    def extend(self, work: Work, running: int) -> Work:
        """The chunks of a step of `running` sequences, followed by drafts where they pay; RunFailed for NaN logits."""
        found: dict[Sequence, list[int]] = {}
        asked: list[tuple[Sequence, int]] = []
        self._learning = {}
        for sequence, _ in work:
            drafts, tokens = self.drafts_of(sequence), []
            # The first token is not drafted: the last row of the prompt brings it.
            ready, room = sequence.pending == 1 and sequence.written > 0, sequence.limit - len(sequence.tokens) - 1
            if ready and room > 0:
                tokens = drafts.ngram.propose(running, room)
            if tokens:
                found[sequence], self._learning[sequence] = tokens, [drafts.ngram.rate]
            if self.draft is not None:
                room = min(room if ready else room - 1, self.draft.room(sequence))
                count = self._model_count(drafts, running, room, len(tokens))
                if count:
                    asked.append((sequence, count if ready else 0))
        if self.draft is not None and asked:
            for sequence, tokens in self.draft.propose(asked).items():
                if tokens:
                    found[sequence], self._learning[sequence] = tokens, [self.drafts_of(sequence).model_rate, self.rate]
            for rows, seconds in self.draft.timings:
                self.cost.draft_took(rows, seconds)
        if not found:
            return work
        return [(s, chunk.with_drafts(found[s]) if s in found else chunk) for s, chunk in work]

    def learn(self, sequence: Sequence, proposed: int, accepted: int) -> None:
        """Of so many drafts of the last `extend` the first `accepted` were drawn."""
        for rate in self._learning[sequence]:
            rate.learn(proposed, accepted)
        self.proposed += proposed
        self.accepted += accepted

    def took(self, work: Work, seconds: float) -> None:
        """The step over these chunks took so long, draws included and the draft model not."""
        if self.draft is not None and all(len(chunk.tokens) == 1 + chunk.drafted for _, chunk in work):
            self.cost.model_took(sum(len(chunk.tokens) for _, chunk in work), seconds)

    def _model_count(self, drafts: SequenceDrafts, running: int, room: int, looked_up: int) -> int:
        """How many drafts the draft model is asked for, given so many n-gram drafts; 0 where it would not pay."""
        if room <= 0:
            return 0
        share = row_share(running) + self.cost.value
        count = min(fastest(drafts.model_rate.value, share), room)
        if not count:
            if share < 1:  # above, no rate is high enough
                drafts.model_rate.rest()
            return 0
        # N-gram drafts cost no step of the draft model, and a draft model that is mostly right may still be faster:
        # so the choice is by the expected number of tokens for the cost.
        free = speed(drafts.ngram.rate.value, looked_up, row_share(running))
        return 0 if looked_up and free >= speed(drafts.model_rate.value, count, share) else count


def select_draft(
    module: Any, tokenizer: Tokenizer, runner: Runner, model_tokenizer: Tokenizer, *, name: str, threads: int | None
) -> tuple[DraftModel | None, list[str]]:
    """The draft model for a runner, and what was decided; None where drafts could change the text.

    Args:
        module: the draft model; `tokenizer` is its own.
        runner: of the model it drafts for; `model_tokenizer` is that model's.
        name: of the draft, for people.

    Raises:
        BadInput: the draft's token ids are not the model's.
    """
    _check_same_tokens(tokenizer, model_tokenizer)
    size, theirs = module.config.vocab_size, runner.config.vocab_size
    if size != theirs:
        problem = f"it writes {size:,} token ids and the model {theirs:,}, though their tokenizers agree"
        raise BadInput(problem, field="draft", hint="Both need the same vocab_size in their config.json.")
    if not runner.batch_invariant:
        why = f"on this engine ({runner.name}) the last bits of a row depend on the other rows"
        return None, [f"draft: {name} is not used; {why}, so drafts could change the text"]
    # Its precision changes how often it is right, never the text, so it is always the fastest that keeps the quality.
    mine, decisions = select_runner(module, "auto", threads=threads)
    draft = DraftModel(mine, _weight_bytes(mine) / _weight_bytes(runner))
    what = f"draft: {name}, {mine.name}; its weights have {draft.bytes_ratio:.2f} of the bytes of the model's"
    if not fastest(1.0, row_share(1) + draft.bytes_ratio):
        what += f"; disabled: not faster even if all {MOST_DRAFTED} drafted tokens are accepted"
    else:
        what += "; used while it is faster, and the text stays the same"
    if draft.context < runner.config.max_position_embeddings:
        what += f"; up to its own context of {draft.context:,} tokens"
    return draft, [what, *(f"draft {line}" for line in decisions if not line.startswith("engine"))]


def _check_same_tokens(draft: Tokenizer, model: Tokenizer) -> None:
    """Check that the ids of both mean the same tokens; the error says where they do not."""
    mine, theirs = (t.backend.get_vocab(with_added_tokens=True) for t in (draft, model))
    if mine == theirs:
        return
    if len(mine) != len(theirs):
        what = f"it has {len(mine):,} tokens and the model's {len(theirs):,}"
    else:
        first = min(token_id for _, token_id in mine.items() ^ theirs.items())
        what = f"token {first} is {draft.token_text(first)!r} in it and {model.token_text(first)!r} in the model's"
    hint = "A draft must have been trained with the model's own tokenizer: the same tokens under the same ids."
    raise BadInput(f"its tokenizer is not the model's: {what}", field="draft", hint=hint)


def _weight_bytes(runner: Any) -> int:
    """Bytes of the weights that a step reads, whether the runner or its module holds them."""
    return runner.weight_bytes or sum(parameter.nbytes for parameter in runner.module.parameters())
