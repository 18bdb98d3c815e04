"""The estimate of memory against the peak of a process that trains."""

import os
import subprocess
import sys

import pytest
import torch

from peak_memory import peak_memory
from smolforge.config import ModelConfig
from smolforge.model.summary import estimate_memory

STEPS = """
import sys, torch
from peak_memory import peak_memory
from smolforge.config import ModelConfig
from smolforge.model.architecture import build_model
torch.set_num_threads(2)
model = build_model(ModelConfig(num_hidden_layers=4), recompute=sys.argv[1] == "True", sparse_embedding=True)
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
ids = torch.randint(1000, (2, 257))
for _ in range(2):
    model.loss(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), scale=1 / 512)[0].backward()
    optimizer.step()
    optimizer.zero_grad()
print(peak_memory())
"""


@pytest.mark.parametrize("recompute", [False, True])
def test_the_peak_is_near_the_estimate(recompute: bool) -> None:
    peak_memory()  # skips where it cannot be known
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", STEPS, str(recompute)],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    estimate = estimate_memory(ModelConfig(num_hidden_layers=4), sequences=2, length=256, recompute=recompute)
    assert 0.75 < int(done.stdout) / estimate.total < 1.25


def test_each_part_counts() -> None:
    def parts(**options):
        return estimate_memory(ModelConfig(), **{"sequences": 4, "length": 512, **options})

    plain = parts()
    assert plain.state == plain.weights + plain.gradients + plain.moments and plain.casts == plain.saving == 0
    assert plain.total == plain.state + plain.activations + plain.head + plain.process
    assert parts(recompute=True).activations < plain.activations / 4
    assert parts(loss="full").head > plain.head > parts(loss="native").head
    assert parts(save_copy=True).saving == plain.weights + plain.moments
    assert parts(optimizer="adamw8bit").moments < parts(optimizer="muon").moments < plain.moments
    assert parts(computed=torch.bfloat16).casts > 0
    assert plain.exchange == 0 < parts(copies=True).exchange < parts(copies=True, stored=torch.bfloat16).exchange
    assert parts(stored=torch.bfloat16).state == plain.state // 2
