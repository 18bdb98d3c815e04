"""The programs of benchmarks/ still run, on tiny models: their numbers are not looked at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from smolforge.checkpoint.format import write_model
from smolforge.config import ModelConfig
from smolforge.model.architecture import build_model
from smolforge.tokenizer import Tokenizer

pytestmark = pytest.mark.slow
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(*words: object, given: str | None = None, code: int = 0) -> list[dict]:
    """The lines of JSON that a program prints."""
    command = [sys.executable, str(BENCHMARKS / str(words[0])), *map(str, words[1:])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, input=given, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == code, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with the vocabulary that the prompts of the comparison are taken from, and a smaller one that drafts."""
    place = tmp_path_factory.mktemp("benchmarks")
    tokenizer = Tokenizer.train(["once upon a time"], 300)
    for name, width in (("hf", 64), ("draft", 32)):
        config = ModelConfig(
            vocab_size=49_152, hidden_size=width, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=1024,
        )  # fmt: skip
        write_model(place / name, config, build_model(config, seed=0).state_dict(), tokenizer)
    return place


@pytest.mark.parametrize("name", ["native-fp32", "engine-fp32", "seed-fp32", "transformers-fp32"])
def test_contestants_of_generation_answer_jobs(workspace: Path, name: str) -> None:
    jobs = ["decode 8 4", "batch 2 8 4", "first 300"]
    loaded, *answers = run("generation/peer.py", name, workspace, 1, given="\n".join(jobs) + "\n")
    assert loaded["weight_bytes"] > 0 and len(answers) == len(jobs)
    assert all(answer["seconds"] > 0 for answer in answers)


def test_a_draft_is_measured(workspace: Path) -> None:
    words = ("--tokens", 8, "--rounds", 1, "--quantize", "fp32")
    [found] = run("generation/draft.py", workspace / "hf", workspace / "draft", *words)
    assert set(found["tokens_per_second"]) == {"alone", "drafted"}


def test_contestants_of_training_take_steps() -> None:
    [found] = run("training/peer.py", "smolforge", 1, 32, 1, "fp32", 1)
    assert found["tokens_per_second"] > 0 and found["share_of_matmul_limit"] > 0


PROGRAMS = [path for path in sorted(BENCHMARKS.rglob("*.py")) if "ArgumentParser(" in path.read_text()]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.relative_to(BENCHMARKS).as_posix())
def test_programs_start(program: Path) -> None:
    assert run(program, "--help") == []


def test_tuning(workspace: Path) -> None:
    rows = [{"instruction": f"Question {i}?", "output": f"once upon a time {i}"} for i in range(64)]
    (workspace / "faq.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (found,) = run(
        "finetuning/compare.py", workspace / "hf", workspace / "faq.jsonl", "--epochs", 3, "--only", "smolforge"
    )
    assert set(found) == {"smolforge full", "smolforge lora"}
    assert all(each["tokens_per_second"] > 0 and each["memory"] > 0 for each in found.values())


def test_ddp_beside_plain_sums() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [str(BENCHMARKS / "training/ddp.py"), "pocket", "1", "training.tokens_per_step=1024"]
    done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=300, check=True)
    [found] = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert found["largest_difference_of_weights"] == 0 and found["processes"] == 2
