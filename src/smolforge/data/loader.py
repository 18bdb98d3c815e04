"""The loader: a rank's share of every step's batch, made ahead in threads, in an order threads cannot change.

Each lane is made by one thread at a time and waits in a queue of its own; a batch takes the next window of each
lane whose turn it is. Windows carry the cursor that stood when they were cut, so the cursor of a batch knows
nothing of what was made ahead.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np

from smolforge.data.corpus import Corpus
from smolforge.data.cursor import VERSION, Cursor, LaneCursor
from smolforge.data.document import Address
from smolforge.data.packing import Encoder, Lane, Window
from smolforge.data.prefetch import Prefetch
from smolforge.errors import BadInput


@dataclass
class Batch:
    """One rank's share of the batch of one step.

    Attributes:
        step: the step that this batch feeds: the number of batches before it in the stream.
        tokens: int32 (S_local, L+1); inputs are [:, :-1], targets [:, 1:].
        document_ids: int32 (S_local, L+1); counts the documents within a window from 0.
        digests: (number of the sequence in the global batch, 16-byte blake2b of its tokens as little-endian int32).
        documents: addresses of the documents with tokens in the batch, in the order of the sequences.
        cursor: this rank's cursor after this batch; JSON-able.
    """

    step: int
    tokens: np.ndarray
    document_ids: np.ndarray
    digests: list[tuple[int, bytes]]
    documents: list[Address]
    cursor: dict[str, Any]


def data_digest(digests: Sequence[tuple[int, bytes]]) -> str:
    """Hash of a step's global batch from the digests of all ranks, in any order: 32 hex digits.

    Raises:
        ValueError: a sequence is missing or there twice.
    """
    ordered = sorted(digests)
    if [number for number, _ in ordered] != list(range(len(ordered))):
        raise ValueError("the digests are not those of sequences 0..S-1, each once")
    return hashlib.blake2b(b"".join(digest for _, digest in ordered), digest_size=16).hexdigest()


class Loader(Iterator[Batch]):
    """Endless iterator over a rank's batches from a cursor on; a context manager.

    Global sequence g = step * S + i belongs to lane g mod lanes, and lane l to rank l mod world. Lanes, seed,
    window length, workers and prefetch are those of `corpus.config`.

    Args:
        corpus: where documents come from; it stays open when the loader is closed.
        tokenizer: anything with `encode_batch` and `eos_id`.
        sequences_per_step: S, sequences in the global batch.
        rank: of this process.
        world: number of ranks; divides the lanes and S.
        cursor: a (merged) cursor to go on from; the beginning unless given.
        skip_steps: half-open ranges [a, b) of steps that are left out: their tokens are passed over, and the
            batch after step a - 1 is that of step b.
        workers: threads instead of `data.workers`; 0 makes each batch when it is asked for.

    Raises:
        BadInput: the numbers do not divide, or a range is no range.
        CheckpointError: the cursor is damaged or belongs to another stream.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Encoder,
        *,
        sequences_per_step: int,
        rank: int = 0,
        world: int = 1,
        cursor: dict[str, Any] | None = None,
        skip_steps: Sequence[tuple[int, int]] = (),
        workers: int | None = None,
    ) -> None:
        config = corpus.config
        _check_shape(config.lanes, sequences_per_step, rank, world, skip_steps)
        self.corpus, self.sequences, self.rank, self.world = corpus, sequences_per_step, rank, world
        self.skip_steps = [(a, b) for a, b in skip_steps]
        sources = len(corpus.specs)
        owned = range(rank, config.lanes, world)
        start = Cursor(0, corpus.index_hash, config.seed, config.lanes)
        if cursor is not None:
            start = Cursor.of_json(
                cursor, index=corpus.index_hash, seed=config.seed, lane_count=config.lanes, sources=sources
            )
            missing = sorted(set(owned) - set(start.lanes))
            if missing:
                raise BadInput(f"the data cursor lacks lanes {missing}; merge the cursors of all ranks first")
        threads = config.workers if workers is None else workers
        self._step = start.step
        self._cursors: dict[int, list[list[int]]] = {}
        lanes: dict[int, Lane] = {}
        for lane in owned:
            state = start.lanes.get(lane) or LaneCursor.start(sources)
            self._cursors[lane] = state.to_json()
            lanes[lane] = Lane(corpus, tokenizer, lane, state, ahead=threads > 0)
        self._lanes = lanes
        self._prefetch: Prefetch[Window] | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._future: Future[Batch] | None = None
        if threads:
            depth = max(-(-config.prefetch * sequences_per_step // config.lanes), 1)
            first = self._step * sequences_per_step
            self._prefetch = Prefetch(
                {lane: each.next for lane, each in lanes.items()},
                threads=min(threads, len(lanes)),
                depth=depth,
                order=sorted(lanes, key=lambda lane: (lane - first) % config.lanes),
            )

    def __next__(self) -> Batch:
        if self._future is not None:
            future, self._future = self._future, None
            return future.result()
        return self._make()

    def wait(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds; whether `next` will now answer at once (with a batch or an error).

        Without workers the batch is made in here, unless a source is remote: then one thread makes it on
        demand, so that a silent network does not keep the caller from looking at its signals.
        """
        if self._prefetch is not None:
            end = time.monotonic() + timeout
            while self._prefetch.wait(self._needed(), max(end - time.monotonic(), 0)):
                if self._step == self._next_step() or self._prefetch.failed(self._needed()):
                    return True
                self._pass_over()
            return False
        if self._future is None:
            if self.corpus.remote:
                self._pool = self._pool or ThreadPoolExecutor(1, "smolforge-data")
                self._future = self._pool.submit(self._make)
            else:
                self._future = Future()
                try:
                    self._future.set_result(self._make())
                except Exception as error:
                    self._future.set_exception(error)
        return bool(wait([self._future], timeout).done)

    def close(self) -> None:
        """Stop making batches. A thread that is just reading finishes in the background."""
        if self._prefetch is not None:
            self._prefetch.close()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _mine(self, step: int) -> list[tuple[int, int]]:
        """(number in the global batch, lane) of this rank's sequences of a step."""
        lanes, first = self.corpus.config.lanes, step * self.sequences
        numbered = ((i, (first + i) % lanes) for i in range(self.sequences))
        return [(i, lane) for i, lane in numbered if lane % self.world == self.rank]

    def _needed(self) -> dict[int, int]:
        """Windows of each lane in the batch of the present step."""
        return dict(Counter(lane for _, lane in self._mine(self._step)))

    def _pass_over(self) -> None:
        """Leave the present step out."""
        for _, lane in self._mine(self._step):
            self._window(lane)
        self._step += 1

    def _next_step(self) -> int:
        step, moved = self._step, True
        while moved:
            moved = False
            for a, b in self.skip_steps:
                if a <= step < b:
                    step, moved = b, True
        return step

    def _window(self, lane: int) -> Window:
        window = self._prefetch.take(lane) if self._prefetch is not None else self._lanes[lane].next()
        self._cursors[lane] = window.cursor
        return window

    def _make(self) -> Batch:
        wanted = self._next_step()
        while self._step < wanted:
            self._pass_over()
        mine = self._mine(wanted)
        windows = [self._window(lane) for _, lane in mine]
        self._step += 1
        tokens = np.stack([window.tokens for window in windows])
        digests = [
            (i, hashlib.blake2b(window.tokens.astype("<i4").tobytes(), digest_size=16).digest())
            for (i, _), window in zip(mine, windows, strict=True)
        ]
        return Batch(
            step=wanted,
            tokens=tokens,
            document_ids=np.stack([window.document_ids for window in windows]),
            digests=digests,
            documents=list(dict.fromkeys(address for window in windows for address in window.documents)),
            cursor=self._cursor(),
        )

    def _cursor(self) -> dict[str, Any]:
        config = self.corpus.config
        return {
            "version": VERSION,
            "step": self._step,
            "index": self.corpus.index_hash,
            "seed": config.seed,
            "lane_count": config.lanes,
            "lanes": {str(lane): cursor for lane, cursor in sorted(self._cursors.items())},
        }


def _check_shape(lanes: int, sequences: int, rank: int, world: int, skips: Sequence[tuple[int, int]]) -> None:
    if sequences < 1:
        raise BadInput(f"{sequences} sequences make no batch", field="training.tokens_per_step")
    if not 0 <= rank < world:
        raise BadInput(f"rank {rank} of {world}")
    if lanes % world:
        raise BadInput(
            f"{lanes} lanes cannot be shared by {world} ranks",
            field="data.lanes",
            hint="The ranks must divide it.",
        )
    if sequences % world:
        raise BadInput(
            f"{sequences} sequences per step cannot be shared by {world} ranks",
            field="training.tokens_per_step",
            hint=f"Make it a multiple of {world} x data.sequence_length.",
        )
    for a, b in skips:
        if not 0 <= a < b:
            raise BadInput(f"{a}:{b} is no range of steps", field="--skip-steps", hint="Write FIRST:END, END left in.")
