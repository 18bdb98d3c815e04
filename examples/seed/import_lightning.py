"""Import a Lightning checkpoint: write the model of a `.ckpt` as a Hugging Face model directory.

    python examples/seed/import_lightning.py seed.ckpt --out imported
    smolforge generate imported

A `.ckpt` is a pickle. It is read with torch's restricted reader, which builds tensors and plain containers and
refuses to call anything else, so a file made to run code is an error that names what it would have called. Which of
the two architectures it holds follows from the names and shapes of its tensors alone. Only the model is taken: a
Lightning optimizer state has no place in a smolforge run, whose data position it does not know.
"""

from __future__ import annotations

import argparse
import re
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from smolforge.checkpoint.format import check_weights, write_model
from smolforge.config import ModelConfig
from smolforge.errors import BadInput, CheckpointError, SmolforgeError
from smolforge.files import replacing_directory
from smolforge.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

COSMO2 = "HuggingFaceTB/cosmo2-tokenizer"
# Tables that some modules keep beside their weights and that follow from the configuration.
_TABLES = ("inv_freq", "original_inv_freq", "cos_cached", "sin_cached")
_EXPECTED = (
    "Known: SmolLM2's Llama (model.embed_tokens.weight, model.layers.0.self_attn.q_proj.weight, ...) and the seed's "
    "recreation (transformer.wte.weight, transformer.h.0.attn.q_proj.weight, ...), each below any number of "
    "_orig_mod. and model. prefixes."
)


@dataclass(frozen=True)
class _Names:
    """Where the tensors that give the shape of a model stand, by architecture."""

    embedding: str
    layer: str
    queries: str
    keys: str
    gate: str
    theta: float
    positions: int


# Rotation and positions are in no tensor: these are the released config's, and the seed's for the recreation.
_ARCHITECTURES = {
    "llama": _Names(
        "model.embed_tokens.weight", r"model\.layers\.(\d+)\.", "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.k_proj.weight", "model.layers.0.mlp.gate_proj.weight", 100_000.0, 8192,
    ),
    "recreation": _Names(
        "transformer.wte.weight", r"transformer\.h\.(\d+)\.", "transformer.h.0.attn.q_proj.weight",
        "transformer.h.0.attn.k_proj.weight", "transformer.h.0.mlp.gate_proj.weight", 10_000.0, 2048,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Imported:
    """What `import_lightning` found and wrote.

    Attributes:
        directory: the model directory.
        config: shape of the model.
        step: Lightning's global step, or None where the file names none.
        left_out: names in the file that are not weights of the model, such as rotary tables and a tied head.
    """

    directory: Path
    config: ModelConfig
    step: int | None
    left_out: list[str]


def import_lightning(
    path: str | Path,
    out: str | Path,
    tokenizer: str | Path | Tokenizer,
    *,
    head_dim: int = 64,
    rope_theta: float | None = None,
    max_position_embeddings: int | None = None,
) -> Imported:
    """Write the model of a Lightning `.ckpt` as a directory that smolforge and, for a Llama, transformers load.

    Args:
        path: the checkpoint.
        out: a directory that does not exist or is empty.
        tokenizer: the one it was trained with: loaded, a directory, or a Hub id.
        head_dim: width of a head, which no tensor tells; SmolLM2's unless given.
        rope_theta: base of the rotation; 100,000 for a Llama and 10,000 for the recreation unless given.
        max_position_embeddings: longest sequence; 8,192 for a Llama and 2,048 for the recreation unless given.

    Raises:
        CheckpointError: the file is missing, damaged, would run code, or holds neither architecture.
        BadInput: `out` is not free, or the tokenizer has more tokens than the model.
    """
    path, out = Path(path), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"{out} is not empty", field="out", hint="Give a directory that does not exist yet.")
    content = _read(path)
    weights, left_out = strip_prefixes(_tensors(content, path), where=str(path))
    config = recognise(
        weights,
        head_dim=head_dim,
        rope_theta=rope_theta,
        max_position_embeddings=max_position_embeddings,
        where=str(path),
    )
    if config.tie_word_embeddings and weights.pop("lm_head.weight", None) is not None:
        left_out.append("lm_head.weight")
    try:
        weights = check_weights(config, weights, str(path))
    except (CheckpointError, BadInput) as error:
        raise CheckpointError(
            f"looks like a {config.architecture}, but {error.message}", field=str(path), hint=_EXPECTED
        ) from None
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = Tokenizer.from_pretrained(tokenizer)
    step = content.get("global_step")
    found = Imported(out, config, step if type(step) is int else None, left_out)
    with replacing_directory(out) as temporary:
        dtype = next(iter(weights.values())).dtype
        write_model(temporary, config, weights, tokenizer, card=_card(found, path.name), dtype=dtype)
    return found


def _read(path: Path) -> dict[str, Any]:
    import torch
    from torch.serialization import get_unsafe_globals_in_checkpoint

    if not path.is_file():
        raise CheckpointError("no such file", field=str(path), hint="Give the .ckpt that Lightning wrote.")
    mapped = zipfile.is_zipfile(path)  # what torch has written since 1.6; the older format cannot be mapped
    try:
        if mapped:
            _check_records(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged or forged pickle raises nearly anything
        try:
            strange = get_unsafe_globals_in_checkpoint(path) if mapped else _named_in(str(error))
        except Exception:
            strange = []
        if strange:
            raise CheckpointError(
                f"holds more than tensors and plain values: {', '.join(sorted(strange)[:5])}; nothing of it was run",
                field=str(path),
                hint="Reading such a file in full would run its code. Where you trust it, save its weights alone: "
                "torch.save({'state_dict': checkpoint['state_dict']}, 'weights.ckpt').",
            ) from None
        words = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"is damaged or no torch checkpoint: {words}", field=str(path)) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"holds a {type(content).__name__}, not a Lightning checkpoint", field=str(path))
    return content


def _check_records(path: Path) -> None:
    """Compare every record with its checksum, for torch's reader maps the tensors without looking."""
    with zipfile.ZipFile(path) as archive:
        if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
            raise ValueError("its records are compressed, which torch never does")
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the bytes of {damaged} are not those of its checksum")


def _named_in(message: str) -> list[str]:
    """The callable that torch's reader refused, from its message."""
    return re.findall(r"GLOBAL ([\w.]+)", message)


def _tensors(content: dict[str, Any], path: Path) -> dict[str, Tensor]:
    from torch import Tensor

    state = content.get("state_dict", content)
    if not isinstance(state, Mapping):
        raise CheckpointError("its state_dict is not a mapping of names to tensors", field=str(path))
    tensors = {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors or len(tensors) != len(state):
        raise CheckpointError("has no state_dict of tensors", field=str(path), hint="Give the .ckpt of a model.")
    return tensors


def strip_prefixes(weights: Mapping[str, Tensor], where: str = "") -> tuple[dict[str, Tensor], list[str]]:
    """Tensors under the model's own names, and the names that were left out because they are tables.

    `_orig_mod.` (torch.compile) goes wherever it stands; then as many `model.` (Lightning's attribute) as stand
    before the embedding.

    Raises:
        CheckpointError: there is no embedding of a known name, a tensor stands outside the model, or two names
            become one.
    """
    plain = {name: name.replace("_orig_mod.", "") for name in weights}
    anchors = [names.embedding for names in _ARCHITECTURES.values()]
    pattern = re.compile(rf"((?:model\.)*)({'|'.join(map(re.escape, anchors))})")
    # Greedy: of model.model.embed_tokens.weight the first is the prefix, for the name keeps the last.
    prefixes = {match[1] for name in plain.values() if (match := pattern.fullmatch(name))}
    if len(prefixes) != 1:
        raise CheckpointError(
            f"holds no architecture of ours: {'no' if not prefixes else 'more than one'} embedding among "
            f"{', '.join(sorted(plain.values())[:4])}, ...",
            field=where or None,
            hint=_EXPECTED,
        )
    prefix, kept, left_out = prefixes.pop(), {}, []
    for name, short in plain.items():
        if short.rpartition(".")[2] in _TABLES:
            left_out.append(name)
        elif not short.startswith(prefix):
            raise CheckpointError(
                f"tensor {name!r} is unexpected: the model's names begin with {prefix!r}", field=where or None
            )
        elif short.removeprefix(prefix) in kept:
            raise CheckpointError(f"tensor {short!r} is there twice", field=where or None)
        else:
            kept[short.removeprefix(prefix)] = weights[name]
    return kept, left_out


def recognise(
    weights: Mapping[str, Tensor],
    *,
    head_dim: int = 64,
    rope_theta: float | None = None,
    max_position_embeddings: int | None = None,
    where: str = "",
) -> ModelConfig:
    """The configuration of a state dict of one of the two architectures, from names and shapes.

    Raises:
        CheckpointError: it is neither; says why.
    """
    import torch

    name = next(kind for kind, names in _ARCHITECTURES.items() if names.embedding in weights)
    names = _ARCHITECTURES[name]

    def bad(message: str) -> CheckpointError:
        return CheckpointError(f"looks like a {name}, but {message}", field=where or None, hint=_EXPECTED)

    for needed in (names.embedding, names.queries, names.keys, names.gate):
        if needed not in weights:
            raise bad(f"tensor {needed!r} is missing")
        if weights[needed].dim() != 2 or not weights[needed].numel():
            raise bad(f"tensor {needed!r} is {list(weights[needed].shape)}, no matrix")
    embedding, head = weights[names.embedding], weights.get("lm_head.weight")
    queries, keys = weights[names.queries].shape[0], weights[names.keys].shape[0]
    narrow = head_dim if name == "llama" else head_dim // 3
    for what, rows, width in (("queries", queries, head_dim), ("keys", keys, narrow)):
        if not width or rows % width:
            raise bad(f"its {rows} rows of {what} are not heads of width {width}")
    layers = {int(match[1]) for key in weights if (match := re.match(names.layer, key))}
    try:
        return ModelConfig(
            architecture=name,
            vocab_size=embedding.shape[0],
            hidden_size=embedding.shape[1],
            intermediate_size=weights[names.gate].shape[0],
            num_hidden_layers=len(layers),
            num_attention_heads=queries // head_dim,
            num_key_value_heads=keys // narrow,
            head_dim=head_dim,
            max_position_embeddings=max_position_embeddings or names.positions,
            rope_theta=rope_theta or names.theta,
            tie_word_embeddings=head is None or (head.shape == embedding.shape and torch.equal(head, embedding)),
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise bad(str(first.get("ctx", {}).get("error", first["msg"]))) from None


def _card(found: Imported, source: str) -> str:
    config, llama = found.config, found.config.architecture == "llama"
    what = (
        "It is a `LlamaForCausalLM`: transformers loads it as it is."
        if llama
        else "It is **not a Llama**: LayerNorm, and narrow zero-padded key/value heads. Only smolforge loads it."
    )
    step = "" if found.step is None else f" at step {found.step:,}"
    return f"""---
license: unknown
library_name: {"transformers" if llama else "smolforge"}
pipeline_tag: text-generation
---

# Imported from {source}

The weights of a Lightning checkpoint{step}, imported by smolforge. {what}

{config.num_hidden_layers} layers, width {config.hidden_size}, {config.num_attention_heads} heads, vocabulary
{config.vocab_size:,}. The file names neither the rotation's base nor the longest sequence; assumed are
{config.rope_theta:,.0f} and {config.max_position_embeddings:,}. What it was trained on is not in the file either.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Import the checkpoint that the command line names; the exit code (2: it cannot be used)."""
    parser = argparse.ArgumentParser(description="Write the model of a Lightning .ckpt as a model directory.")
    parser.add_argument("checkpoint", metavar="CKPT", help="the file that Lightning wrote")
    parser.add_argument("--out", required=True, metavar="DIR", help="the new model directory")
    parser.add_argument("--tokenizer", default=COSMO2, metavar="DIR|ID", help=f"its tokenizer (default {COSMO2})")
    parser.add_argument("--head-dim", type=int, default=64, metavar="N", help="width of a head (default 64)")
    parser.add_argument("--rope-theta", type=float, metavar="N", help="base of the rotation")
    parser.add_argument("--positions", type=int, metavar="N", help="longest sequence in tokens")
    args = parser.parse_args(argv)
    try:
        found = import_lightning(
            args.checkpoint, args.out, args.tokenizer, head_dim=args.head_dim, rope_theta=args.rope_theta,
            max_position_embeddings=args.positions,
        )  # fmt: skip
    except SmolforgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    config, step = found.config, "" if found.step is None else f" at step {found.step:,}"
    print(
        f"{found.directory}: {config.architecture}{step}, {config.num_hidden_layers} layers, "
        f"rotation base {config.rope_theta:,.0f} and {config.max_position_embeddings:,} positions assumed"
    )
    print(f"write with it:  smolforge generate {found.directory}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
