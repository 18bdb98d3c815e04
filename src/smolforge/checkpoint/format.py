"""A checkpoint is a model: the Hugging Face directory, written so that transformers 4 and 5 both read it.

`write_model` writes config.json, generation_config.json, model.safetensors, the tokenizer and the card.
`read_config` reads any Llama directory or GGUF file, and refuses by name and value what smolforge does not have,
because a model that computes something else would load silently and write nonsense.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolforge.checkpoint.gguf import gguf_config, gguf_generation_defaults
from smolforge.checkpoint.weights import WEIGHTS, write_safetensors, write_shard_index
from smolforge.config import ModelConfig
from smolforge.errors import BadInput, CheckpointError
from smolforge.files import read_json
from smolforge.gguf_file import is_gguf, open_gguf

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from smolforge.tokenizer import Tokenizer

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
CARD = "README.md"


def write_model(
    directory: Path,
    config: ModelConfig,
    state: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    *,
    card: str = "",
    dtype: torch.dtype | None = None,
    part: str = "",
) -> None:
    """Write a model directory.

    Args:
        directory: made if missing; files of the same names are replaced.
        state: the model's state dict, on any device. The head of a tied model is left out.
        card: the text of README.md; no card where empty.
        dtype: floating type to store; that of `state` unless given.
        part: end of the name of the file of weights, where other processes have written those without memory (meta).

    Raises:
        BadInput: the tokenizer has more tokens than the model.
        CheckpointError: `state` is not a state dict of `config`; the tensor is named.
    """
    check_vocabulary(config, tokenizer)
    directory.mkdir(parents=True, exist_ok=True)
    weights = check_weights(config, state)
    own = {name: tensor.detach() for name, tensor in weights.items() if tensor.device.type != "meta"}
    tensors = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in own.items()}
    # One key only: the library writes metadata in an order that changes from run to run.
    write_safetensors((directory / WEIGHTS).with_stem(f"model{part}"), tensors, metadata={"format": "pt"})
    if part:
        write_shard_index(directory, weights)
    stored = str(dtype or next(iter(weights.values())).dtype).removeprefix("torch.")
    specials = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    write_json(directory / CONFIG, describe(config, stored, specials))
    write_json(directory / GENERATION_CONFIG, specials)
    tokenizer.save(directory, max_length=config.max_position_embeddings)
    if card:
        (directory / CARD).write_text(card, encoding="utf-8")


def describe(config: ModelConfig, dtype: str, specials: Mapping[str, int]) -> dict[str, Any]:
    """config.json of a model: both spellings of rope (transformers 4: rope_theta) and of the type (torch_dtype)."""
    from smolforge.model.architecture import config_to_hf

    return dict(sorted({**config_to_hf(config), **specials, "dtype": dtype, "torch_dtype": dtype}.items()))


def check_vocabulary(config: ModelConfig, tokenizer: Tokenizer, *, text_only: bool = False) -> None:
    """Raise BadInput for a tokenizer with ids that the model has no row for.

    `text_only` allows special tokens without a row, which no text has: a prompt with one is refused when it comes.
    """
    size = tokenizer.text_vocab_size if text_only else tokenizer.vocab_size
    if size > config.vocab_size:
        problem = f"the tokenizer has {size:,} tokens, the model only {config.vocab_size:,}"
        raise BadInput(problem, field="model.vocab_size", hint=f"It must be at least {size}.")


def check_no_dropout(directory: Path) -> None:
    """Raise CheckpointError for a model that was trained with dropout: it cannot be trained on as it was."""
    value = None if is_gguf(directory) else read_json(directory / CONFIG, limit=1 << 20).get("attention_dropout")
    if value is not None and value != 0:
        problem, field = f"{json.dumps(value)[:200]} is not supported", f"{directory / CONFIG}: attention_dropout"
        hint = "smolforge has no dropout; set it to 0 to continue this model without."
        raise CheckpointError(problem, field=field, hint=hint)


def check_weights(config: ModelConfig, weights: Mapping[str, Tensor], where: str = "") -> dict[str, Tensor]:
    """The tensors that a model of `config` needs, in the model's order; nothing is copied.

    A tied model's own copy of the head is dropped where it equals the embedding.

    Raises:
        CheckpointError: a tensor is missing, unknown, of another shape, or not of a floating type.
    """
    import torch

    from smolforge.model.architecture import build_model

    given = {name: tensor for name, tensor in weights.items() if not name.endswith(".rotary_emb.inv_freq")}
    model = build_model(config, device="meta", seed=None)
    expected = model.state_dict()
    if config.tie_word_embeddings and "lm_head.weight" in given and "lm_head.weight" not in expected:
        shared = next(name for name, parameter in model.named_parameters() if parameter is model.output_weight)
        head, embedding = given.pop("lm_head.weight"), given.get(shared)
        if embedding is not None and (head.shape != embedding.shape or not torch.equal(head, embedding)):
            problem = f"tensor 'lm_head.weight' differs from {shared!r}, though the embeddings are tied"
            hint = "Set tie_word_embeddings to false in config.json if the head is a tensor of its own."
            raise CheckpointError(problem, field=where or None, hint=hint)

    def bad(message: str) -> CheckpointError:
        shape = "the shape in its header" if where.endswith(".gguf") else "this config.json"
        return CheckpointError(message, field=where or None, hint=f"The weights do not belong to {shape}.")

    missing = [name for name in expected if name not in given]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise bad(f"tensor {missing[0]!r}{more} is missing")
    for name, tensor in given.items():
        if name not in expected:
            raise bad(f"unexpected tensor {name!r}")
        if tensor.shape != expected[name].shape:
            raise bad(f"tensor {name!r} is {list(tensor.shape)}, expected {list(expected[name].shape)}")
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise bad(f"tensor {name!r} is {tensor.dtype}; float32, bfloat16 and float16 can be used")
    return {name: given[name] for name in expected}


def read_config(directory: Path) -> ModelConfig:
    """The shape of the model in a Hugging Face directory or a GGUF file.

    Raises:
        CheckpointError: there is no config.json, it is damaged, or it describes what smolforge does not have.
    """
    from smolforge.model.architecture import config_from_hf

    path = directory if is_gguf(directory) else directory / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{directory} has no {CONFIG}", hint="A model directory needs one.")
    try:
        return config_from_hf(gguf_config(open_gguf(path)) if path == directory else read_json(path, limit=1 << 20))
    except CheckpointError:
        raise
    except BadInput as error:
        field = f"{path}: {error.field}" if error.field else str(path)
        raise CheckpointError(error.message, field=field, hint=error.hint) from None


# What generation_config.json may say that generation here can use: the types, and the range of numbers.
_GENERATION = {
    "temperature": (0.0, 100.0), "top_p": (0.0, 1.0), "top_k": (0, 1 << 24), "min_p": (0.0, 1.0),
    "typical_p": (0.0, 1.0), "repetition_penalty": (0.01, 100.0), "max_new_tokens": (1, 1 << 26),
}  # fmt: skip
MAX_TOKEN_ID = 1 << 24


def read_generation_defaults(directory: Path) -> dict[str, Any]:
    """The sampling defaults and special ids in generation_config.json, as far as generation here knows them.

    Keys, each only where the file gives it: temperature, top_p, top_k, min_p, typical_p, repetition_penalty,
    max_new_tokens, do_sample, bos_token_id, eos_token_id (an id or a list), pad_token_id. Empty without the file.

    Raises:
        CheckpointError: the file is damaged, or a value is out of its range.
    """
    path = directory / GENERATION_CONFIG
    if is_gguf(directory):
        return gguf_generation_defaults(open_gguf(directory))
    if not path.is_file():
        return {}
    values, found = read_json(path, limit=1 << 20), {}
    for key, (low, high) in _GENERATION.items():
        value = values.get(key)
        if value is None:
            continue
        if type(value) not in (int, float) or not low <= value <= high:
            raise CheckpointError(f"{json.dumps(value)[:200]} is not from {low} to {high}", field=f"{path}: {key}")
        found[key] = value
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = values.get(key)
        ids = value if isinstance(value, list) and key == "eos_token_id" else [value]
        if value is None:
            continue
        if not all(type(i) is int and -1 <= i < MAX_TOKEN_ID for i in ids):
            raise CheckpointError(f"{json.dumps(value)[:200]} is not a token id", field=f"{path}: {key}")
        found[key] = value
    if type(values.get("do_sample")) is bool:
        found["do_sample"] = values["do_sample"]
    return found


def read_end_ids(directory: Path) -> list[int]:
    """The tokens that end a text, by generation_config.json and config.json; CheckpointError as of the readers."""
    found = [read_generation_defaults(directory).get("eos_token_id")]
    if not is_gguf(directory):
        found.append(read_json(directory / CONFIG, limit=1 << 20).get("eos_token_id"))
    ids = [i for value in found for i in (value if isinstance(value, list) else [value])]
    return [i for i in ids if type(i) is int and i >= 0]


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a file such as config.json."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
