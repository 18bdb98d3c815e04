"""Resuming under other conditions: another optimizer, a thread, a rank that loses its source."""

import re
import threading
import time
from pathlib import Path

import pytest
import torch
from launch import finish, start_ranks
from tiny import steps_of, tiny_file, undo_after, weights_of

from faults.server import FaultServer, Status
from smolforge.checkpoint import commit
from smolforge.errors import BadInput
from smolforge.run import Run
from smolforge.tales import source as tales
from smolforge.training import checkpointing, optim
from smolforge.training.shutdown import GracefulShutdown


def test_another_optimizer_starts_without_moments(make_run, caplog) -> None:
    make_run(training={"steps": 5})
    run = make_run(training={"steps": 8}, optimizer={"name": "muon"})
    assert "muon starts without moments" in caplog.text
    make_run(training={"steps": 10})  # the state of the last checkpoint is muon's, as the configuration says
    assert [step for step, _, _ in steps_of(run)] == list(range(1, 11))
    assert caplog.text.count("starts without moments") == 1


def test_an_unknown_optimizer_changes_nothing(make_run) -> None:
    run = make_run(training={"steps": 5})
    before = run.config_path.read_text()
    with pytest.raises(BadInput, match="adamw"):
        make_run(optimizer={"name": "adamv"})
    assert run.config_path.read_text() == before


def test_a_run_trains_in_a_thread(make_run) -> None:
    done = []
    thread = threading.Thread(target=lambda: done.append(make_run(training={"steps": 3})))
    thread.start()
    thread.join()
    assert steps_of(done[0])[-1][0] == 3


def test_one_rank_loses_its_source_and_all_save_and_stop(tmp_path: Path) -> None:
    """One row group, which belongs to one rank, cannot be read; the other rank must not wait for that rank."""
    import pyarrow.parquet as pq

    shard = tmp_path / "shard.parquet"
    tales.write(shard, kind="parquet", documents=range(200), row_group_size=2)
    column = pq.ParquetFile(shard).metadata.row_group(60).column(1)  # the text
    first = column.dictionary_page_offset or column.data_page_offset
    place = range(first, first + column.total_compressed_size)
    with FaultServer() as server:
        server.files["shard.parquet"] = shard.read_bytes()
        run = Run(tmp_path / "run")
        words = [tiny_file(tmp_path), "--out", str(run.path), "--steps", "500", "--data", server.url("shard.parquet")]
        words += ["--set", "data.cache=0", "--set", "data.read_ahead=1MB", "--set", "data.patience=1"]

        def fault(request):
            # Opening the run reads the held-out documents everywhere; only what the steps read fails.
            asked = re.match(r"bytes=(\d+)-(\d+)", request.range or "") if run.config_path.exists() else None
            if asked and int(asked[1]) < place.stop and int(asked[2]) >= place.start:
                return Status(503)
            return None

        server.fault = fault
        outputs = [finish(process, 75) for process in start_ranks(words, 2)]
    assert sum(output.count("error:") for output in outputs) == 1  # of the one that lost it
    assert commit.steps(run.checkpoints_path)[-1] == steps_of(run)[-1][0]


def test_more_steps_count_from_where_they_were_first_asked_for(make_run) -> None:
    with pytest.raises(BadInput, match="holds no run to extend"):
        make_run(request={"more_steps": 5})
    run = make_run(training={"steps": 5})
    make_run(request={"more_steps": 10})
    undo_after(run, 10)  # killed at step 10, and the same command again
    make_run(request={"more_steps": 10})
    assert steps_of(run)[-1][0] == 15
    make_run(request={"more_steps": 10})
    assert steps_of(run)[-1][0] == 25


def test_the_time_limit_counts_the_writing_of_a_checkpoint(make_run, monkeypatch) -> None:
    margins, write = [], checkpointing.save_state

    def slowly(*args, **options) -> None:
        time.sleep(0.5)
        write(*args, **options)

    def requested(self, margin: float = 0.0) -> bool:
        margins.append(margin)
        return False

    monkeypatch.setattr(checkpointing, "save_state", slowly)
    monkeypatch.setattr(GracefulShutdown, "requested", requested)
    make_run(training={"steps": 20})  # saves every five steps, the second save waits for the first
    assert max(margins) >= 0.5


class EightBit(torch.optim.Optimizer):
    """Keeps its state as bitsandbytes' AdamW8bit does: bytes, a scale for each block, a table; ignores `found_inf`."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["step"] = 0
                    state["state1"] = torch.zeros(parameter.shape, dtype=torch.uint8)
                    state["absmax1"] = torch.zeros(-(-parameter.numel() // 64))
                    state["qmap1"] = torch.linspace(-1, 1, 256)
                state["step"] += 1
                blocks = torch.arange(parameter.numel()) // 64
                moment = state["qmap1"][state["state1"].flatten().long()] * state["absmax1"][blocks]
                moment = 0.9 * moment + 0.1 * parameter.grad.to_dense().flatten()
                state["absmax1"].zero_().scatter_reduce_(0, blocks, moment.abs(), "amax")
                share = moment / state["absmax1"][blocks].clamp(min=1e-20)
                state["state1"] = ((share + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).view_as(parameter)
                parameter.data.sub_(group["lr"] * share.view_as(parameter))


@pytest.fixture
def eight_bit(monkeypatch):
    """An optimizer of this name."""
    builders = optim.builders()
    monkeypatch.setitem(
        builders,
        "eightbit",
        lambda model, config, **_: EightBit(optim.parameter_groups(model, config), {"lr": 0}),
    )


def test_an_optimizer_in_eight_bits_resumes_exactly(make_run, eight_bit) -> None:
    optimizer = {"name": "eightbit", "lr": 1e-3}
    whole = make_run("whole", training={"steps": 6}, optimizer=optimizer)
    run = make_run(training={"steps": 6}, optimizer=optimizer, checkpoint={"every": 3})
    undo_after(run, 3)
    make_run()
    assert steps_of(run) == steps_of(whole) and weights_of(run) == weights_of(whole)


def test_an_optimizer_that_knows_no_found_inf_skips_what_is_not_finite(make_run, eight_bit, monkeypatch) -> None:
    optimizer, step = {"name": "eightbit", "lr": 1e-3}, optim.optimizer_step
    before = make_run("before", training={"steps": 2}, optimizer=optimizer, schedule={"name": "constant"})

    def poisoned(model, optimizer, nats, **options):
        if any(state["step"] == 2 for state in optimizer.state.values()):
            model.decoder.norm.weight.grad[0] = float("nan")
        return step(model, optimizer, nats, **options)

    monkeypatch.setattr("smolforge.training.step.optimizer_step", poisoned)
    run = make_run(training={"steps": 4}, optimizer=optimizer, schedule={"name": "constant"})
    assert weights_of(run) == weights_of(before)
