"""Adapters: what learns, their form on disk, merging, and the promises of resuming."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from chat_runs import QUICK, SHAPE, kill_and_resume, make_base, run_on_two_ranks, steps_of, weights_of, words
from safetensors.torch import load_file, save_file

from smolforge.checkpoint.format import write_model
from smolforge.checkpoint.locate import load_model
from smolforge.checkpoint.state import load_state
from smolforge.cli import run as smolforge
from smolforge.config import LoraConfig, ModelConfig, build_config
from smolforge.generation.engine import Engine
from smolforge.generation.sampling_params import SamplingParams
from smolforge.model.architecture import build_model
from smolforge.model.lora import add_adapter, count_adapter_parameters
from smolforge.model.summary import estimate_memory
from smolforge.run import Run
from smolforge.tokenizer import Tokenizer

IDS = torch.arange(3, 63).reshape(2, 30)


def command(base: Path, data: Path, out: Path, *more: str) -> list[str]:
    return words(base, data, out, "--lora", "4", "--lr", "0.01", *more)


@pytest.fixture(scope="module")
def whole(place: Path, base: Path, data: Path) -> Run:
    """The run that nothing happened to."""
    assert smolforge(command(base, data, place / "whole")) == 0
    return Run(place / "whole")


@torch.no_grad()
def logits_of(model: Path, adapter: Path | None = None) -> torch.Tensor:
    module, _, _ = load_model(model, adapter=adapter)
    return module(IDS)


def plain_logits(base: Path, adapter: Path) -> torch.Tensor:
    """Written out: x Wᵀ + alpha / r (x Aᵀ) Bᵀ in transformers' model, from the adapter's file alone."""
    from transformers import AutoModelForCausalLM

    config, found = (
        json.loads((adapter / "adapter_config.json").read_text()),
        load_file(adapter / "adapter_model.safetensors"),
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)

    def add(first: torch.Tensor, second: torch.Tensor):
        scale = config["lora_alpha"] / config["r"]
        return lambda _, inputs, output: output + scale * (inputs[0] @ first.T) @ second.T

    names = [
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for name in found if "lora_A" in name
    ]
    for name in names:
        a, b = (found[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        model.get_submodule(name).register_forward_hook(add(a, b))
    assert len(names) == 2 * 7
    with torch.no_grad():
        return model(IDS).logits


def test_only_the_adapter_learns(whole: Run, base: Path) -> None:
    losses = [loss for _, loss, _ in steps_of(whole)]
    assert losses[-1] < losses[0] - 0.1
    checkpoint = whole.checkpoints_path / "last"
    adapter = load_file(checkpoint / "adapter" / "adapter_model.safetensors")
    state = load_state(checkpoint / "training")
    assert {f"base_model.model.{name}" for name in state["optimizer"]} == set(adapter)
    config = build_config(str(whole.config_path))
    assert config.lora.r == 4 and config.lora.lora_alpha == 8 and config.preset == "lora"
    assert sum(t.numel() for t in adapter.values()) == count_adapter_parameters(SHAPE, config.lora)
    before, after = load_file(base / "model.safetensors"), load_file(checkpoint / "model.safetensors")
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {name for name in before if "_proj" in name}
    assert "by an adapter" in (checkpoint / "README.md").read_text()


def test_the_checkpoint_is_the_base_with_its_adapter_merged(whole: Run, base: Path) -> None:
    checkpoint = (whole.checkpoints_path / "last").resolve()
    plain = plain_logits(base, checkpoint / "adapter")
    assert (plain - logits_of(base)).abs().max() > 0.1
    for found in (logits_of(checkpoint), logits_of(base, adapter=whole.path), logits_of(checkpoint / "adapter")):
        torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-5)


def test_the_running_adapter_is_the_merged_one(base: Path) -> None:
    module, _, _ = load_model(base)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"])
    add_adapter(module, config, seed=1)
    matrices = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert len(matrices) == 2 * 2 * SHAPE.num_hidden_layers
    with torch.no_grad():
        for parameter in matrices.values():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()), std=0.1)
    weights = load_file(base / "model.safetensors")
    for name, first in matrices.items():
        if "lora_A" in name:
            target = name.replace("lora_A.weight", "weight")
            weights[target] = weights[target] + 5 / 3 * matrices[name.replace("lora_A", "lora_B")] @ first
    merged = build_model(SHAPE, seed=None)
    merged.load_state_dict(weights)
    torch.testing.assert_close(module(IDS), merged(IDS), atol=1e-5, rtol=1e-5)
    # The gradients of the two matrices are those that the merged matrix's gradient implies.
    module.loss(IDS[:, :-1], IDS[:, 1:])[0].backward()
    merged.loss(IDS[:, :-1], IDS[:, 1:])[0].backward()
    q, full = "model.layers.1.self_attn.q_proj", dict(merged.named_parameters())
    whole = full[f"{q}.weight"].grad
    first, second = matrices[f"{q}.lora_A.weight"], matrices[f"{q}.lora_B.weight"]
    assert whole is not None and first.grad is not None and second.grad is not None
    torch.testing.assert_close(first.grad, 5 / 3 * second.T @ whole, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(second.grad, 5 / 3 * whole @ first.T, atol=1e-4, rtol=1e-4)
    assert all(p.grad is None for name, p in module.named_parameters() if "lora" not in name)


def test_peft_loads_and_writes_the_same_adapters(whole: Run, base: Path, place: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    from transformers import AutoModelForCausalLM

    adapter = whole.checkpoints_path / "last" / "adapter"
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    with torch.no_grad():
        theirs = model(IDS).logits
        torch.testing.assert_close(logits_of(base, adapter=adapter), theirs, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.merge_and_unload()(IDS).logits, theirs, atol=1e-5, rtol=1e-5)
    config = peft.LoraConfig(r=5, lora_alpha=7, target_modules="all-linear", init_lora_weights=False, use_rslora=True)
    made = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    made.save_pretrained(place / "theirs")
    with torch.no_grad():
        torch.testing.assert_close(logits_of(place / "theirs"), made(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_killed_in_the_middle_an_adapter_ends_with_the_same_bytes(
    place: Path, base: Path, data: Path, whole: Run
) -> None:
    run = Run(place / "killed")
    kill_and_resume(command(base, data, run.path), run, whole=whole)
    files = [each.checkpoints_path / "last" / "adapter" / "adapter_model.safetensors" for each in (run, whole)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
def test_two_ranks_learn_an_adapter_from_the_same_batches(place: Path, base: Path, data: Path, whole: Run) -> None:
    run = Run(place / "ranks")
    run_on_two_ranks(command(base, data, run.path))
    assert [(step, digest) for step, _, digest in steps_of(run)] == [(s, d) for s, _, d in steps_of(whole)]
    np.testing.assert_allclose([x for _, x, _ in steps_of(run)], [x for _, x, _ in steps_of(whole)], rtol=2e-4)


def test_in_bf16_the_base_is_kept_in_bf16_and_the_adapter_in_fp32(place: Path, base: Path, data: Path) -> None:
    out = place / "bf16"
    more = ["--set", "training.precision=bf16", "--set", "training.steps=4"]
    assert smolforge(command(base, data, out, *more)) == 0
    found = load_file(out / "checkpoints" / "last" / "model.safetensors")
    before = load_file(base / "model.safetensors")
    name = "model.embed_tokens.weight"
    assert found[name].dtype == torch.float32 and torch.equal(found[name], before[name].bfloat16().float())
    adapter = load_file(out / "checkpoints" / "last" / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}


def test_every_verb_takes_an_adapter(whole: Run, base: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def printed(*arguments: str) -> dict[str, object]:
        assert smolforge([*arguments, "--json"]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    greedy, run, both = (
        ["--temperature", "0", "--max-tokens", "12"],
        str(whole.path),
        [str(base), "--adapter", str(whole.path)],
    )
    # The base has no chat template; the adapter brings the one it was trained with.
    assert (
        printed("chat", both[0], "Why?", *both[1:], *greedy)["answer"]
        == printed("chat", run, "Why?", *greedy)["answer"]
    )
    ours, theirs = (
        printed("generate", *model, "--quantize", "none", *greedy)["completions"] for model in ([run], both)
    )
    assert ours == theirs
    scores = [printed("eval", *model, "--data", "tales", "--tokens", "2k")["loss"] for model in ([run], both)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)
    printed("export", *both, "--to", "merged", "--out", str(place / "merged"))
    printed("export", str(whole.checkpoints_path / "last" / "adapter"), "--to", "merged", "--out", str(place / "again"))
    printed("export", run, "--to", "merged", "--out", str(place / "copied"))
    for name in ("merged", "again", "copied"):
        torch.testing.assert_close(logits_of(place / name), logits_of(whole.path), atol=1e-5, rtol=1e-5)
        assert Engine.from_pretrained(place / name).eos_ids == Engine.from_pretrained(whole.path).eos_ids
    printed("export", str(place / "merged"), "--to", "gguf", "--out", str(place / "merged.gguf"), "--quantize", "f32")


def test_serve_takes_an_adapter(whole: Run, base: Path) -> None:
    pytest.importorskip("fastapi", reason="serving needs the extra `web`")
    from smolforge.serving.settings import ServeSettings
    from smolforge.serving.state import ModelSource

    settings = ServeSettings(str(base), adapter=str(whole.path), quantize="none")
    served = ModelSource(settings.model).open(settings).engine
    params = SamplingParams(max_tokens=12, temperature=0.0)
    assert served.generate("Once", params) == Engine.from_pretrained(whole.path, quantize="none").generate(
        "Once", params
    )


def test_what_a_lora_run_is_cannot_be_changed(
    place: Path, base: Path, data: Path, whole: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert smolforge(words(base, data, whole.path, "--lora", "8")) == 2
    assert "was started with 4, not 8" in capsys.readouterr().err
    moved = make_base(place / "moved")
    run = Run(place / "shorter")
    assert smolforge(command(moved, data, run.path, "--set", "training.steps=4")) == 0
    before = weights_of(run)
    weights = load_file(moved / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 2
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    assert smolforge(command(moved, data, run.path, "--set", "training.steps=8")) == 2
    assert "has other weights than when the run started" in capsys.readouterr().err
    shutil.rmtree(moved)
    assert smolforge(command(moved, data, run.path, "--set", "training.steps=8")) == 2
    assert "no such directory" in capsys.readouterr().err
    assert weights_of(run) == before


def test_bad_adapters_are_one_error(
    whole: Run, base: Path, data: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*arguments: str) -> str:
        assert smolforge([*arguments]) in (1, 2)
        return capsys.readouterr().err

    source = whole.checkpoints_path / "last" / "adapter"

    def changed(name: str, **values: object) -> str:
        shutil.copytree(source, place / name)
        path = place / name / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
        return str(place / name)

    generate = ["generate", str(base), "Once", "--adapter"]
    assert f"{base} holds no adapter" in error(*generate, str(base))
    (place / "empty").mkdir()
    assert "error: --adapter: " in (told := error(*generate, str(place / "empty"))) and "A model is" not in told
    assert "dora" in error(*generate, changed("dora", use_dora=True))
    assert "rank_pattern" in error(*generate, changed("pattern", rank_pattern={"q_proj": 2}))
    assert "in an adapter of rank 7" in error(*generate, changed("rank", r=7))
    assert "peft_type" in error(*generate, changed("kind", peft_type="IA3"))
    assert "does not say which model" in error("generate", changed("orphan", base_model_name_or_path=None), "Once")
    cut = Path(changed("cut")) / "adapter_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-8])
    assert "cut/adapter_model.safetensors" in error(*generate, str(place / "cut"))
    other = make_base_of(place / "other", SHAPE.model_copy(update={"hidden_size": 24, "head_dim": 6}))
    assert "does not fit" in error("generate", str(other), "Once", "--adapter", str(source))
    assert "--to merged" in error("export", str(source), "--to", "gguf", "--out", str(place / "x.gguf"))
    assert "has no adapter to merge" in error("export", str(base), "--to", "merged", "--out", str(place / "x"))
    assert "not of --to gguf" in error(
        "export", str(base), "--adapter", "x", "--to", "gguf", "--out", str(place / "x.gguf")
    )
    bad = ["finetune", str(base), "--data", str(data), "--out", str(place / "bad"), *QUICK]
    assert "Did you mean 'q_proj'" in error(*bad, "--lora", "4", "--set", "lora.target_modules=[q_prj]")
    assert "--lora: '0' must be at least 1" in error(*bad, "--lora", "0")
    assert "lora.r" in error("train", "pocket", "--set", "lora.r=4", "--out", str(place / "bad"))
    assert not (place / "bad" / "config.yaml").exists()


def make_base_of(path: Path, shape: ModelConfig) -> Path:
    tokenizer = Tokenizer.from_pretrained(path.parent / "base")
    write_model(path, shape, build_model(shape, seed=1).state_dict(), tokenizer)
    return path


def test_a_model_without_rows_for_chat_tokens_is_refused(
    place: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={"<|endoftext|>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    shape = SHAPE.model_copy(update={"vocab_size": 257})
    write_model(place / "bytes", shape, build_model(shape, seed=1).state_dict(), Tokenizer(backend))
    assert smolforge(command(place / "bytes", data, place / "grown")) == 2
    assert "has no rows for 2 special tokens" in capsys.readouterr().err


def test_memory_of_an_adapter() -> None:
    shape, lora = ModelConfig(), LoraConfig(r=16)
    own = count_adapter_parameters(shape, lora)
    assert own == 16 * 30 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536))
    options = {"sequences": 2, "length": 512, "computed": torch.bfloat16, "loss": "native"}
    full, adapter = estimate_memory(shape, **options), estimate_memory(shape, adapter=own, **options)
    assert adapter.gradients == 4 * own and adapter.moments == 8 * own
    assert full.total < 4e9 and adapter.total < 2e9
