"""The estimate of memory against what a step on several ranks has in use: shards, in three shapes."""

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
from functools import partial
import torch
from peak_memory import peak_memory, reset_peak
from smolforge.config import build_config
from smolforge.distributed import init_distributed
from smolforge.model.architecture import build_model
from smolforge.training.optim import build_optimizer
from smolforge.training.parallel import shard_model
from smolforge.training.plan import make_plan, memory_of
from smolforge.training.step import train_step

cpu = torch.device("cpu")
ranks = init_distributed(cpu)
torch.set_num_threads(1)
config = build_config("smollm2-135m", ["checkpoint.asynchronous=false", *{options!r}])
plan = make_plan(config, cpu, ranks.world_size, local=ranks.local_size)
base = reset_peak()
shard = partial(shard_model, device=cpu, precision=plan.precision, shards=plan.shards)
model = build_model(config.model, **plan.model_options, shard=shard)
optimizer = build_optimizer(model, config.optimizer, update=plan.update)
for step in range(3):
    if step == 2:
        reset_peak()  # the steps before made the moments
    tokens = torch.randint(1000, (plan.sequences, config.data.sequence_length + 1))
    train_step(model, optimizer, plan, config, tokens, None, lr=1e-3, ranks=ranks)
found = memory_of(config, cpu, plan.precision, plan.micro_batch, recompute=plan.recompute, shards=plan.shards)
if ranks.is_main:
    ratio = (peak_memory() - base) / (found.total - found.process)
    open({out!r}, "w").write(repr(ratio))
ranks.close()
sys.exit()
"""
SHALLOW = ("model.num_hidden_layers=4", "training.tokens_per_step=1024")
CASES = {
    "shards": SHALLOW,
    "shards-bf16": (*SHALLOW, "training.precision=bf16"),
    "shards-untied": (*SHALLOW, "model.tie_word_embeddings=false", "model.vocab_size=16384"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_peak_is_within_a_tenth_of_the_estimate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    options = CASES[case]
    peak_memory()  # skips where it cannot be known
    if not CLEAR.exists():
        pytest.skip("the peak cannot be counted anew")
    given = [
        "training.precision=fp32",
        "training.loss=native",
        "data.sequence_length=256",
        "training.steps=10",
        *options,
    ]
    path = [str(Path(__file__).parents[1])]
    out = tmp_path / "ratio.json"
    program = STEPS.format(path=path, options=[*given, "training.parallel=fsdp"], out=str(out))
    monkeypatch.setattr(launch, "PATIENCE", 600.0)
    for process in [start([], environment, first=program) for environment in ranks_of(2)]:
        finish(process)
    ratio = json.loads(out.read_text())
    assert 0.9 < ratio < 1.1, ratio
