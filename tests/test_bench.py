"""The benchmarks measure what they say: figures that are positive, consistent with each other, and printable."""

import json

import pytest

from smolforge.cli import run
from smolforge.config import ModelConfig
from smolforge.data import bench as data_bench
from smolforge.generation import bench as generation_bench
from smolforge.model.architecture import build_model
from smolforge.training import bench as training_bench

SMALL = [
    "model.num_hidden_layers=1",
    "model.hidden_size=64",
    "model.num_attention_heads=1",
    "model.num_key_value_heads=1",
]


def test_training(capsys) -> None:
    words = [word for key in SMALL for word in ("--set", key)]
    assert run(["bench", "train", "pocket", "--length", "32", "--batch", "2", "--steps", "2", "--json", *words]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["tokens_per_second"] > 0 and result["compiled_graphs"] == 0
    share = result["flops_per_second"] / result["matmul_flops_per_second"]
    assert result["share_of_matmul_limit"] == pytest.approx(share)
    assert set(result["share_by_part"]) == set(training_bench.PARTS)
    assert "tokens/s" in training_bench.table(result)


def test_writing() -> None:
    module = build_model(ModelConfig(vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
                               num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=64))  # fmt: skip
    result = generation_bench.measure(
        module, precisions=["fp32", "int8"], batches=(1, 2), tokens=3, prompt=16, rounds=1
    )
    wide, narrow = (result["precisions"][name] for name in ("fp32", "int8"))
    assert 0 < narrow["weight_bytes"] < wide["weight_bytes"]
    assert all(rate > 0 for rate in wide["tokens_per_second"].values())
    assert len(generation_bench.table(result).splitlines()) == 4


def test_reading() -> None:
    result = data_bench.measure(seconds=0.2, length=64)
    assert result["tokens"] >= data_bench.SEQUENCES * 64
    assert result["cores_for_an_h200"] == pytest.approx(361_000 / result["tokens_per_core_second"])
    assert 2 < result["bytes_per_token"] < 8
    assert "H200" in data_bench.table(result)
