"""Copy a model without its training state to a directory, or upload it to the Hugging Face Hub in one commit.

`training/` holds optimizer state twice the size of the model, and manifest.json covers it too, so neither goes along.
The upload uses `huggingface_hub`, so `HF_TOKEN`, `HF_ENDPOINT`, its login and its retries work as elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from smolforge.checkpoint.format import CARD, CONFIG, GENERATION_CONFIG, check_vocabulary, check_weights, read_config
from smolforge.checkpoint.locate import resolve_model
from smolforge.checkpoint.weights import SHARD_INDEX, read_weights, weight_files
from smolforge.errors import BadInput, SourceUnavailable
from smolforge.files import replacing_directory
from smolforge.model.architecture import architecture_of
from smolforge.tokenizer import TOKENIZER_FILES, Tokenizer

# The Hub refuses names that begin or end in a dot or dash, and two of these in a row.
_REPO = re.compile(r"^(?!.*(--|\.\.))[\w](?:[\w.-]*[\w])?/[\w](?:[\w.-]*[\w])?$")


def model_files(directory: Path) -> list[Path]:
    """The files that make a directory a model, after reading them.

    Raises:
        CheckpointError: the directory is not a complete model.
    """
    config = read_config(directory)
    check_vocabulary(config, Tokenizer.from_pretrained(directory))
    weights = weight_files(directory)
    check_weights(config, read_weights(directory), str(weights[0]))
    others = [CONFIG, GENERATION_CONFIG, CARD, SHARD_INDEX, *TOKENIZER_FILES]
    named = [path for name in others if (path := directory / name).is_file()]
    return sorted({*named, *weights})


def copy_model(directory: Path, out: Path) -> None:
    """Copy the model in `directory` to the new directory `out`; a copy that fails leaves nothing.

    Raises:
        BadInput: `out` exists already, or cannot be made.
        RunFailed: no room on the disk.
    """
    files = model_files(directory)
    with new_directory(Path(out), needed=sum(path.stat().st_size for path in files)) as temporary:
        for path in files:
            shutil.copyfile(path, temporary / path.name)


@contextlib.contextmanager
def new_directory(out: Path, *, needed: int) -> Iterator[Path]:
    """A directory to fill, which is renamed to `out` when the block ends without an error.

    Args:
        out: a path that does not exist, or an empty directory.
        needed: bytes that will be written, for the error where there is no room.

    Raises:
        BadInput: `out` exists already, or cannot be made.
        RunFailed: no room on the disk.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"{out} exists already", field="out", hint="Give a directory that does not exist yet.")
    make_parent(out)
    hint = "Nothing was changed. Free some room and try again."
    with replacing_directory(out, needed=needed, hint=hint) as temporary:
        yield temporary


def make_parent(out: Path) -> None:
    """Make the directory that `out` is to be written to.

    Raises:
        BadInput: it cannot be made, or may not be written to.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"cannot make {out.parent}: {error.strerror}", field="out") from None
    if not os.access(out.parent, os.W_OK):
        raise BadInput(f"cannot write to {out.parent}: Permission denied", field="out")


def card_license(directory: Path) -> str | None:
    """The license that a model's card names, or None where it names none."""
    card = directory / CARD
    match = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8"), re.DOTALL) if card.is_file() else None
    try:
        front = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return None
    found = front.get("license") if isinstance(front, dict) else None
    return found if isinstance(found, str) and found != "unknown" else None


@dataclass(frozen=True)
class Pushed:
    """What was uploaded, or would be.

    Attributes:
        repo: OWNER/NAME.
        files: (name, bytes), sorted by name.
        notes: what the owner should know before others read it.
        url: of the commit; None for a dry run.
    """

    repo: str
    files: list[tuple[str, int]]
    notes: list[str]
    url: str | None = None


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
    paths = model_files(directory)
    found = Pushed(repo, [(path.name, path.stat().st_size) for path in paths], _notes(directory))
    if dry_run:
        return found
    return Pushed(repo, found.files, found.notes, _upload(paths, repo, private))


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
    except hub_errors.LocalTokenNotFoundError:
        raise _no_access(repo, "no token was found") from None
    except hub_errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403, 404):
            reason = "the token is missing or wrong" if status == 401 else "the token does not allow it"
            raise _no_access(repo, reason) from None
        raise SourceUnavailable(f"the Hub refused {repo}: {' '.join(str(error).split())[:300]}") from None
    except Exception as error:  # of the HTTP library that the client uses, which differs between its versions
        raise SourceUnavailable(
            f"cannot reach the Hub for {repo}: {' '.join(str(error).split())[:300]}",
            hint="Check the network, HF_ENDPOINT and HF_HUB_OFFLINE; nothing was uploaded.",
        ) from None
    return str(done.commit_url)


def _no_access(repo: str, reason: str) -> BadInput:
    return BadInput(
        f"may not write to {repo}: {reason}",
        field="out",
        hint="Log in with `hf auth login`, or set HF_TOKEN to a token with write access.",
    )
