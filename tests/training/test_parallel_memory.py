"""The estimate of memory against what a step on several ranks has in use: copies and shards, in several shapes."""

import json
from pathlib import Path

import launch
import pytest
from launch import finish, ranks_of, start

from peak_memory import CLEAR, peak_memory

STEPS = """
import ctypes, sys
ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what is freed goes back, so the peak is what was in use
sys.path[:0] = {path!r}
import torch
from peak_memory import peak_memory, reset_peak
from smolforge.config import build_config
from smolforge.distributed import init_distributed
from smolforge.model.architecture import build_model
from smolforge.training.optim import build_optimizer
from smolforge.training.parallel import shard_model
from smolforge.training.plan import make_plan, planned_memory
from smolforge.training.step import replicate, train_step

cpu = torch.device("cpu")
ranks = init_distributed(cpu)
torch.set_num_threads(1)
config = build_config("smollm2-135m", ["checkpoint.asynchronous=false", *{options!r}])
plan = make_plan(config, cpu, ranks.world_size, local=ranks.local_size)
base = reset_peak()
def shard(model):
    shard_model(model, cpu, plan.precision, plan.shards)
model = build_model(config.model, **plan.model_options, shard=shard if plan.shards > 1 else None)
optimizer = build_optimizer(model, config.optimizer, update=plan.update)
replica = replicate(model, ranks) if plan.shards == 1 else None
for step in range(3):
    if step == 2:
        reset_peak()  # the steps before made the moments
    tokens = torch.randint(1000, (plan.sequences, config.data.sequence_length + 1))
    train_step(model, optimizer, plan, config, tokens, None, lr=1e-3, ranks=ranks, replica=replica)
found = planned_memory(config, plan)
if ranks.is_main:
    ratio = (peak_memory() - base) / (found.total - found.process)
    open({out!r}, "w").write(repr(ratio))
ranks.close()
sys.exit()
"""
SHALLOW = ("model.num_hidden_layers=4", "training.tokens_per_step=1024")
UNTIED = (*SHALLOW, "model.tie_word_embeddings=false", "model.vocab_size=16384")
CASES = {
    "ddp": ("ddp", *SHALLOW),
    "ddp-bf16": ("ddp", *SHALLOW, "training.precision=bf16"),
    "ddp-untied": ("ddp", *UNTIED),
    "ddp-accumulated": ("ddp", *SHALLOW, "training.micro_batch=1"),
    "fsdp": ("fsdp", *SHALLOW),
    "fsdp-bf16": ("fsdp", *SHALLOW, "training.precision=bf16"),
    "fsdp-untied": ("fsdp", *UNTIED),
    "fsdp-accumulated": ("fsdp", *SHALLOW, "training.micro_batch=1"),
    "hsdp": ("hsdp", *SHALLOW),
    "hsdp-accumulated": ("hsdp", *SHALLOW, "training.tokens_per_step=2048", "training.micro_batch=1"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_peak_is_within_a_tenth_of_the_estimate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    peak_memory()  # skips where it cannot be known
    if not CLEAR.exists():
        pytest.skip("the peak cannot be counted anew")
    parallel, *options = CASES[case]
    given = ["training.precision=fp32", "data.sequence_length=256", "training.steps=10", *options]
    path, out = [str(Path(__file__).parents[1])], tmp_path / "ratio.json"
    program = STEPS.format(path=path, options=[*given, f"training.parallel={parallel}"], out=str(out))
    monkeypatch.setattr(launch, "PATIENCE", 600.0)
    machine = {"LOCAL_WORLD_SIZE": "2"}
    ranks = ranks_of(4 if parallel == "hsdp" else 2)
    for process in [start([], environment | machine, first=program) for environment in ranks]:
        finish(process)
    ratio = json.loads(out.read_text())
    print(f"{case}: {ratio:.3f}")
    assert 0.9 < ratio < 1.1, ratio
