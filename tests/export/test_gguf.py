"""GGUF: read back by the library and by transformers, equal logits; what llama.cpp does not have is refused."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from smolforge import cli
from smolforge.checkpoint.format import write_model
from smolforge.checkpoint.locate import load_model
from smolforge.config import ModelConfig
from smolforge.errors import BadInput, RunFailed
from smolforge.export.gguf import KINDS, export_gguf, permute, split_rule, write_vocabulary
from smolforge.model.architecture import build_model
from smolforge.tokenizer import Tokenizer

TEXTS = ["the cat sat on the mat and saw 12 other cats, naïvely 🙂 " * 20]


def make(directory: Path, **changes: Any) -> tuple[torch.nn.Module, Tokenizer]:
    """A model directory whose widths are multiples of 32, so that everything can be quantized."""
    shape: dict[str, Any] = {
        "vocab_size": 320, "hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 128, "rope_theta": 4321.0,
        "rms_norm_eps": 3e-5,
    }  # fmt: skip
    config = ModelConfig(**{**shape, **changes})
    module, tokenizer = build_model(config, seed=5), Tokenizer.train(TEXTS, 300)
    write_model(directory, config, module.state_dict(), tokenizer)
    return module, tokenizer


def value(reader: Any, key: str) -> Any:
    return reader.fields[key].contents()


@pytest.mark.parametrize("tied", [True, False])
def test_what_the_file_says(tmp_path: Path, tied: bool) -> None:
    module, _ = make(tmp_path / "m", tie_word_embeddings=tied)
    done = export_gguf(tmp_path / "m", tmp_path / "sub" / "x.gguf", kind="f32", name="cat")
    reader = gguf.GGUFReader(done.path)
    expected = {
        "general.architecture": "llama", "general.name": "cat", "llama.block_count": 2, "llama.context_length": 128,
        "llama.embedding_length": 96, "llama.feed_forward_length": 128, "llama.attention.head_count": 6,
        "llama.attention.head_count_kv": 2, "llama.rope.dimension_count": 16, "llama.vocab_size": 320,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.add_bos_token": False,
    }  # fmt: skip
    assert {key: value(reader, key) for key in expected} == expected
    assert value(reader, "llama.rope.freq_base") == pytest.approx(4321.0)
    assert value(reader, "llama.attention.layer_norm_rms_epsilon") == pytest.approx(3e-5)
    names = {tensor.name for tensor in reader.tensors}
    assert ("output.weight" in names) is not tied
    assert len(names) == done.tensors == len(module.state_dict())
    assert done.bytes == done.path.stat().st_size
    assert [entry.name for entry in (tmp_path / "sub").iterdir()] == ["x.gguf"]


def test_the_vocabulary(tmp_path: Path) -> None:
    _, tokenizer = make(tmp_path / "m")
    reader = gguf.GGUFReader(export_gguf(tmp_path / "m", tmp_path / "x.gguf", kind="f16").path)
    tokens, kinds = value(reader, "tokenizer.ggml.tokens"), value(reader, "tokenizer.ggml.token_type")
    assert len(tokens) == len(kinds) == len(set(tokens)) == 320
    used = tokenizer.vocab_size
    assert tokens[:used] == [tokenizer.token_text(i) for i in range(used)]
    assert set(kinds[:17]) == {gguf.TokenType.CONTROL}
    assert set(kinds[17:used]) == {gguf.TokenType.NORMAL}
    assert set(kinds[used:]) == {gguf.TokenType.UNUSED}
    assert "tokenizer.ggml.padding_token_id" not in reader.fields, "this tokenizer has none"
    merges = [" ".join(pair) for pair in json.loads(tokenizer.backend.to_str())["model"]["merges"]]
    assert value(reader, "tokenizer.ggml.merges") == merges and len(merges) == used - 273


def test_every_weight_comes_back_bit_for_bit(tmp_path: Path) -> None:
    module, _ = make(tmp_path / "m", tie_word_embeddings=False)
    reader = gguf.GGUFReader(export_gguf(tmp_path / "m", tmp_path / "x.gguf", kind="f32").path)
    found = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    state = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, array in state.items():
        heads = {"q_proj": 6, "k_proj": 2}.get(name.split(".")[-2])
        if heads:  # undone by its inverse: neighbouring pairs back to halves
            pairs = found[names.get_name(name, try_suffixes=(".weight",))]
            back = pairs.reshape(heads, 8, 2, 96).swapaxes(1, 2).reshape(array.shape)
            assert not np.array_equal(pairs, array)
        else:
            back = found[names.get_name(name, try_suffixes=(".weight",))]
        assert np.array_equal(back, array), name


def test_the_order_of_rows() -> None:
    rows = np.arange(16)[:, None]
    assert permute(rows, 2).ravel().tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]


# Largest difference of logits, relative to the largest logit: exact, 11 and 8 bits, 8 and 4 bits per weight.
TOLERANCE = {"f32": 1e-5, "f16": 5e-3, "bf16": 3e-2, "q8_0": 5e-2, "q4_0": 0.6, "q4_1": 0.6}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_transformers_reads_it_with_our_logits(tmp_path: Path, kind: str, tied: bool) -> None:
    # The loader itself; `from_pretrained(gguf_file=...)` is this and, for placing weights, the package accelerate.
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    module, _ = make(tmp_path / "m", tie_word_embeddings=tied)
    path = str(export_gguf(tmp_path / "m", tmp_path / "x.gguf", kind=kind).path)
    shape = load_gguf_checkpoint(path)["config"]
    theirs = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=theirs)["tensors"]
    found = theirs.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=False)
    assert found.unexpected_keys == [] and set(found.missing_keys) <= ({"lm_head.weight"} if tied else set())
    ids = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, read = module(ids), theirs(ids).logits
    error = (ours - read).abs().max().item()
    assert error < TOLERANCE[kind] * max(1.0, ours.abs().max().item())
    assert theirs.config.tie_word_embeddings is tied


@pytest.mark.parametrize(("kind", "bits"), [("q8_0", 8.5), ("q4_0", 4.5)])
def test_quantized_files_are_as_small_and_as_close_as_their_kind(tmp_path: Path, kind: str, bits: float) -> None:
    module, _ = make(tmp_path / "m")
    done = export_gguf(tmp_path / "m", tmp_path / "x.gguf", kind=kind)
    state = {t.name: t for t in gguf.GGUFReader(done.path).tensors}
    types = {name: tensor.tensor_type.name for name, tensor in state.items()}
    assert types["token_embd.weight"] == "Q8_0", "the tied embedding is the head"
    assert {types[name] for name in types if "norm" in name} == {"F32"}
    up = state["blk.0.ffn_up.weight"]
    assert up.tensor_type.name == kind.upper()
    assert up.n_bytes * 8 / up.n_elements == bits
    weight = module.state_dict()["model.layers.0.mlp.up_proj.weight"].numpy()
    error = np.abs(gguf.quants.dequantize(up.data, up.tensor_type) - weight)
    if kind == "q8_0":  # half a step, and at the largest weight (127 steps) the rounding of the scale to f16
        bound = np.abs(weight.reshape(-1, 32)).max(axis=1, keepdims=True) / 127 * (0.5 + 127 / 2**11)
        assert (error.reshape(-1, 32) <= bound + 1e-7).all()
    else:  # a weight makes good what rounding others does, so only the whole is bounded
        assert np.linalg.norm(error) < 0.15 * np.linalg.norm(weight)


@pytest.mark.parametrize("kind", ["q4_0", "q4_1"])
def test_four_bits_are_chosen_by_what_the_layers_see(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    module, tokenizer = make(tmp_path / "m")
    (tmp_path / "cats.txt").write_text(TEXTS[0] * 20)
    caplog.set_level("INFO", "smolforge")
    ids = torch.tensor([tokenizer.encode(TEXTS[0])[:128]])

    def change(path: Path) -> float:
        with torch.no_grad():
            return float((load_model(path)[0](ids) - module(ids)).norm())

    by_itself = export_gguf(tmp_path / "m", tmp_path / "itself.gguf", kind=kind).path
    assert "2,048 tokens of text of the model itself" in caplog.text
    source = {str(tmp_path / "cats.txt"): 1.0}
    by_text = export_gguf(tmp_path / "m", tmp_path / "text.gguf", kind=kind, calibration=source).path
    assert "cats.txt" in caplog.text
    again = export_gguf(tmp_path / "m", tmp_path / "again.gguf", kind=kind, name="m").path
    assert again.read_bytes() == by_itself.read_bytes(), "nothing is drawn anew"
    plain = tmp_path / "plain.gguf"
    state = dict(module.state_dict())
    for name, tensor in state.items():
        if tensor.ndim == 2 and "embed" not in name:
            type = gguf.GGMLQuantizationType[kind.upper()]
            state[name] = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(tensor.numpy(), type), type))
    write_model(tmp_path / "rounded", module.config, state, tokenizer)  # type: ignore[arg-type]
    plain = export_gguf(tmp_path / "rounded", plain, kind="q8_0").path
    assert change(by_text) < 0.9 * change(plain) and change(by_itself) < change(plain)


def test_a_file_of_the_same_type_keeps_its_blocks(tmp_path: Path) -> None:
    make(tmp_path / "m")
    first = export_gguf(tmp_path / "m", tmp_path / "x.gguf", kind="q4_1", name="cat").path
    again = export_gguf(first, tmp_path / "y.gguf", kind="q4_1", name="cat").path
    found, kept = ({t.name: bytes(t.data) for t in gguf.GGUFReader(path).tensors} for path in (again, first))
    assert found == kept


def test_too_little_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "m")
    (tmp_path / "short.txt").write_text("the cat")
    words = ["export", str(tmp_path / "m"), "--to", "gguf", "--out", str(tmp_path / "x.gguf"), "--calibration"]
    assert cli.run([*words, str(tmp_path / "short.txt"), "--quantize", "q4_1"]) != 0
    assert "128 at least are needed" in capsys.readouterr().err
    assert cli.run([*words, str(tmp_path / "none.txt"), "--quantize", "q4_1"]) != 0
    assert capsys.readouterr().err.startswith("error: --calibration: no such file")
    assert cli.run([*words, "tales", "--quantize", "q8_0"]) == 2
    assert "q4_0 or q4_1" in capsys.readouterr().err and not (tmp_path / "x.gguf").exists()


def test_rows_that_do_not_fill_blocks_stay_f16_with_a_message(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path / "m", intermediate_size=40)
    caplog.set_level("INFO", "smolforge")
    done = export_gguf(tmp_path / "m", tmp_path / "x.gguf", kind="q8_0")
    assert "2 tensors stay f16" in caplog.text and "blk.0.ffn_down.weight" in caplog.text
    kept = {tensor.name for tensor in gguf.GGUFReader(done.path).tensors if tensor.tensor_type.name == "F16"}
    assert kept == {"blk.0.ffn_down.weight", "blk.1.ffn_down.weight"}


def test_a_head_dim_of_its_own(tmp_path: Path) -> None:
    make(tmp_path / "m", head_dim=32)
    reader = gguf.GGUFReader(export_gguf(tmp_path / "m", tmp_path / "x.gguf", kind="f32").path)
    assert value(reader, "llama.attention.key_length") == value(reader, "llama.rope.dimension_count") == 32


def test_refusals(tmp_path: Path) -> None:
    make(tmp_path / "m")
    (tmp_path / "d").mkdir()
    with pytest.raises(BadInput, match="q4_0"):
        export_gguf(tmp_path / "m", tmp_path / "x.gguf", kind="q5_9")
    with pytest.raises(BadInput, match="is a directory"):
        export_gguf(tmp_path / "m", tmp_path / "d")
    with pytest.raises(BadInput, match="cannot make"):
        export_gguf(tmp_path / "m", tmp_path / "m" / "config.json" / "x.gguf")
    path = export_gguf(tmp_path / "m", tmp_path / "own.gguf", kind="f32").path
    with pytest.raises(BadInput, match="is the model itself"):
        export_gguf(path, path)
    config = ModelConfig(
        architecture="recreation", vocab_size=320, hidden_size=48, num_attention_heads=3, num_key_value_heads=3,
        num_hidden_layers=1, intermediate_size=64,
    )  # fmt: skip
    write_model(tmp_path / "r", config, build_model(config).state_dict(), Tokenizer.train(TEXTS, 300))
    with pytest.raises(BadInput, match="recreation"):
        export_gguf(tmp_path / "r", tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"normalizer": {"type": "NFC"}}, "NFC"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}}, "ByteLevel"),
        ({"pre_tokenizer": None}, "None"),
        ({"decoder": {"type": "Fuse"}}, "Fuse"),
    ],
)
def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(change: dict[str, Any], words: str) -> None:
    file = json.loads(Tokenizer.train(TEXTS, 300).backend.to_str())
    with pytest.raises(BadInput, match=words):
        split_rule({**file, **change})


def test_the_plain_gpt2_rule_has_its_name() -> None:
    file = json.loads(Tokenizer.train(TEXTS, 300).backend.to_str())
    file["pre_tokenizer"] = file["pre_tokenizer"]["pretokenizers"][1]
    assert split_rule(file) == "gpt-2"


@pytest.mark.parametrize("bad", [float("nan"), 1e5])
def test_weights_that_do_not_fit_are_refused_and_the_old_file_stays(tmp_path: Path, bad: float) -> None:
    module, tokenizer = make(tmp_path / "m")
    done = export_gguf(tmp_path / "m", tmp_path / "x.gguf", kind="f16")
    before = done.path.read_bytes()
    state = dict(module.state_dict())
    state["model.layers.0.mlp.up_proj.weight"] = state["model.layers.0.mlp.up_proj.weight"].clone()
    state["model.layers.0.mlp.up_proj.weight"][3, 3] = bad
    write_model(tmp_path / "m", module.config, state, tokenizer)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="up_proj"):
        export_gguf(tmp_path / "m", tmp_path / "x.gguf", kind="f16")
    assert done.path.read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["m", "x.gguf"]


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "m")

    def sync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(RunFailed, match="bytes are needed"):
        export_gguf(tmp_path / "m", tmp_path / "x.gguf", kind="f32")
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


def test_bf16_checkpoints_export_unchanged(tmp_path: Path) -> None:
    module, tokenizer = make(tmp_path / "m")
    write_model(tmp_path / "b", module.config, module.state_dict(), tokenizer, dtype=torch.bfloat16)  # type: ignore[arg-type]
    reader = gguf.GGUFReader(export_gguf(tmp_path / "b", tmp_path / "x.gguf", kind="bf16").path)
    up = next(t for t in reader.tensors if t.name == "blk.1.ffn_up.weight")
    stored = module.state_dict()["model.layers.1.mlp.up_proj.weight"].bfloat16().view(torch.uint8).numpy()
    assert np.array_equal(up.data.view(np.uint8).reshape(stored.shape), stored)


def test_the_genuine_tokenizer_goes_in_whole(real_data: Path, tmp_path: Path) -> None:
    directory = real_data / "tokenizer" / "smollm2-135m-instruct"
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    write_vocabulary(gguf, writer, directory, Tokenizer.from_pretrained(directory), 49_152)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    kinds = value(reader, "tokenizer.ggml.token_type")
    assert len(value(reader, "tokenizer.ggml.tokens")) == len(kinds) == 49_152
    assert value(reader, "tokenizer.ggml.pre") == "smollm" and gguf.TokenType.UNUSED not in kinds
    assert len(value(reader, "tokenizer.ggml.merges")) > 48_000
    assert [i for i, kind in enumerate(kinds) if kind == gguf.TokenType.CONTROL] == list(range(17))
    ids = {"bos": 1, "eos": 2, "padding": 2, "unknown": 0}
    assert {name: value(reader, f"tokenizer.ggml.{name}_token_id") for name in ids} == ids
    assert "<|im_start|>" in value(reader, "tokenizer.chat_template")
