"""The blocks of a GGUF file in the native step: the numbers of the file, and the same bits in any company."""

from __future__ import annotations

import ctypes
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tiny_llama import make_model

from smolforge import kernels
from smolforge.checkpoint.format import write_model
from smolforge.checkpoint.locate import load_model
from smolforge.errors import RunFailed
from smolforge.export.gguf import export_gguf
from smolforge.generation import Engine, SamplingParams
from smolforge.generation.runners import select_runner
from smolforge.generation.runners.cpu import CpuRunner
from smolforge.generation.sequence import ScheduledChunk
from smolforge.gguf_file import blocks_of
from smolforge.tokenizer import Tokenizer

pytestmark = pytest.mark.skipif(kernels.unavailable() is not None, reason="the native code cannot be built here")
TYPES = {"q8_0": (8, 0, 34), "q4_0": (4, 0, 18), "q4_1": (4, 1, 20)}  # bits, minima, bytes of a block


def make(place: Path, kind: str, *, tied: bool = True, shape: str = "one-kv"):
    module = make_model(shape, gain=0.1)
    module.config.tie_word_embeddings = module.config.tie_word_embeddings and tied
    write_model(place / "m", module.config, module.state_dict(), Tokenizer.train(["the cat sat on the mat " * 20], 300))
    return export_gguf(place / "m", place / f"{kind}.gguf", kind=kind).path


@pytest.mark.parametrize("kind", TYPES)
def test_packed_blocks_are_the_numbers_of_the_file(kind: str) -> None:
    bits, minima, size = TYPES[kind]
    draw, n, k, padded = np.random.default_rng(0), 70, 96, 128
    rows = draw.integers(0, 256, (n, k // 32, size), dtype=np.uint8)
    # Any finite half as scale and minimum, the smallest and negative ones too; -8 scales of Q4_0 stay finite.
    halves = (
        draw.integers(0, 0x6C00, (n, k // 32, 2), dtype=np.uint16)
        | draw.integers(0, 2, (n, k // 32, 2), dtype=np.uint16) << 15
    )
    halves[0, 0] = [0x0001, 0x8001]
    rows[..., :2] = halves[..., :1].view(np.uint8)
    if minima:
        rows[..., 2:4] = halves[..., 1:].copy().view(np.uint8)
    expected = gguf.quants.dequantize(rows.reshape(n, -1), gguf.GGMLQuantizationType[kind.upper()])
    units, each = -(-n // 32), 1 if bits == 8 else 2
    data = np.zeros((units, padded * 32 * bits // 8), np.uint8)
    scales = np.zeros((units, padded // 32, each, 32), np.float16)
    addresses = (ctypes.c_void_p * (units * 32))(*[row.ctypes.data for row in rows])
    to = ctypes.c_void_p(data.ctypes.data), ctypes.c_void_p(scales.ctypes.data), 2
    kernels.library().smolforge_pack_blocks(bits, minima, units, k, padded, addresses, *to)
    per = 32 // bits  # inputs of a word
    words = data.reshape(units, padded // per, 32, 4)
    values = words[..., None].astype(np.int32)
    if bits == 4:
        values = np.concatenate((values & 15, values >> 4), -1)  # a byte holds inputs i and i + 4
    values = values.transpose(0, 2, 1, 4, 3).reshape(units * 32, padded)[:n, :k] - (128 if bits == 8 else 0)
    fine = np.repeat(scales.transpose(2, 0, 3, 1).reshape(each, units * 32, -1), 32, -1)[:, :n, :k].astype(np.float32)
    found = values.astype(np.float32) * fine[0] + (fine[1] if bits == 4 else 0)
    if minima or bits == 8:
        assert np.array_equal(found, expected)
    else:  # 16 values of a scale; scale * value - 8 scale may differ from scale * (value - 8) in the last bit of fp32
        np.testing.assert_allclose(found, expected, rtol=3e-7)


def _logits(runner, ids, cuts=(1000,)):
    cache, parts, at = runner.new_cache(len(ids)), [], 0
    for cut in (*cuts, *[1] * len(ids)):
        if piece := ids[at : at + cut]:
            parts.append(runner.forward([ScheduledChunk(cache, piece, at, len(piece))]))
        at += cut
    return torch.cat(parts)


@pytest.mark.parametrize("shape", ["plain", "one-kv"])
@pytest.mark.parametrize("kind", TYPES)
def test_logits_are_those_of_the_decoded_weights(tmp_path: Path, kind: str, shape: str) -> None:
    module, _, _ = load_model(make(tmp_path, kind, shape=shape))
    runner, decisions = select_runner(module)
    assert isinstance(runner, CpuRunner) and "number for number" in decisions[0] and kind.upper() in decisions[0]
    ids = torch.randint(0, 290, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        expected = module(torch.tensor([ids]))[0]
    found = _logits(runner, ids)
    assert float((found - expected).norm() / expected.norm()) < 2e-4, "only activations are rounded, to 15 bits"
    assert torch.equal(found, _logits(runner, ids, (13, 1, 20))), "bitwise the same however the prompt is cut"
    quantized_again = _logits(CpuRunner(module, "int4"), ids)
    if kind == "q4_1":
        assert (found - expected).norm() < (quantized_again - expected).norm()
    caches = [runner.new_cache(60) for _ in range(5)]
    together = runner.forward([ScheduledChunk(cache, ids, 0, len(ids)) for cache in caches])
    assert torch.equal(together.view(5, len(ids), -1)[3], found)
    assert runner.weight_bytes < CpuRunner(module, "bf16").weight_bytes


def test_an_untied_embedding_in_four_bits(tmp_path: Path) -> None:
    path = make(tmp_path, "q4_1", shape="odd")
    module, _, _ = load_model(path)
    kinds = {name: found.kind for name, p in module.named_parameters() if (found := blocks_of(p))}
    assert not kinds, "rows of 72 are no whole blocks, so they stay f16"
    module = make_model("one-kv", gain=0.1)
    config = module.config.model_copy(update={"tie_word_embeddings": False})
    state = {**module.state_dict(), "lm_head.weight": module.state_dict()["model.embed_tokens.weight"] * 0.5}
    tokenizer = Tokenizer.train(["the cat sat on the mat " * 20], 300)
    write_model(tmp_path / "untied", config, state, tokenizer)
    module, _, _ = load_model(export_gguf(tmp_path / "untied", tmp_path / "untied.gguf", kind="q4_0").path)
    assert (
        blocks_of(module.model.embed_tokens.weight).kind == "Q4_0" and blocks_of(module.lm_head.weight).kind == "Q8_0"
    )
    ids = list(range(40))
    with torch.no_grad():
        expected = module(torch.tensor([ids]))[0]
    assert float((_logits(select_runner(module)[0], ids) - expected).norm() / expected.norm()) < 2e-4


def test_changed_weights_are_not_run_from_the_file(tmp_path: Path) -> None:
    path = make(tmp_path, "q8_0")
    module, tokenizer, _ = load_model(path)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.9)
    decisions = select_runner(module)[1]
    assert "number for number" not in decisions[0]
    engine = Engine.from_model(module, tokenizer, quantize="none")
    assert "fp32" in engine.runner.name
    fresh = Engine.from_pretrained(path)
    assert fresh.generate("the cat", SamplingParams(temperature=0, max_tokens=5)) and "file" in fresh.runner.name
    assert "int8" in Engine.from_pretrained(path, quantize="int8").runner.name, "what is asked for is done"


def test_infinite_scales_are_refused(tmp_path: Path) -> None:
    path = make(tmp_path, "q8_0")
    data = bytearray(path.read_bytes())
    from smolforge.gguf_file import open_gguf

    at = open_gguf(path).tensors["blk.0.ffn_up.weight"].start
    data[at : at + 2] = b"\x00\x7c"
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(bytes(data))
    with pytest.raises(RunFailed, match="NaN or infinite"):
        Engine.from_pretrained(bad)
