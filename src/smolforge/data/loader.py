"""The loader: a rank's share of every step's batch, made ahead in threads, in an order that threads cannot change.

Each lane is advanced by one thread at a time and has a queue of its own; a batch takes the next window of each lane
whose turn it is. A window carries the cursor at which it ended, so the cursor of a batch does not include what was made
ahead.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np

from smolforge.data.corpus import Address, Corpus, LeftOut
from smolforge.data.order import VERSION, Position, bad_rows, read_cursor, to_json
from smolforge.data.packing import Lane, Window
from smolforge.errors import BadInput
from smolforge.tokenizer import Tokenizer


@dataclass
class Batch:
    """One rank's share of the batch of one step."""

    step: int  # that this batch feeds: the number of batches before it in the stream
    tokens: np.ndarray  # int32 (S_local, L+1); inputs are [:, :-1], targets [:, 1:]
    document_ids: np.ndarray  # int32 (S_local, L+1); counts the documents within a window from 0
    # (number in the global batch, 16-byte blake2b of the tokens as little-endian int32, and of what is learned)
    digests: list[tuple[int, bytes]]
    documents: list[Address]  # of the documents with tokens in the batch, in the order of the sequences
    left_out: list[LeftOut]  # rows that could not be used, which the lanes passed on the way
    cursor: dict[str, Any]  # this rank's after this batch; JSON-able
    learned: np.ndarray | None = None  # bool (S_local, L+1): the tokens that are learned; None where all are

    @property
    def bad_rows(self) -> dict[int, int]:
        """How many rows each of this rank's lanes has left out from the beginning on; lanes without any are missing."""
        return bad_rows(self.cursor)


def data_digest(digests: Sequence[tuple[int, bytes]]) -> str:
    """Hash of a step's global batch from the digests of all ranks, in any order: 32 hex digits."""
    ordered = sorted(digests)
    if [number for number, _ in ordered] != list(range(len(ordered))):
        raise ValueError("the digests are not those of sequences 0..S-1, each once")
    return hashlib.blake2b(b"".join(digest for _, digest in ordered), digest_size=16).hexdigest()


class Loader(Iterator[Batch]):
    """Endless iterator over a rank's batches from a cursor on; a context manager.

    Sequence i of a step, g = step * S + i of all, is the next window of lane g mod lanes, and belongs to rank i mod
    world. A rank that shares a lane makes all of its windows and passes over those of the others. Lanes, seed, window
    length, workers and prefetch are those of `corpus.config`; the corpus stays open when the loader is closed.

    Args:
        sequences_per_step: S, sequences in the global batch; `world`, the number of ranks, is at most that.
        cursor: a (merged) cursor to continue from; the beginning unless given.
        skip_steps: half-open ranges [a, b) of steps that are left out: the batch after step a - 1 is that of step b.
        workers: threads instead of `data.workers`; 0 makes each batch when it is asked for.

    Raises:
        BadInput: there are more ranks than sequences, or a range of steps is empty.
        CheckpointError: the cursor is damaged or belongs to another stream.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        *,
        sequences_per_step: int,
        rank: int = 0,
        world: int = 1,
        cursor: dict[str, Any] | None = None,
        skip_steps: Sequence[tuple[int, int]] = (),
        workers: int | None = None,
    ) -> None:
        config = corpus.config
        _check_shape(sequences_per_step, rank, world, skip_steps)
        self.corpus, self.sequences, self.rank, self.world = corpus, sequences_per_step, rank, world
        self.skip_steps = merged(skip_steps)
        sources = len(corpus.specs)
        owned = lanes_of(rank, world=world, lanes=config.lanes, sequences=sequences_per_step)
        self._step, start = 0, {lane: [Position() for _ in range(sources)] for lane in owned}
        if cursor is not None:
            self._step, start = read_cursor(
                cursor, index=corpus.index_hash, seed=config.seed, lane_count=config.lanes, sources=sources
            )
            if missing := sorted(set(owned) - set(start)):
                raise BadInput(f"the data cursor lacks lanes {missing}; merge the cursors of all ranks first")
        threads = config.workers if workers is None else workers
        self._cursors = {lane: to_json(start[lane]) for lane in owned}
        self._bad_rows = {lane: rows for lane, rows in bad_rows(cursor).items() if lane in owned}
        self._lanes = {lane: Lane(corpus, tokenizer, lane, start[lane], read_ahead=threads > 0) for lane in owned}
        self._prefetch: _Prefetch | None = None
        self._future: Future[Batch] | None = None
        if threads:
            depth = max(-(-config.prefetch * sequences_per_step // config.lanes), 1)
            first = self._step * sequences_per_step
            order = sorted(owned, key=lambda lane: (lane - first) % config.lanes)
            makers = {lane: self._lanes[lane].next for lane in order}
            self._prefetch = _Prefetch(makers, threads=min(threads, len(owned)), depth=depth)

    def __next__(self) -> Batch:
        if self._future is not None:
            future, self._future = self._future, None
            return future.result()
        return self._make()

    def wait(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds; whether `next` will now answer at once (with a batch or an error).

        Without workers the batch is made in this call; if a source is remote, in a thread, so that the caller can poll.
        """
        if self._prefetch is not None:
            end = time.monotonic() + timeout
            while self._prefetch.wait(self._needed(), max(end - time.monotonic(), 0)):
                if self._step == self._next_step() or self._prefetch.failed.keys() & self._needed():
                    return True
                self._pass_over()
            return False
        if self._future is None:
            self._future = Future()
            if self.corpus.remote:
                threading.Thread(target=_fulfil, args=(self._future, self._make), daemon=True).start()
            else:
                _fulfil(self._future, self._make)
        return bool(wait([self._future], timeout).done)

    def close(self) -> None:
        """Stop making batches. A thread in the middle of reading finishes in the background."""
        if self._prefetch is not None:
            self._prefetch.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _turns(self, step: int) -> list[tuple[int, int]]:
        """(number in the global batch, lane) of a step's sequences in this rank's lanes, also of other ranks'."""
        lanes, first = self.corpus.config.lanes, step * self.sequences
        numbered = ((i, (first + i) % lanes) for i in range(self.sequences))
        return [(i, lane) for i, lane in numbered if lane in self._lanes]

    def _needed(self) -> Counter[int]:
        """Windows of each lane in the batch of the current step."""
        return Counter(lane for _, lane in self._turns(self._step))

    def _pass_over(self) -> None:
        """Skip the current step."""
        for _, lane in self._turns(self._step):
            self._window(lane)
        self._step += 1

    def _next_step(self) -> int:
        step = self._step
        for a, b in self.skip_steps:
            step = b if a <= step < b else step
        return step

    def _window(self, lane: int) -> Window:
        window = self._prefetch.take(lane) if self._prefetch is not None else self._lanes[lane].next()
        self._cursors[lane] = window.cursor
        if window.left_out:
            self._bad_rows[lane] = self._bad_rows.get(lane, 0) + len(window.left_out)
        return window

    def _make(self) -> Batch:
        wanted = self._next_step()
        while self._step < wanted:
            self._pass_over()
        made = [(i, self._window(lane)) for i, lane in self._turns(wanted)]
        numbers, windows = zip(*[(i, window) for i, window in made if i % self.world == self.rank], strict=True)
        self._step += 1
        masks = [window.learned for window in windows if window.learned is not None]
        learned = (mask.tobytes() for mask in masks) if masks else itertools.repeat(b"")
        contents = (w.tokens.astype("<i4").tobytes() + mask for w, mask in zip(windows, learned, strict=False))
        hashes = [hashlib.blake2b(content, digest_size=16).digest() for content in contents]
        config = self.corpus.config
        cursor = {
            "version": VERSION,
            "step": self._step,
            "index": self.corpus.index_hash,
            "seed": config.seed,
            "lane_count": config.lanes,
            "lanes": {str(lane): positions for lane, positions in sorted(self._cursors.items())},
        }
        if self._bad_rows:
            cursor["bad_rows"] = {str(lane): rows for lane, rows in sorted(self._bad_rows.items())}
        return Batch(
            step=wanted,
            tokens=np.stack([window.tokens for window in windows]),
            document_ids=np.stack([window.document_ids for window in windows]),
            digests=list(zip(numbers, hashes, strict=True)),
            documents=list(dict.fromkeys(address for window in windows for address in window.documents)),
            left_out=[row for _, window in made for row in window.left_out],
            cursor=cursor,
            learned=np.stack(masks) if masks else None,
        )


def lanes_of(rank: int, *, world: int, lanes: int, sequences: int) -> range:
    """The lanes that hold a rank's sequences, of `sequences` in a step; ranks equal mod gcd of the three share them."""
    groups = gcd(world, lanes, sequences)
    return range(rank % groups, lanes, groups)


def merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The numbers in half-open ranges as ranges that do not touch, in order: (5, 7), (2, 6) → (2, 7)."""
    found: list[tuple[int, int]] = []
    for first, end in sorted((a, b) for a, b in ranges):
        if found and first <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((first, end))
    return found


def _check_shape(sequences: int, rank: int, world: int, skips: Iterable[tuple[int, int]]) -> None:
    if sequences < 1:
        raise BadInput(f"a step needs at least one sequence, not {sequences}", field="training.tokens_per_step")
    if not 0 <= rank < world:
        raise BadInput(f"rank {rank} of {world}")
    if sequences < world:
        problem = f"a step has {sequences} sequences, too few for {world} processes"
        raise BadInput(problem, field="training.tokens_per_step", hint=f"Start at most {sequences} processes.")
    for a, b in skips:
        if not 0 <= a < b:
            hint = "Write FIRST:END; END itself is trained on."
            raise BadInput(f"{a}:{b} is not a range of steps", field="--skip-steps", hint=hint)


class _Prefetch:
    """Keeps `depth` windows of each lane ready; `makers` gives them, in the order in which lanes are needed first."""

    def __init__(self, makers: Mapping[int, Callable[[], Window]], *, threads: int, depth: int) -> None:
        self._makers = makers
        self._ready: dict[int, deque[Window]] = {lane: deque() for lane in makers}
        self._wanted = deque(list(makers) * depth)  # a lane for each window that is to be made
        self._busy: set[int] = set()  # lanes that a thread is advancing
        self.failed: dict[int, BaseException] = {}
        self._closed = False
        self._changed = threading.Condition()
        names = [f"smolforge-data-{i}" for i in range(threads)]
        self._threads = [threading.Thread(target=self._work, name=name, daemon=True) for name in names]
        for thread in self._threads:
            thread.start()

    def take(self, lane: int) -> Window:
        """The next window of a lane, waited for; raises what its maker raised, and the lane stays at its error."""
        ready = self._ready[lane]
        with self._changed:
            self._changed.wait_for(lambda: ready or lane in self.failed)
            if not ready:
                raise self.failed[lane]
            self._wanted.append(lane)
            self._changed.notify_all()
            return ready.popleft()

    def wait(self, needed: Mapping[int, int], timeout: float) -> bool:
        """Wait until each lane has as many windows as needed (or an error), or for `timeout` seconds."""
        with self._changed:
            for lane, count in needed.items():
                coming = len(self._ready[lane]) + self._wanted.count(lane) + (lane in self._busy)
                self._wanted.extend([lane] * (count - coming))
            self._changed.notify_all()
            return self._changed.wait_for(
                lambda: all(len(self._ready[lane]) >= n or lane in self.failed for lane, n in needed.items()), timeout
            )

    def close(self, timeout: float = 2.0) -> None:
        """Stop; threads in the middle of something have `timeout` seconds to finish."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        end = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(end - time.monotonic(), 0))

    def _free(self) -> int | None:
        """The lane that is wanted first of those that no thread is advancing."""
        return next((lane for lane in self._wanted if lane not in self._busy and lane not in self.failed), None)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._free() is not None)
                lane = self._free()
                if self._closed or lane is None:
                    return
                self._wanted.remove(lane)
                self._busy.add(lane)
            try:
                made: Window | BaseException = self._makers[lane]()
            except BaseException as error:
                made = error
            with self._changed:
                if isinstance(made, BaseException):
                    self.failed[lane] = made
                else:
                    self._ready[lane].append(made)
                self._busy.discard(lane)
                self._changed.notify_all()


def _fulfil(future: Future[Any], make: Callable[[], Any]) -> None:
    try:
        future.set_result(make())
    except BaseException as error:
        future.set_exception(error)


def batch_of_step(
    corpus: Corpus,
    tokenizer: Tokenizer,
    cursor: dict[str, Any] | None,
    step: int,
    *,
    sequences_per_step: int,
    skip_steps: Sequence[tuple[int, int]] = (),
) -> Batch:
    """The batch of a step (from 0), with the documents that fed it.

    Everything is the run's: its `cursor`, (merged) at or before the step, None for the beginning, and its `skip_steps`.

    Raises:
        BadInput: the cursor is after the step, or the run skipped the step.
    """
    begin = cursor["step"] if cursor else 0
    if step < begin:
        raise BadInput(f"step {step} comes before the cursor's step {begin}", field="--step")
    if any(a <= step < b for a, b in skip_steps):
        raise BadInput(f"step {step} was skipped by the run", field="--step")
    # The steps between are skipped like any range: their windows are made, their batches are not.
    passed = [(begin, step)] if begin < step else []
    with Loader(
        corpus, tokenizer, sequences_per_step=sequences_per_step, cursor=cursor, skip_steps=passed, workers=0
    ) as loader:
        return next(loader)
