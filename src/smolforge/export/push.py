"""Copy a model without its training state to a directory, or upload it to the Hugging Face Hub in one commit.

`training/` holds optimizer state twice the size of the model, and manifest.json covers it too, so neither goes along.
The upload uses `huggingface_hub`, so `HF_TOKEN`, `HF_ENDPOINT`, its login and its retries work as elsewhere.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import yaml

from smolforge.checkpoint import format
from smolforge.checkpoint.adapter import ADAPTER
from smolforge.checkpoint.format import CARD, CONFIG, GENERATION_CONFIG, read_config, read_generation_defaults
from smolforge.checkpoint.locate import load_model, resolve_adapter, resolve_model
from smolforge.checkpoint.weights import SHARD_INDEX, read_weights, weight_files
from smolforge.errors import BadInput, SourceUnavailable
from smolforge.files import replacing_directory
from smolforge.gguf_file import is_gguf
from smolforge.model.architecture import architecture_of
from smolforge.model.summary import count_parameters
from smolforge.tokenizer import TOKENIZER_FILES, Tokenizer

# The Hub refuses names that begin or end in a dot or dash, and two of these in a row.
_REPO = re.compile(r"^(?!.*(--|\.\.))[\w](?:[\w.-]*[\w])?/[\w](?:[\w.-]*[\w])?$")


def model_files(directory: Path) -> list[Path]:
    """The files that make a directory a model, after reading them; CheckpointError where it is not a complete one."""
    config = read_config(directory)
    format.check_vocabulary(config, Tokenizer.from_pretrained(directory))
    weights = weight_files(directory)
    format.check_weights(config, read_weights(directory), str(weights[0]))
    others = [CONFIG, GENERATION_CONFIG, CARD, SHARD_INDEX, *TOKENIZER_FILES]
    named = [path for name in others if (path := directory / name).is_file()]
    return sorted({*named, *weights})


def copy_model(directory: Path, out: Path) -> None:
    """Copy the model in `directory` to the new directory `out`; raises what `model_files` and `new_directory` do.

    A GGUF file becomes a directory with its decoded weights.
    """
    if is_gguf(directory):
        config, defaults = read_config(directory), read_generation_defaults(directory)
        with new_directory(Path(out), needed=4 * count_parameters(config)) as temporary:
            format.write_model(temporary, config, read_weights(directory), Tokenizer.from_pretrained(directory))
            format.write_json(temporary / GENERATION_CONFIG, defaults)
        return
    files = model_files(directory)
    with new_directory(Path(out), needed=sum(path.stat().st_size for path in files)) as temporary:
        for path in files:
            shutil.copyfile(path, temporary / path.name)


def export_merged(model: str, adapter: str | None, out: Path) -> None:
    """Write a model with its adapter merged to the new directory `out`, in the precision of the base.

    Args:
        model, adapter: as of `resolve_adapter`. Checkpoints of a LoRA run are merged already, and copied.

    Raises:
        BadInput: there is no adapter, or `out` exists.
        CheckpointError: model or adapter cannot be used.
    """
    base, found = resolve_adapter(model, adapter)
    if found is None:
        directory = resolve_model(base)
        if not (directory / ADAPTER).is_dir():
            hint = "Name an adapter with --adapter, or use --to checkpoint for a copy."
            raise BadInput(f"{model} has no adapter to merge", field="model", hint=hint)
        copy_model(directory, out)
        return
    module, tokenizer, directory = load_model(base, adapter=found)
    with new_directory(out, needed=4 * count_parameters(module.config)) as temporary:
        format.write_model(temporary, module.config, module.state_dict(), tokenizer)
        written = json.loads((temporary / GENERATION_CONFIG).read_text(encoding="utf-8"))
        defaults = read_generation_defaults(directory) | {"eos_token_id": written["eos_token_id"]}
        format.write_json(temporary / GENERATION_CONFIG, defaults)


def new_directory(out: Path, *, needed: int) -> AbstractContextManager[Path]:
    """A directory to fill, which is renamed to `out` when the block ends without an error.

    Raises:
        BadInput: `out` exists and is not an empty directory, or it cannot be made.
        RunFailed: no room on the disk for `needed` bytes.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"{out} exists already", field="out", hint="Give a directory that does not exist yet.")
    make_parent(out)
    return replacing_directory(out, needed=needed, hint="Nothing was changed. Free some room and try again.")


def make_parent(out: Path) -> None:
    """Make the directory that `out` is to be written to; BadInput where it cannot be made or written to."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"cannot make {out.parent}: {error.strerror}", field="out") from None
    if not os.access(out.parent, os.W_OK):
        raise BadInput(f"cannot write to {out.parent}: Permission denied", field="out")


def card_license(directory: Path) -> str | None:
    """The license that a model's card names, or None where it names none."""
    from huggingface_hub import metadata_load

    try:
        found = (metadata_load(directory / CARD) or {}).get("license")
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return found if isinstance(found, str) and found != "unknown" else None


@dataclass(frozen=True)
class Pushed:
    """What was uploaded, or would be."""

    repo: str  # OWNER/NAME
    files: list[tuple[str, int]]  # name and bytes, sorted by name
    notes: list[str]  # what the owner should know before others read it
    url: str | None = None  # of the commit; None for a dry run


def push(model: str | Path, repo: str, *, private: bool = False, dry_run: bool = False) -> Pushed:
    """Upload a model to the Hub as one commit; a missing repository is created.

    Args:
        model: anything that `checkpoint.locate.resolve_model` takes.
        repo: OWNER/NAME.
        private: whether a repository that this call creates is private.
        dry_run: only list what would be uploaded; needs no network.

    Raises:
        BadInput: `repo` is not a valid name, or this user may not write there.
        CheckpointError: the model cannot be used.
        SourceUnavailable: the Hub cannot be reached.
    """
    if not _REPO.match(repo) or len(repo) > 96:
        raise BadInput(f"{repo!r} is not a name of a repository", field="out", hint="Write OWNER/NAME.")
    directory = resolve_model(model)
    if is_gguf(directory):
        hint = "Make a directory of it first: smolforge export ... --to checkpoint --out DIR"
        raise BadInput(f"{directory} is a GGUF file, and --to hub uploads model directories", field="model", hint=hint)
    paths = model_files(directory)
    files, notes = [(path.name, path.stat().st_size) for path in paths], _notes(directory)
    return Pushed(repo, files, notes, None if dry_run else _upload(paths, repo, private))


def _notes(directory: Path) -> list[str]:
    notes = []
    if not (directory / CARD).is_file():
        notes.append(f"there is no {CARD}: the model will have no card")
    elif card_license(directory) is None:
        notes.append("the card names no license: set one at the top of its README.md on the Hub")
    if not architecture_of(read_config(directory)).in_transformers:
        notes.append("it is not a Llama: transformers and vLLM cannot load it, smolforge can")
    return notes


def _upload(paths: list[Path], repo: str, private: bool) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub import errors as hub_errors

    api = HfApi(library_name="smolforge")
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        additions = [CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=path) for path in paths]
        done = api.create_commit(repo, additions, commit_message="Upload a model with smolforge")
    except Exception as error:  # also those of the HTTP library that the client uses, which differ between versions
        status = getattr(getattr(error, "response", None), "status_code", 0)
        denied = {401: "the token is missing or wrong"} | dict.fromkeys((403, 404), "the token does not allow it")
        missing = isinstance(error, hub_errors.LocalTokenNotFoundError)
        if missing or status in denied:
            problem = f"may not write to {repo}: {'no token was found' if missing else denied[status]}"
            hint = "Log in with `hf auth login`, or set HF_TOKEN to a token with write access."
            raise BadInput(problem, field="out", hint=hint) from None
        message = " ".join(str(error).split())[:300]
        if isinstance(error, hub_errors.HfHubHTTPError):
            raise SourceUnavailable(f"the Hub refused {repo}: {message}") from None
        hint = "Check the network, HF_ENDPOINT and HF_HUB_OFFLINE; nothing was uploaded."
        raise SourceUnavailable(f"cannot reach the Hub for {repo}: {message}", hint=hint) from None
    return str(done.commit_url)
