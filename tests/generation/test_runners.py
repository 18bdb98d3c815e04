"""Every runner computes the same model, and the native one the same bits in any company."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_llama import SHAPES, make_model

from quantized import Int4, Int8, quantize, to_int8
from smolforge import kernels
from smolforge.errors import BadInput, RunFailed
from smolforge.generation.runners import cpu, select_runner
from smolforge.generation.runners.cpu import PRECISIONS, CpuRunner
from smolforge.generation.runners.cuda import CudaRunner
from smolforge.generation.runners.module import ModuleRunner
from smolforge.generation.sequence import ScheduledChunk
from smolforge.kernels import NativeUnavailable, build

LENGTH = 90
# Relative error of the logits against the same rounded weights in fp32: what rounding of activations may cost.
TOLERANCE = {"fp32": 1e-5, "bf16": 0.015, "int8": 0.04, "int4": 0.04}


def calm(shape):
    """A model whose logits do not amplify rounding more than a trained one's do."""
    return make_model(shape, gain=0.1)


def rounded(model, precision):
    """A copy of a model whose matrices hold what `precision` can hold."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                weight = quantize(parameter, precision, head="embed" in name or "lm_head" in name)
                whole = weight.float() if isinstance(weight, torch.Tensor) else weight.dequantize()
                parameter.copy_(whole[:, : parameter.shape[1]])
    return model


def tokens(model, count=LENGTH, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (count,), generator=generator).tolist()


def one_by_one(runner, ids, prompt=37):
    """Logits of all positions: a prompt in two pieces, then single tokens."""
    cache = runner.new_cache(len(ids))
    cut = prompt // 2 + 1
    parts = [runner.forward([ScheduledChunk(cache, ids[:cut], 0, cut)])]
    parts.append(runner.forward([ScheduledChunk(cache, ids[cut:prompt], cut, prompt - cut)]))
    parts += [runner.forward([ScheduledChunk(cache, [ids[i]], i, 1)]) for i in range(prompt, len(ids))]
    return torch.cat(parts)


def whole(runner, ids):
    return runner.forward([ScheduledChunk(runner.new_cache(len(ids)), ids, 0, len(ids))])


def distance(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_logits_are_those_of_the_rounded_weights(shape, precision):
    model = calm(shape)
    ids = tokens(model)
    with torch.no_grad():
        expected = rounded(model, precision)(torch.tensor([ids]))[0]
    runner = CpuRunner(model, precision)
    assert distance(one_by_one(runner, ids), expected) < TOLERANCE[precision]
    assert distance(whole(runner, ids), expected) < TOLERANCE[precision]


@pytest.mark.parametrize("shape", SHAPES)
def test_more_bits_are_nearer_the_model(shape):
    model = calm(shape)
    ids = tokens(model)
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0]
    errors = [distance(whole(CpuRunner(model, precision), ids), expected) for precision in PRECISIONS]
    assert errors == sorted(errors) and errors[0] < TOLERANCE["fp32"] and errors[-1] < 0.5


def test_module_runner_in_pieces():
    model = make_model("odd")
    ids = tokens(model)
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0]
    assert distance(one_by_one(ModuleRunner(model), ids), expected) < 1e-5


def test_module_runner_sees_changed_weights_and_keeps_training_mode():
    model = make_model()
    runner = ModuleRunner(model.train())
    ids = tokens(model, 5)
    before = whole(runner, ids)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    assert model.training and torch.allclose(whole(runner, ids), 2 * before, rtol=1e-5)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_native_rows_are_bitwise_the_same_however_they_are_run(shape, precision):
    model = make_model(shape)
    ids, mates = tokens(model), [tokens(model, 60, seed) for seed in range(1, 16)]
    alone = whole(CpuRunner(model, precision, threads=1), ids)
    runner = CpuRunner(model, precision, threads=2)
    assert torch.equal(one_by_one(runner, ids), alone)
    cache, others = runner.new_cache(LENGTH), [runner.new_cache(60) for _ in mates]
    rows = []
    for start in range(0, LENGTH, 6):  # the mates' prompts and tokens run in the same steps
        company = [
            ScheduledChunk(c, m[start : start + 1 + i % 3], start, 1)
            for i, (c, m) in enumerate(zip(others, mates, strict=True)) if start + 3 < 60 and (start // 6 + i) % 4
        ]  # fmt: skip
        half = len(company) // 2
        pieces = [*company[:half], ScheduledChunk(cache, ids[start : start + 6], start, 6), *company[half:]]
        rows.append(runner.forward(pieces)[half : half + 6])
    assert torch.equal(torch.cat(rows), alone)


@pytest.mark.parametrize("limit", [1, 2, 8])
def test_a_step_takes_the_threads_that_openmp_gives(limit):
    """There may be fewer than asked for, and a step must not wait for those that never come."""
    program = """
from tiny_llama import make_model
from smolforge.generation.runners.cpu import CpuRunner
from smolforge.generation.sequence import ScheduledChunk
runner = CpuRunner(make_model(), "int8", threads=4)
print(runner.forward([ScheduledChunk(runner.new_cache(9), [5, 3, 8, 1], 0, 4)]).double().sum().item())
"""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"OMP_THREAD_LIMIT": str(limit), "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    runner = CpuRunner(make_model(), "int8", threads=1)
    expected = runner.forward([ScheduledChunk(runner.new_cache(9), [5, 3, 8, 1], 0, 4)]).double().sum().item()
    assert float(done.stdout) == expected


def test_a_container_that_may_use_two_cpus_gets_two_threads(monkeypatch):
    monkeypatch.setattr(cpu, "cpu_quota", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 60)
    assert CpuRunner(make_model(), "int8").threads == 2
    monkeypatch.setattr(cpu, "cpu_quota", lambda: None)
    assert CpuRunner(make_model(), "int8", threads=1).threads == 1


@pytest.mark.parametrize("runner_of", [lambda m: CpuRunner(m, "int8"), lambda m: CudaRunner(m, "fp32"), ModuleRunner])
def test_a_copied_prefix_continues_as_the_original(runner_of):
    model = make_model()
    runner, ids = runner_of(model), tokens(model)
    first, second = runner.new_cache(LENGTH), runner.new_cache(200)
    runner.forward([ScheduledChunk(first, ids[:50], 0, 0)])
    second.copy_prefix(first, 41)
    expected = torch.cat([runner.forward([ScheduledChunk(first, [ids[i]], i, 1)]) for i in range(41, 60)])
    copied = torch.cat([runner.forward([ScheduledChunk(second, [ids[i]], i, 1)]) for i in range(41, 60)])
    assert torch.equal(copied, expected)


@pytest.mark.parametrize("capacity", [1, 31, 32, 33, 200])
@pytest.mark.parametrize("shape", SHAPES)
def test_caches_take_what_was_said(shape, capacity):
    model = make_model(shape)
    for runner in (CpuRunner(model, "int8"), CudaRunner(model, "bf16"), ModuleRunner(model)):
        assert runner.new_cache(capacity).memory.nbytes == runner.cache_bytes(capacity)


@pytest.mark.parametrize(
    "missing", [(), ("MADV_HUGEPAGE", "MADV_NOHUGEPAGE"), ("MADV_HUGEPAGE", "MADV_NOHUGEPAGE", "MAP_ANON")]
)
def test_memory_is_zeroed_and_aligned_on_every_system(monkeypatch, missing):
    for name in missing:  # macOS has no advice on pages, and Windows no flags
        monkeypatch.delattr(f"mmap.{name}")
    for large in (False, True):
        memory = cpu._mapped(100_000, large=large)
        assert memory.numel() >= 100_000 and memory.data_ptr() % 64 == 0 and not memory.any()


def test_weights_are_held_once():
    model = make_model("one-kv", vocab_size=1024)
    numbers = sum(p.numel() for p in model.parameters())
    tables = 2 * 256 * model.config.head_dim * 4
    for precision, size in (("fp32", 4), ("bf16", 2), ("int8", 1)):
        held = CpuRunner(model, precision).weight_bytes
        assert held <= numbers * size * 1.08 + tables, precision


def test_int8_rounds_to_the_nearest_of_255_steps():
    weight = torch.randn(8, 40, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    packed = to_int8(weight)
    assert ((packed.dequantize() - weight).abs() <= packed.scales[:, None] / 2 * 1.0001).all()
    assert packed.dequantize()[3].abs().max() == 0


def test_int4_leaves_the_head_at_int8():
    assert isinstance(quantize(torch.ones(32, 32), "int4", head=True), Int8)
    assert isinstance(quantize(torch.ones(32, 32), "int4"), Int4)


def test_without_native_code_the_module_runs_and_says_so(monkeypatch):
    monkeypatch.setenv("SMOLFORGE_NATIVE", "0")
    kernels.library.cache_clear()
    try:
        runner, decisions = select_runner(make_model(), "int8")
    finally:
        kernels.library.cache_clear()
    assert isinstance(runner, ModuleRunner)
    assert decisions == [
        "engine: plain PyTorch, float32 on cpu, several times slower than native code: "
        "native code is turned off by SMOLFORGE_NATIVE=0"
    ]


@pytest.mark.parametrize("damage", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_no_precision_hides_damaged_weights(damage, name):
    model = make_model()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[7] = damage
    ids = tokens(model, 5)
    for precision in PRECISIONS:
        if precision in ("int8", "int4"):
            with pytest.raises(RunFailed, match=name):
                select_runner(model, precision)
        else:
            assert not whole(select_runner(model, precision)[0], ids).isfinite().all(1).any()


def test_where_no_compiler_is_installed_pip_brings_one(monkeypatch, tmp_path):
    """The package ziglang holds a whole compiler; it is the last that is looked for."""
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("SMOLFORGE_NATIVE", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NativeUnavailable, match="pip install ziglang"):
        build.find_compiler()
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: name == "ziglang")
    assert build.find_compiler() == (sys.executable, "-m", "ziglang", "c++")


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_ziglang_builds_computes_the_same(monkeypatch, tmp_path, precision):
    pytest.importorskip("ziglang", reason="pip install ziglang: a compiler for machines that have none")
    model, ids = make_model(), list(range(3, 40))
    expected = whole(CpuRunner(model, precision), ids)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    kernels.library.cache_clear()
    try:
        runner = CpuRunner(model, precision)
    finally:
        kernels.library.cache_clear()
    # Another compiler may fuse other multiplications with their additions.
    assert distance(whole(runner, ids), expected) < TOLERANCE[precision] / 10


def test_a_compiler_that_fails_is_reported(monkeypatch, tmp_path):
    bad = tmp_path / "c++"
    bad.write_text("#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'no such flag' >&2\nexit 1\n")
    bad.chmod(0o755)
    monkeypatch.setenv("CXX", str(bad))
    with pytest.raises(NativeUnavailable, match="no such flag"):
        build.build(tmp_path)


def test_the_library_is_built_once(tmp_path):
    path = build.build(tmp_path)
    made = path.stat().st_mtime_ns
    assert build.build(tmp_path) == path and path.stat().st_mtime_ns == made
    assert [p.name for p in tmp_path.iterdir()] == [path.name], "nothing half-built stays behind"


def test_decisions_are_explained():
    runner, decisions = select_runner(make_model(), "auto", threads=1)
    assert decisions == [
        "precision: fp32 (0 MiB of weights fit in the CPU cache; quantizing would not be faster)",
        f"kernels: {kernels.description()}",
        "engine: native C++, fp32, 1 thread",
    ]
    assert runner.name == "native C++, fp32, 1 thread"
    with pytest.raises(BadInput, match="int3"):
        select_runner(make_model(), "int3")
