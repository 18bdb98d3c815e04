"""Order, index and plan of 1,024 ranks and 100,000 shards, in one process: it prints its time and peak memory."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from peak_memory import peak_memory
from smolforge.config import build_config
from smolforge.data import index as indexing
from smolforge.data.loader import lanes_of
from smolforge.data.order import Order, split_into_ranges
from smolforge.training.plan import make_plan

SHARDS, RANKS = 100_000, 1024


def simulate(lanes: int, sequences: int) -> dict[str, int]:
    """What every rank does before its first batches, and the order of two epochs; assertions are the test."""
    shards = [
        {"file": f"{n:06d}.parquet", "size": 40 << 20, "identity": {"etag": f"{n:064x}"},
         "groups": [[5000 + n % 7, 20 << 20], [4000, 20 << 20]]}
        for n in range(SHARDS)
    ]  # fmt: skip
    entry = {"source": "far", "kind": "hub", "revision": "0" * 40, "column": "text", "separator": "\n", "rows": 1}
    index = {"version": indexing.VERSION, "sources": [{**entry, "shards": shards}]}
    index["hash"] = indexing.digest(index)
    indexing.check(json.loads(json.dumps(index)))
    order = Order(split_into_ranges([shard["groups"] for shard in shards], lanes), seed=0, source=0, lanes=lanes)
    count = len(order.ranges)
    owners = np.zeros(sequences, dtype=int)  # of each sequence of a step
    for rank in range(RANKS):
        mine = lanes_of(rank, world=RANKS, lanes=lanes, sequences=sequences)
        epoch, number = order.place(mine[0], 0)
        assert epoch == 0 and sorted(order.rows(epoch, number)) == list(range(order.ranges[number].rows))
        for i in range(rank, sequences, RANKS):
            owners[i] += 1
            assert all((step * sequences + i) % lanes in mine for step in range(3))
    assert (owners == 1).all()
    seen = np.zeros((2, count), dtype=int)
    for lane in range(lanes):
        for k in range(-(-(2 * count - lane) // lanes)):
            seen[order.place(lane, k)] += 1
    assert (seen == 1).all()
    shape = [f"data.lanes={lanes}", f"training.tokens_per_step={sequences * 2048}", "data.sequence_length=2048"]
    plan = make_plan(build_config("smollm2-135m", [*shape, "training.steps=1000"]), torch.device("cpu"), RANKS)
    return {"ranges": count, "sequences_of_a_rank": plan.sequences}


@pytest.mark.slow
@pytest.mark.parametrize(("lanes", "sequences"), [(16, 1024), (1024, 2048), (48, 1500)])
def test_a_thousand_ranks_and_a_hundred_thousand_shards(lanes: int, sequences: int) -> None:
    done = subprocess.run(
        [sys.executable, __file__, str(lanes), str(sequences)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    found = json.loads(done.stdout)
    assert found["ranges"] == 2 * SHARDS and found["sequences_of_a_rank"] == -(-sequences // RANKS)
    assert found["peak_bytes"] < 1e9


if __name__ == "__main__":
    began = time.process_time()
    result = simulate(*map(int, sys.argv[1:]))
    print(json.dumps(result | {"seconds": time.process_time() - began, "peak_bytes": peak_memory()}))
