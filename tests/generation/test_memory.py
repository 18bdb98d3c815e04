"""What the engine says it holds is what the process grows by."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from smolforge.checkpoint.format import write_model
from smolforge.config import ModelConfig
from smolforge.generation import Engine, SamplingParams
from smolforge.model.architecture import build_model
from smolforge.tokenizer import Tokenizer

SHAPE = ModelConfig(vocab_size=8192, hidden_size=512, intermediate_size=1536, num_hidden_layers=20,
                    num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=2048)  # fmt: skip
PROGRAM = """
import gc, json, sys
from pathlib import Path
from smolforge.generation import Engine, SamplingParams
from smolforge.generation.bench import resident_bytes

def fill(engine):
    room = engine.context - 1
    for _ in engine.stream([[5] * room], SamplingParams(max_tokens=1, ignore_eos=True)):
        most = engine.memory()["cache_reserved"] + engine.memory()["cache_kept"]
    return most

small, model, precision = sys.argv[1:]
fill(Engine.from_pretrained(small, quantize=precision))  # torch, its threads and buffers
gc.collect()
start = resident_bytes()
engine = Engine.from_pretrained(model, quantize=precision)
gc.collect()
loaded = resident_bytes()
cache = fill(engine)
print(json.dumps({"weights": engine.memory()["weights"], "grown": loaded - start,
                  "cache": cache, "grown_by_cache": resident_bytes() - loaded}))
"""


MANY = """
import gc, json, sys
from smolforge.generation import Engine, SamplingParams
from smolforge.generation.bench import resident_bytes

engine = Engine.from_pretrained(sys.argv[1], quantize="int8")
list(engine.stream([[5] * 300], SamplingParams(max_tokens=2, ignore_eos=True)))  # threads and buffers
gc.collect()
start, kept = resident_bytes(), engine.memory()["cache_kept"]
requests = [engine.add([6 + i] * 20, SamplingParams(max_tokens=engine.room(20), ignore_eos=True)) for i in range(16)]
while any(request.written < 3 for request in requests):
    engine.step()
memory = engine.memory()
print(json.dumps({"running": len(engine.scheduler.running), "used": memory["cache_reserved"],
                  "grown": resident_bytes() - start, "whole": engine.scheduler.pool.bytes_for(engine.context)}))
"""


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> tuple[Path, Path]:
    tokenizer = Tokenizer.train(["once upon a time"] * 3, 300)
    made = []
    for name, layers in (("small", 1), ("model", SHAPE.num_hidden_layers)):
        config = SHAPE.model_copy(update={"num_hidden_layers": layers})
        made.append(tmp_path_factory.mktemp(name))
        write_model(made[-1], config, build_model(config, seed=0).state_dict(), tokenizer)
    return made[0], made[1]


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the kernel does not say what a process holds")
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_the_process_grows_by_what_the_engine_says(directories, precision) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, directories), precision], capture_output=True, text=True, check=True
    )
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["weights"] > 20e6 and said["cache"] > 20e6
    assert said["grown"] == pytest.approx(said["weights"], rel=0.1, abs=4e6)
    # The activations of a chunk of prompt come on top, once for the process.
    assert said["grown_by_cache"] == pytest.approx(said["cache"], rel=0.1, abs=12e6)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the kernel does not say what a process holds")
def test_texts_without_a_limit_hold_what_they_use(directories) -> None:
    done = subprocess.run([sys.executable, "-c", MANY, str(directories[1])], capture_output=True, text=True, check=True)
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["running"] == 16 and said["used"] < said["whole"], "sixteen texts take less than one whole context"
    assert said["grown"] < said["used"] + 16e6


def test_texts_without_a_limit_begin_like_those_with_one(directories) -> None:
    """Fifteen beside one that runs, as many as a server runs at once: after the same step all have a token, and the same memory is counted."""
    seen = []
    for limit in (500, None):
        engine = Engine.from_pretrained(directories[0], quantize="int8")
        first = engine.add([5] * 20, SamplingParams(max_tokens=engine.room(20), ignore_eos=True))
        while first.written < 5:
            engine.step()
        params = SamplingParams(max_tokens=limit or engine.room(20), ignore_eos=True)
        requests = [engine.add([6 + i] * 20, params) for i in range(15)]
        written, reserved = [], []
        while any(request.written < 3 for request in requests):
            before = first.written
            engine.step()
            written.append((first.written - before, sum(request.written > 0 for request in requests)))
            reserved.append(engine.memory()["cache_reserved"])
        seen.append((written, reserved))
    assert seen[0] == seen[1] and all(more == 1 for more, _ in seen[0][0])
