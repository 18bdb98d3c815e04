"""One run through everything at once, for about 20 minutes: `make soak`.

Random kills, signals, corrupted checkpoints, and a server that drops, refuses and stalls. The end equals a run that
nothing happened to, bit for bit. Prints what happened; the figures go to docs/resume.md.
"""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from launch import finish, is_saving, start, steps_done, wait_until
from tiny import steps_of, tiny_file, validations_of, weights_of

from faults.server import Drop, FaultServer, Status
from smolforge.checkpoint import commit
from smolforge.run import Run
from smolforge.tales.source import write

SECONDS = float(os.environ.get("SMOLFORGE_SOAK_SECONDS", "1000"))


def corrupt(run: Run, dice: random.Random) -> str | None:
    """Damage one file of the newest checkpoint; what was done."""
    present = commit.steps(run.checkpoints_path)
    if len(present) < 2:
        return None
    directory = run.checkpoints_path / commit.step_name(present[-1])
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    if not files:
        return None
    path = dice.choice(files)
    data, way = bytearray(path.read_bytes()), dice.choice(["flip", "cut", "remove"])
    if way == "remove" or not data:
        path.unlink()
    elif way == "cut":
        path.write_bytes(data[: dice.randrange(len(data))])
    else:
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        path.write_bytes(data)
    return way


@pytest.mark.slow
def test_soak(tmp_path: Path) -> None:
    dice = random.Random(int(os.environ.get("SMOLFORGE_SOAK_SEED", "0")))
    shard = write(tmp_path / "shard.parquet", kind="parquet", documents=range(3000), row_group_size=50)
    counts = dict.fromkeys(("killed", "killed while saving", "signalled", "flip", "cut", "remove", "faults"), 0)

    def fault(request):
        roll = dice.random()
        if roll < 0.06:
            counts["faults"] += 1
            return Drop(after=dice.randrange(2000))
        if roll < 0.10:
            counts["faults"] += 1
            return Status(dice.choice([500, 502, 503]))
        if roll < 0.12:
            counts["faults"] += 1
            return Status(429, {"Retry-After": "0"})
        return None

    with FaultServer() as server:
        server.files["shard.parquet"] = shard.read_bytes()
        # As many steps as fit into the time: a quarter of it for the run that nothing happens to.
        steps = max(200, int(SECONDS * 4))
        words = [tiny_file(tmp_path), "--data", server.url("shard.parquet"), "--steps", str(steps),
                 "--set", "checkpoint.every=25", "--set", "evaluation.every=200", "--set", "samples.every=400",
                 "--set", "data.cache=0", "--set", "checkpoint.keep=4"]  # fmt: skip
        whole = Run(tmp_path / "whole")
        process = start([*words, "--out", str(whole.path)])
        process.communicate()
        assert process.returncode == 0
        server.fault = fault
        run = Run(tmp_path / "run")
        began = time.monotonic()
        while True:
            process = start([*words, "--out", str(run.path)])
            begin = steps_done(run)
            peaceful = time.monotonic() - began > SECONDS
            ahead = steps + 1 if peaceful else begin + dice.randint(1, 60)
            if not wait_until(lambda: steps_done(run) >= min(ahead, steps), process):  # noqa: B023
                finish(process)
                break
            kind = dice.choice(["killed", "killed while saving", "signalled"])
            if kind == "killed while saving" and not wait_until(lambda: is_saving(run), process, interval=0):
                finish(process)
                break
            time.sleep(dice.random() * 0.1)
            process.send_signal(dice.choice([signal.SIGTERM, signal.SIGINT]) if kind == "signalled" else signal.SIGKILL)
            process.communicate()
            if process.returncode == 0:
                break  # the end was quicker than the signal
            counts[kind] += 1
            if dice.random() < 0.3 and (way := corrupt(run, dice)):
                counts[way] += 1
    print(json.dumps({"steps": steps, "seconds": round(time.monotonic() - began), **counts}))
    assert steps_of(run) == steps_of(whole)
    assert validations_of(run) == validations_of(whole)
    assert weights_of(run) == weights_of(whole)
