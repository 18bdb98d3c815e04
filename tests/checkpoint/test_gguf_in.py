"""GGUF files as models: weights held to transformers' reading, tokenizers to the ones they were made from, refusals."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_files import byte_level, of_backend, write_gguf
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from smolforge import hub
from smolforge.checkpoint.format import read_generation_defaults, write_model
from smolforge.checkpoint.gguf import permute, unpermute
from smolforge.checkpoint.locate import load_model, resolve_model
from smolforge.config import ModelConfig
from smolforge.errors import BadInput, CheckpointError
from smolforge.export.gguf import export_gguf
from smolforge.gguf_file import open_gguf
from smolforge.model.architecture import build_model
from smolforge.tokenizer import Tokenizer

TEXTS = [
    "the cat sat on the mat and saw 12 other cats", "0123456789 3.14159 1,000,000", " two  spaces   three\n\n\n  end ",
    "naïve café 🙂👩‍👩‍👧 日本語テキスト العربية", "I'll don't WE'VE \t tabs\r\nand <|im_end|> <s> quoted", "", " ", "x",
    "e\u0301 \u00e9 ﬁ ½ ②", "def f(x):\n\treturn x**2  # ok",
]  # fmt: skip
TYPES = sorted(kind.name for kind in (*gguf.quants._type_traits, gguf.GGMLQuantizationType.F16))


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_exported_comes_back(tmp_path: Path, tied: bool) -> None:
    config = ModelConfig(
        vocab_size=300, hidden_size=96, intermediate_size=128, num_hidden_layers=2, num_attention_heads=6, head_dim=8,
        num_key_value_heads=2, max_position_embeddings=128, rope_theta=4321.0, tie_word_embeddings=tied,
        initializer_range=0.02,
    )  # fmt: skip
    module, tokenizer = build_model(config, seed=5), Tokenizer.train(TEXTS * 5, 300)
    tokenizer.chat_template = tokenizer.config["chat_template"] = "{{ messages[0].content }}"
    write_model(tmp_path / "m", config, module.state_dict(), tokenizer)
    path = export_gguf(tmp_path / "m", tmp_path / "cat.gguf", kind="f32").path
    found, read, where = load_model(path)
    assert where == path and found.config == config.model_copy(update={"rms_norm_eps": found.config.rms_norm_eps})
    assert found.config.rms_norm_eps == pytest.approx(config.rms_norm_eps)
    for name, tensor in module.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    assert [read.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    assert (read.eos_id, read.bos_id, read.special_ids) == (tokenizer.eos_id, tokenizer.bos_id, tokenizer.special_ids)
    assert read.chat_template == "{{ messages[0].content }}"


def test_rows_come_back_in_halves() -> None:
    rows = np.arange(48).reshape(24, 2)
    assert np.array_equal(unpermute(permute(rows, 3), 3), rows)


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_is_read_as_transformers_reads_it(tmp_path: Path, kind: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = write_gguf(tmp_path / "x.gguf", kind)
    ours = load_model(path)[0].state_dict()
    shape = load_gguf_checkpoint(str(path))["config"]
    theirs = LlamaForCausalLM(LlamaConfig(**{**shape, "rope_theta": 1e4})).eval()
    expected = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=theirs)["tensors"]
    assert sorted(ours) == sorted(expected)
    for name, tensor in expected.items():
        assert torch.equal(ours[name].float(), tensor.float()), name
    assert next(iter(ours.values())).dtype == (torch.bfloat16 if kind == "BF16" else torch.float32)


def _trained(split: str) -> Backend:
    """A tokenizer as its owners make it, with the splitting that llama.cpp calls by this name."""
    backend = Backend(models.BPE(ignore_merges=split == "llama-bpe"))
    digits = {"llama-bpe": "{1,3}", "qwen2": ""}.get(split)
    if digits is None:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        pattern = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        steps = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if split == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|end_of_text|>", "<|eot_id|>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    backend.train_from_iterator(TEXTS * 3, trainer)
    return backend


@pytest.mark.parametrize("split", ["gpt-2", "llama-bpe", "qwen2"])
def test_byte_level_tokenizers_are_the_ones_they_were_made_from(tmp_path: Path, split: str) -> None:
    backend = _trained(split)
    path = write_gguf(tmp_path / "x.gguf", tokenizer=of_backend(backend, split, bos=0))
    read = Tokenizer.from_pretrained(path)
    for text in TEXTS:
        expected = backend.encode(text, add_special_tokens=False).ids
        assert read.encode(text) == expected, text
        assert read.decode(expected) == backend.decode(expected)
    begins = read.encode_prompt("x")[:1] == [0]
    assert begins is (split == "llama-bpe"), "Llama 3's texts begin with a first token, as llama.cpp has it"
    assert read_generation_defaults(path)["eos_token_id"] == [0, 1], "the end of a turn is found by its name"


def _sentencepiece() -> tuple[Backend, dict[str, Any]]:
    """A tokenizer of Llama 2's kind from `tokenizers`, and the same as scores."""
    backend = Backend(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    backend.train_from_iterator(
        TEXTS[:3] * 3, trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    )
    import json

    file = json.loads(backend.to_str())
    file["added_tokens"] = file["added_tokens"][:3]
    backend = Backend.from_str(json.dumps(file))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    vocabulary = backend.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    ranks = {"".join(pair): -float(rank + 1) for rank, pair in reversed(list(enumerate(file["model"]["merges"])))}
    kinds = [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 260), 4]
    return backend, {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": [ranks.get(token, -1e4) for token in tokens], "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
    }  # fmt: skip


def test_a_sentencepiece_tokenizer_is_the_one_it_was_made_from(tmp_path: Path) -> None:
    backend, keys = _sentencepiece()
    read = Tokenizer.from_pretrained(write_gguf(tmp_path / "x.gguf", tokenizer=keys))
    for text in [*TEXTS, "a <tool> b"]:
        backend.encode_special_tokens = True
        assert read.encode(text) == backend.encode(text, add_special_tokens=False).ids, text
        assert read.decode(read.encode(text)) == backend.decode(read.encode(text))
    assert read.backend.encode("cat").ids[0] == 1 and read.bos_id == 1, "a text begins with <s> unless the file says no"
    keys |= {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_space_prefix": False}
    plain = Tokenizer.from_pretrained(write_gguf(tmp_path / "y.gguf", tokenizer=keys))
    assert plain.backend.encode("cat").ids == plain.encode("cat") and plain.decode(plain.encode(" cat")) == " cat"


def test_a_sentencepiece_tokenizer_is_exported_and_read_back(tmp_path: Path) -> None:
    _, keys = _sentencepiece()
    tokens, scores = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.scores"]
    # Sentencepiece's own scores differ for all tokens; equal ones have no order.
    keys["tokenizer.ggml.scores"] = [score - i / 1000 for i, score in enumerate(scores)]
    path = write_gguf(tmp_path / "x.gguf", "F32", tokenizer=keys, rows=len(tokens))
    first = Tokenizer.from_pretrained(path)
    second = Tokenizer.from_pretrained(export_gguf(path, tmp_path / "y.gguf", kind="f32").path)
    for text in [*TEXTS, "a <tool> b", "the the cat cats on onthemat"]:
        assert second.encode(text) == first.encode(text), text
        assert second.decode(first.encode(text)) == first.decode(first.encode(text))
    assert (
        second.backend.encode("cat").ids == first.backend.encode("cat").ids and second.special_ids == first.special_ids
    )
    module, _, _ = load_model(path)
    other, _ = _sentencepiece()  # trained by pairs: not every pair that makes a token is merged
    write_model(tmp_path / "m", module.config, module.state_dict(), Tokenizer(other, {"eos_token": "</s>"}))
    with pytest.raises(BadInput, match="sentencepiece vocabulary"):
        export_gguf(tmp_path / "m", tmp_path / "z.gguf")


REFUSED = [
    ({"architecture": "gemma3"}, "'gemma3' is not supported"),
    ({"keys": {"llama.expert_count": 8}}, "expert_count: 8"),
    ({"keys": {"llama.rope.scaling.type": "yarn"}}, "rope.scaling.type: 'yarn'"),
    ({"keys": {"split.count": 3}}, "one of 3 parts"),
    ({"drop": "token_embd"}, "no tensor token_embd.weight"),
    ({"drop": "blk.0.ffn_up"}, r"mlp.up_proj.weight' is missing"),
    ({"extra": {"blk.0.attn_q_norm.weight": np.ones(64, np.float32)}}, "blk.0.attn_q_norm.weight"),
    ({"tokenizer": {**byte_level(), "tokenizer.ggml.pre": "tekken"}}, "'tekken' is not supported"),
    ({"tokenizer": {**byte_level(), "tokenizer.ggml.pre": None}}, "None is not supported"),
    ({"tokenizer": {**byte_level(), "tokenizer.ggml.model": "t5"}}, "'t5' is not supported"),
    ({"tokenizer": {**byte_level(), "tokenizer.ggml.merges": ["zz qq"]}}, "do not belong to the tokens"),
    ({"tokenizer": {"tokenizer.ggml.model": "gpt2"}}, "no tokenizer.ggml.tokens"),
    ({"tokenizer": {**byte_level(), "tokenizer.ggml.tokens": [1, 2]}}, "tokens: is not an array of str"),
    ({"tokenizer": {**byte_level(), "tokenizer.ggml.token_type": 3}}, "token_type: is not an array of int"),
    ({"tokenizer": {**byte_level(), "tokenizer.ggml.token_type": [1, 3]}}, "has 2 tokenizer.ggml.token_type for"),
    ({"tokenizer": {**byte_level(), "tokenizer.ggml.merges": 3}}, "merges: is not an array of str"),
    ({"kind": "I8"}, "type I8"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_what_is_no_llama_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = write_gguf(tmp_path / "x.gguf", **changes)
    with pytest.raises(CheckpointError, match=words) as caught:
        load_model(path)
    assert str(path) in str(caught.value)


def test_a_big_endian_file_is_called_one(tmp_path: Path) -> None:
    data = bytearray(write_gguf(tmp_path / "x.gguf").read_bytes())
    data[4:8] = data[7:3:-1]
    (tmp_path / "y.gguf").write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="a big-endian file is not read"):
        load_model(tmp_path / "y.gguf")


def test_a_damaged_file_is_one_clear_error(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "x.gguf", "Q8_0").read_bytes()
    path, draw = tmp_path / "y.gguf", random.Random(0)
    header = open_gguf(tmp_path / "x.gguf").tensors["token_embd.weight"].start
    cuts = [whole[:size] for size in (0, 3, 4, 20, 100, header // 2, header, len(whole) - 1)]
    flips = []
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[draw.randrange(header if draw.random() < 0.9 else 200)] = draw.randrange(256)
        flips.append(bytes(damaged))
    for data in (*cuts, *flips):
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        try:
            load_model(path)
        except CheckpointError as error:
            assert str(path) in str(error)
        else:
            assert data not in cuts


def test_a_file_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[Any] = []
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *a, **k: (asked.append((a, k)), tmp_path / "x.gguf")[1]
    )
    address = "hf://bartowski/SmolLM2-135M-Instruct-GGUF@v1/sub/SmolLM2-Q4_K_M.gguf"
    assert resolve_model(address) == tmp_path / "x.gguf"
    assert asked == [(("bartowski/SmolLM2-135M-Instruct-GGUF", "sub/SmolLM2-Q4_K_M.gguf"), {"revision": "v1"})]

    def missing(*_: Any, **__: Any) -> None:
        from httpx import Request, Response

        errors = huggingface_hub.errors
        remote = getattr(errors, "RemoteEntryNotFoundError", errors.EntryNotFoundError)  # before version 1
        raise remote("404", response=Response(404, request=Request("GET", "u")))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", missing)
    with pytest.raises(CheckpointError, match=r"has no file x\.gguf on the Hub"):
        hub.fetch_gguf("hf://a/b/x.gguf")
    for address in ("hf://a/b/x.bin", "hf://a/b"):
        with pytest.raises(CheckpointError, match=r"not the address of a file\n *Write hf://OWNER/REPO/FILE\.gguf"):
            resolve_model(address)


def test_verbs_take_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import json

    from smolforge import cli

    def output(*words: str) -> Any:
        capsys.readouterr()
        assert cli.run([words[0], str(path), *words[1:]]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    path = write_gguf(tmp_path / "cat.gguf", "F16", keys={"llama.context_length": 64})
    assert output("summary", "--json")["parameters"] > 0
    assert len(output("generate", "the cat", "--max-tokens", "3", "--json")["completions"]) == 1
    (tmp_path / "x.txt").write_text("the cat sat on the mat")
    assert output("eval", "--data", str(tmp_path / "x.txt"), "--json")["loss"] > 0
    assert (
        output("export", "--to", "gguf", "--quantize", "f32", "--out", str(tmp_path / "y.gguf"), "--json")["tensors"]
        == 11
    )
    assert output("export", "--to", "checkpoint", "--out", str(tmp_path / "m"), "--json")["to"] == "checkpoint"
    first = load_model(path)
    for other in (tmp_path / "y.gguf", tmp_path / "m"):
        module, tokenizer, _ = load_model(other)
        assert module.config == first[0].config, other
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), first[0].parameters(), strict=True))
        assert tokenizer.encode("the cat <|im_end|>") == first[1].encode("the cat <|im_end|>")
        assert tokenizer.eos_id == first[1].eos_id and read_generation_defaults(other)["eos_token_id"] == [0, 2]
    assert cli.run(["export", str(path), "--to", "hub", "--out", "a/b", "--dry-run"]) == 2
    assert "is a GGUF file" in capsys.readouterr().err
    run = ["train", "pocket", "--init", str(path), "--data", str(tmp_path / "x.txt"), "--out", str(tmp_path / "run"), "--steps",
           "1", "--set", "data.sequence_length=32", "--set", "data.holdout=0", "--set", "training.tokens_per_step=64"]  # fmt: skip
    assert cli.run(run) == 0
    assert Tokenizer.from_pretrained(tmp_path / "run" / "checkpoints" / "last").encode("cat") == first[1].encode("cat")


def test_a_server_calls_a_file_by_its_stem(tmp_path: Path) -> None:
    from smolforge.serving.settings import ServeSettings
    from smolforge.serving.state import ModelSource

    path = write_gguf(tmp_path / "cat.gguf")
    source = ModelSource(str(path))
    assert (source.name, source.run, source.follows) == ("cat", None, False)
    loaded = source.open(ServeSettings(str(path)))
    assert loaded.created == path.stat().st_mtime and loaded.step is None
