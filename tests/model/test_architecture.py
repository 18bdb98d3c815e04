"""The record of an architecture: one new file in the folder is enough to train, save, load and write with a model."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from smolforge.config import ModelConfig
from smolforge.errors import BadInput
from smolforge.model import architecture
from smolforge.model.architecture import CausalLM, architecture_of, build_model, config_from_hf, config_to_hf
from smolforge.model.loss import IGNORE

SMALL = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 128}  # fmt: skip
LLAMA = ModelConfig(**SMALL, num_key_value_heads=2)
RECREATION = ModelConfig(**SMALL, num_key_value_heads=4, architecture="recreation")

# A third architecture: attention and MLP read the same norm and are added together (Wang & Komatsuzaki 2021, GPT-J).
PARALLEL = """
from torch import Tensor, nn

from smolforge.model.architecture import Architecture, CausalLM, Decoder, register
from smolforge.model.llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, rotary_angles


class Block(nn.Module):
    def __init__(self, config, options, layer):
        super().__init__()
        self.ln = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn, self.mlp = LlamaAttention(config, options, layer), LlamaMLP(config)

    def forward(self, x, cos, sin, mask, cache=None):
        normed = self.ln(x)
        return x + self.attn(normed, cos, sin, mask, cache) + self.mlp(normed)


class ParallelModel(Decoder):
    def __init__(self, config, options):
        super().__init__(options)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, options, layer) for layer in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.config = config

    def rotation(self, positions):
        return rotary_angles(positions, self.config.head_dim, self.config.rope_theta)


class ParallelForCausalLM(CausalLM):
    decoder_class, decoder_name = ParallelModel, "body"


register(
    Architecture(
        name="parallel", label="parallel", model_type="smolforge_parallel", class_name="ParallelForCausalLM",
        build=ParallelForCausalLM,
    )
)
"""


@pytest.fixture
def parallel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The file of a third architecture, found as if it lay in src/smolforge/model."""
    folder = tmp_path / "architectures"
    folder.mkdir()
    (folder / "parallel_blocks.py").write_text(PARALLEL)
    monkeypatch.setattr(architecture.package, "__path__", [*architecture.package.__path__, str(folder)])
    yield
    architecture._REGISTRY.pop("parallel", None)
    sys.modules.pop("smolforge.model.parallel_blocks", None)


def test_one_file_trains_saves_loads_and_writes(parallel, tmp_path: Path) -> None:
    from smolforge.checkpoint.card import card_text
    from smolforge.checkpoint.locate import load_model
    from smolforge.cli import run
    from smolforge.config import build_config
    from smolforge.export.gguf import export_gguf

    sections = {"model": {**SMALL, "architecture": "parallel", "num_key_value_heads": 2, "vocab_size": 300},
                "tokenizer": {"train": {"vocab_size": 300, "documents": 100}}}  # fmt: skip
    short = ["data.sequence_length=32", "data.lanes=2", "training.tokens_per_step=64", "data.workers=0",
             "evaluation.tokens=64", "samples.max_tokens=2", "training.compile=off"]  # fmt: skip
    path = tmp_path / "parallel.yaml"
    path.write_text(build_config(None, short, **sections).to_yaml())
    assert run(["train", str(path), "--out", str(tmp_path / "run"), "--steps", "2"]) == 0
    model, _, directory = load_model(tmp_path / "run")
    assert type(model).__name__ == "ParallelForCausalLM" and architecture_of(model.config).label == "parallel"
    assert run(["generate", str(tmp_path / "run"), "Once upon", "--max-tokens", "4"]) == 0
    assert "ParallelForCausalLM" in (directory / "README.md").read_text()
    assert "custom-architecture" in card_text(build_config(str(tmp_path / "run" / "config.yaml")), step=2)
    with pytest.raises(BadInput, match=r"llama\.cpp"):
        export_gguf(directory, tmp_path / "model.gguf")


def test_an_unknown_architecture_names_the_nearest() -> None:
    with pytest.raises(BadInput, match="llama"):
        build_model(ModelConfig(architecture="lama"))
    with pytest.raises(BadInput, match="attention"):
        build_model(LLAMA, attention="spda")
    with pytest.raises(BadInput, match="loss"):
        build_model(LLAMA, loss="chunk")


@pytest.mark.parametrize("config", [LLAMA, RECREATION], ids=["llama", "recreation"])
def test_config_json_and_back(config: ModelConfig) -> None:
    assert config_from_hf(config_to_hf(config)) == config


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(97, (3, 17), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[0, :4] = IGNORE
    return tokens[:, :-1].contiguous(), targets, torch.arange(16).ge(7).long().expand(3, -1).contiguous()


@pytest.mark.parametrize("config", [LLAMA, RECREATION], ids=["llama", "recreation"])
@pytest.mark.parametrize("mask", [False, True])
def test_the_loss_is_that_of_the_logits(config: ModelConfig, mask: bool) -> None:
    model = build_model(config)
    inputs, targets, documents = batch()
    ids = documents if mask else None
    logits = model(inputs, document_ids=ids)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    extra = 0.01 * logits.logsumexp(-1)[targets != IGNORE].square().sum()
    loss, nats = model.loss(inputs, targets, document_ids=ids, scale=0.5, z_weight=0.01)
    assert torch.allclose(nats, expected, rtol=1e-5) and not nats.requires_grad
    assert torch.allclose(loss, 0.5 * (expected + extra), rtol=1e-5) and loss.requires_grad
    with torch.no_grad():
        still, same = model.loss(inputs, targets, document_ids=ids, scale=0.5, z_weight=0.01)
    assert torch.allclose(still.float(), loss, rtol=1e-5) and torch.allclose(same.float(), nats, rtol=1e-5)


class LossModule(torch.nn.Module):
    """The loss as a forward pass, which is what `DistributedDataParallel` can wrap."""

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, *arguments, **options) -> tuple[Tensor, Tensor]:
        return self.model.loss(*arguments, **options)


@pytest.mark.parametrize("config", [LLAMA, RECREATION], ids=["llama", "recreation"])
def test_data_parallel_wraps_the_loss(config: ModelConfig, tmp_path: Path) -> None:
    inputs, targets, documents = batch()
    alone, wrapped = build_model(config), build_model(config)
    alone.loss(inputs, targets, document_ids=documents, scale=0.1)[0].backward()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(LossModule(wrapped))
        parallel(inputs, targets, document_ids=documents, scale=0.1)[0].backward()
    finally:
        torch.distributed.destroy_process_group()
    for mine, theirs in zip(alone.parameters(), wrapped.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None and torch.equal(mine.grad, theirs.grad)


def test_hidden_matrices_are_those_between_embedding_and_head() -> None:
    names = build_model(LLAMA).hidden_matrices()
    assert len(names) == 2 * 7 and all(name.endswith("_proj.weight") for name in names)
    assert len(build_model(RECREATION).hidden_matrices()) == 2 * 7
