"""A model on the Hugging Face Hub: exactly the files that make it a model, in one commit.

The real `huggingface_hub` client does the work, so `HF_TOKEN`, `HF_ENDPOINT`, its login and its retries hold here too.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from smolforge.checkpoint.format import CARD, read_config
from smolforge.checkpoint.locate import resolve_model
from smolforge.errors import BadInput, SourceUnavailable
from smolforge.export.plain import model_files
from smolforge.export.space import card_license
from smolforge.model.architecture import architecture_of

# As the Hub has them: no name begins or ends in a dot or dash, and two in a row are refused.
_REPO = re.compile(r"^(?!.*(--|\.\.))[\w](?:[\w.-]*[\w])?/[\w](?:[\w.-]*[\w])?$")


@dataclass(frozen=True)
class Pushed:
    """What went up, or would.

    Attributes:
        repo: OWNER/NAME.
        files: (name, bytes), in the order of their names.
        notes: what the owner should know before others read it.
        url: of the commit; None for a dry run.
    """

    repo: str
    files: list[tuple[str, int]]
    notes: list[str]
    url: str | None = None


def push(
    model: str | Path,
    repo: str,
    *,
    private: bool = False,
    dry_run: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Pushed:
    """Upload a model to the Hub, as one commit; the repository is made where it is missing.

    Args:
        model: anything that `checkpoint.locate.resolve_model` takes.
        repo: OWNER/NAME.
        private: only where the repository is made by this call.
        dry_run: only look what would go up; nothing is sent, and no network is needed.

    Raises:
        BadInput: `repo` is no name, or the Hub does not let this user write there.
        CheckpointError: the model cannot be used.
        SourceUnavailable: the Hub cannot be reached.
    """
    if not _REPO.match(repo) or len(repo) > 96:
        raise BadInput(f"{repo!r} is no name of a repository", field="out", hint="Write OWNER/NAME.")
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
    except Exception as error:  # the client's HTTP library is its own business, and so are that library's errors
        raise SourceUnavailable(
            f"cannot reach the Hub for {repo}: {' '.join(str(error).split())[:300]}",
            hint="Check the network, HF_ENDPOINT and HF_HUB_OFFLINE; nothing or all of it is there.",
        ) from None
    return str(done.commit_url)


def _no_access(repo: str, reason: str) -> BadInput:
    return BadInput(
        f"may not write to {repo}: {reason}",
        field="out",
        hint="Log in with `hf auth login`, or set HF_TOKEN to a token with write access.",
    )
