"""Passes that are recorded as CUDA graphs: when they are recorded, and on a GPU that they compute the same."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from smolforge import cuda_graph
from smolforge.config import build_config
from smolforge.distributed import DistributedContext
from smolforge.model.architecture import build_model
from smolforge.training import recorded
from smolforge.training.optim import build_optimizer
from smolforge.training.plan import make_plan
from smolforge.training.step import train_step

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Replayed:
    """Stands for `CudaGraph` on a CPU: calls the function, and says so."""

    made: ClassVar[list[int]] = []

    def __init__(self, function, inputs, pool=None):
        self.function, self.calls = function, 0
        self.made.append(0)

    def __call__(self, *inputs):
        self.made[-1] += 1
        return self.function(*inputs)


@pytest.fixture
def without_gpu(monkeypatch):
    """Graphs are replayed on a CPU."""
    Replayed.made = []
    monkeypatch.setattr(cuda_graph, "CudaGraph", Replayed)
    monkeypatch.setattr(cuda_graph, "run_aside", lambda function, inputs: function(*inputs))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))


@pytest.fixture
def passes(without_gpu):
    """Of a model with one parameter; the model, and what calls it."""
    model = torch.nn.Linear(3, 1, bias=False)

    def run(x, mask=None):
        loss = (model(x) if mask is None else model(x) * mask).sum()
        loss.backward()
        return loss.detach()

    passes = recorded.RecordedPasses(model)
    return passes, model, lambda *inputs: passes(run, *inputs)


def test_a_shape_is_recorded_at_its_third_call(passes) -> None:
    _, model, call = passes
    for _ in range(5):
        call(torch.ones(2, 3), None)
    assert Replayed.made == [3] and model.weight.grad.tolist() == [[10.0, 10.0, 10.0]]
    for _ in range(3):
        call(torch.ones(4, 3), None)
        call(torch.ones(2, 3), torch.zeros(2, 1))
    assert len(Replayed.made) == 3, "each shape of each input has a graph of its own"


def test_other_gradients_are_recorded_anew(passes) -> None:
    """A graph adds to the memory that it was recorded with; gradients elsewhere would stay as they are."""
    _, model, call = passes
    for _ in range(4):
        call(torch.ones(2, 3), None)
    model.zero_grad(set_to_none=True)
    for _ in range(2):
        call(torch.ones(2, 3), None)
    assert Replayed.made == [2] and model.weight.grad.tolist() == [[4.0, 4.0, 4.0]]
    call(torch.ones(2, 3), None)
    assert len(Replayed.made) == 2


def test_what_cannot_be_recorded_is_computed(passes, monkeypatch, caplog) -> None:
    recording, model, call = passes

    def refuses(*_):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(cuda_graph, "CudaGraph", refuses)
    with caplog.at_level("WARNING"):
        for _ in range(5):
            call(torch.ones(2, 3), None)
    assert recording.calls.fails and model.weight.grad.tolist() == [[10.0, 10.0, 10.0]]
    assert [record.message for record in caplog.records] == [
        "graph: off, it fails on this machine (RuntimeError: operation not permitted when stream is capturing)"
    ]


OPTIONS = {
    "adamw": ["optimizer.name=adamw"],
    "muon, packed documents, dropout": ["optimizer.name=muon", "data.mask_documents=true", "training.dropout=0.1"],
    "compiled": ["training.compile=on"],
}


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "compiled"])
def test_the_same_is_replayed_as_computed(name, without_gpu) -> None:
    eager, graph, _ = three_runs(name, torch.device("cpu"))
    assert torch.equal(eager[0], graph[0]) and torch.equal(eager[1], graph[1]) and Replayed.made == [14]


@needs_gpu
@pytest.mark.parametrize("name", OPTIONS)
def test_a_recorded_step_equals_an_eager_one(name) -> None:
    """As near as two eager runs: the backward pass of flash adds in any order."""
    (eager, weights), (graph, recorded_weights), (again, _) = three_runs(name, torch.device("cuda"))
    spread = float((eager - again).abs().max())
    assert float((graph - eager).abs().max()) <= 3 * spread + 1e-3 * float(eager[-1])
    assert float((recorded_weights - weights).abs().max()) < 3e-3


def three_runs(name, device):
    """Losses and weights of eight steps of two micro-batches: eager, recorded, eager."""
    found, width = [], [] if device.type == "cuda" else ["model.hidden_size=72", "model.vocab_size=300"]
    config = build_config("smollm2-135m", [
        "model.num_hidden_layers=2", "data.sequence_length=256", "training.tokens_per_step=2048",
        "training.micro_batch=4", "training.steps=8", "training.compile=off", "optimizer.lr=1e-3", *OPTIONS[name],
        *width,
    ])  # fmt: skip
    plan = make_plan(config, device, 1)
    assert plan.graph == (device.type == "cuda")
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(config.model.vocab_size, (8, 257), generator=generator) for _ in range(8)]
    for graph in (False, True, False):
        model = build_model(config.model, **plan.model_options, dropout=config.training.dropout)
        optimizer = build_optimizer(model, config.optimizer, update=plan.update)
        passes = recorded.RecordedPasses(model) if graph else None
        losses = []
        for number, tokens in enumerate(batches):
            ids = (torch.arange(257) // (40 + 5 * number)).expand(8, -1) if config.data.mask_documents else None
            keys = torch.arange(8, device=device) + 8 * number if config.training.dropout else None
            figures = train_step(
                model, optimizer, plan, config, tokens.to(device), ids,
                lr=1e-3, ranks=DistributedContext(), keys=keys, passes=passes,
            )  # fmt: skip
            losses.append(float(figures[0]))
        assert passes is None or (len(passes.calls) and not passes.calls.fails)
        found.append((torch.tensor(losses), torch.cat([p.detach().flatten().cpu() for p in model.parameters()])))
    return found
