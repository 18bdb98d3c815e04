"""Every preset validates and counts what it says, and the released ones are the released models."""

import json
import math
import re
from importlib import resources
from pathlib import Path

import pytest
import torch

from smolforge import config as configuration
from smolforge.config import RunConfig
from smolforge.model.architecture import build_model
from smolforge.tokenizer import SPECIAL_TOKENS

COUNTS = {
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "seed-recipe": 134_515_008,
    "seed-recreation": 134_411_328,
}
RELEASED = ("smollm2-135m", "smollm2-360m", "smollm2-1.7b")


def count(config: RunConfig) -> int:
    return sum(p.numel() for p in build_model(config.model, device="meta", seed=None).parameters())


def test_they_are_all_here() -> None:
    assert set(COUNTS) <= set(configuration.preset_names())


@pytest.mark.parametrize("name", configuration.preset_names())
def test_preset_validates_and_says_what_it_is(name: str) -> None:
    config = configuration.build_config(name)
    text = (resources.files("smolforge") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")
    assert re.match(r"# \S.{20,110}\.\n", text), "the first line says what it is, for --help"
    assert RunConfig.model_validate(config.model_dump()) == config
    assert config.model.vocab_size >= len(SPECIAL_TOKENS)
    steps = config.training.steps or config.training.tokens or config.training.epochs
    assert steps, "a preset says how long it runs"
    said = re.search(r"([\d,]{6,}) parameters", text)
    assert said is None or int(said[1].replace(",", "")) == count(config)


@pytest.mark.parametrize("name", COUNTS)
def test_parameters(name: str) -> None:
    config = configuration.build_config(name)
    assert count(config) == COUNTS[name]
    text = (resources.files("smolforge") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")
    assert f"{COUNTS[name]:,}" in text.splitlines()[0]


@pytest.mark.parametrize("name", [*RELEASED, "seed-recipe"])
def test_parameters_equal_transformers_count(name: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = configuration.build_config(name).model
    with torch.device("meta"):
        theirs = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=model.vocab_size,
                hidden_size=model.hidden_size,
                intermediate_size=model.intermediate_size,
                num_hidden_layers=model.num_hidden_layers,
                num_attention_heads=model.num_attention_heads,
                num_key_value_heads=model.num_key_value_heads,
                tie_word_embeddings=model.tie_word_embeddings,
            )
        )
    assert theirs.num_parameters() == COUNTS[name]


@pytest.mark.parametrize("name", RELEASED)
def test_released_shapes(real_data: Path, name: str) -> None:
    file = f"{name}.unverified.json" if name == "smollm2-1.7b" else f"{name}.json"
    path = real_data / "config" / file
    released = json.loads(path.read_text(encoding="utf-8"))
    ours = configuration.build_config(name).model.model_dump()
    same = set(ours) & set(released) - {"initializer_range"}
    assert len(same) >= 10
    assert {key: ours[key] for key in same} == {key: released[key] for key in same}


def test_the_released_recipe_is_an_example(real_data: Path) -> None:
    import yaml

    text = (real_data / "config" / "pretraining" / "config_smollm2_135M.yaml").read_text(encoding="utf-8")
    example = Path(__file__).parents[1] / "examples" / "smollm2_recipe.yaml"
    theirs, ours = yaml.safe_load(text), configuration.build_config(str(example))
    factory, rates = theirs["optimizer"]["optimizer_factory"], theirs["optimizer"]["learning_rate_scheduler"]
    assert ours.optimizer.lr == rates["learning_rate"]
    assert ours.optimizer.betas == (factory["adam_beta1"], factory["adam_beta2"])
    assert ours.optimizer.eps == factory["adam_eps"]
    assert ours.optimizer.weight_decay == theirs["optimizer"]["weight_decay"]
    assert ours.training.grad_clip == theirs["optimizer"]["clip_grad"]
    # A share of the run, so that short ones warm up too: the recipe's number at the default length on a GPU.
    assert ours.training.tokens and ours.schedule.warmup < 1
    assert ours.schedule.warmup * ours.training.tokens / (1 << 19) == pytest.approx(rates["lr_warmup_steps"], rel=0.05)
    assert ours.schedule.decay == pytest.approx(rates["lr_decay_steps"] / theirs["tokens"]["train_steps"], abs=1e-3)
    assert ours.schedule.floor == rates["min_decay_lr"]
    assert ours.data.sequence_length == theirs["tokens"]["sequence_length"]
    assert ours.tokenizer == theirs["tokenizer"]["tokenizer_name_or_path"]
    assert ours.model.initializer_range == pytest.approx(theirs["model"]["init_method"]["std"], rel=1e-3)


@pytest.mark.parametrize("name", ["seed-recipe", "seed-recreation"])
def test_the_seeds_recipe(name: str) -> None:
    """The learning rate of torch's own OneCycleLR at each of the 5,000 steps, and the seed's numbers."""
    from smolforge.training.optim import schedule_factor as rate

    config = configuration.build_config(name)
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.AdamW([weight], lr=3e-4)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=3e-4, total_steps=5000, pct_start=0.2, anneal_strategy="linear", div_factor=25,
        final_div_factor=100, cycle_momentum=False,
    )  # fmt: skip
    for step in range(config.total_steps):
        ours = config.optimizer.lr * rate(config.schedule, step, config.total_steps)
        assert math.isclose(ours, optimizer.param_groups[0]["lr"], rel_tol=1e-9), step
        optimizer.step()
        if step < config.total_steps - 1:
            theirs.step()
    assert (config.total_steps, config.sequences_per_step, config.training.micro_batch) == (5000, 2, 1)
    assert (config.optimizer.weight_decay, config.training.grad_clip) == (1e-4, 1.0)
    assert (config.logging.every, config.samples.every) == (50, 500)
    assert (config.checkpoint.every, config.evaluation.every) == (500, 1000)
    assert config.data.sequence_length == 2048
    assert config.data.sources == {"HuggingFaceTB/smollm-corpus:cosmopedia-v2": 1.0}


def test_both_seed_presets_differ_in_the_architecture_only() -> None:
    recipe, recreation = (configuration.build_config(name).model_dump() for name in ("seed-recipe", "seed-recreation"))
    assert {key for key in recipe if recipe[key] != recreation[key]} == {"preset", "model"}


def test_settings_of_one_mapping_add_up() -> None:
    base = configuration.build_config("pocket")
    changed = configuration.build_config("pocket", ["tokenizer.train.vocab_size=512", "tokenizer.train.documents=200"])
    assert changed.tokenizer.model_dump() == {"train": {"vocab_size": 512, "documents": 200}}  # type: ignore[union-attr]
    one = configuration.build_config("pocket", ["tokenizer.train.documents=200"])
    assert one.tokenizer.train.vocab_size == base.tokenizer.train.vocab_size  # type: ignore[union-attr]
    assert configuration.build_config("pocket", ["tokenizer=here"]).tokenizer == "here"


@pytest.mark.parametrize(("key", "default"), [(r.key, r.default) for r in configuration.key_records() if r.default])
def test_a_default_is_listed_as_set_takes_it(key: str, default: str) -> None:
    given = configuration.build_config(overrides=[f"{key}={default}"])
    assert given.model_dump() == configuration.build_config().model_dump()
