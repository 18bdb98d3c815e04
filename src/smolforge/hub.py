"""Models and tokenizers by their Hub id, through `huggingface_hub` and its own settings (HF_ENDPOINT, HF_TOKEN)."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from smolforge.errors import CheckpointError, SourceUnavailable

MODEL_ID = re.compile(r"^[\w.-]+/[\w.-]+(@[\w./-]+)?$")
GGUF_ADDRESS = re.compile(r"^hf://([\w.-]+/[\w.-]+)(?:@([\w.-]+))?/([\w./-]+\.gguf)$", re.IGNORECASE)


def is_model_id(text: str) -> bool:
    """Whether `text` has the form OWNER/NAME[@REVISION]."""
    return bool(MODEL_ID.match(text)) and not text.startswith((".", "/"))


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE says to use only what is on this machine, read as huggingface_hub reads it."""
    return os.environ.get("HF_HUB_OFFLINE", "").strip().upper() in {"1", "ON", "YES", "TRUE"}


def fetch_model(model_id: str, patterns: list[str]) -> Path:
    """Directory with the files of a Hub model that match `patterns`, downloaded once and cached.

    Raises:
        CheckpointError: there is no such model or revision, or it is not public.
        SourceUnavailable: the Hub cannot be reached and the files are not in the local cache.
    """
    from huggingface_hub import snapshot_download

    name, _, revision = model_id.partition("@")
    with _explained(name, revision):
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))


def fetch_gguf(address: str) -> Path:
    """The file of an address `hf://OWNER/REPO[@REVISION]/FILE.gguf`, downloaded once and cached; raises as above."""
    from huggingface_hub import hf_hub_download

    match = GGUF_ADDRESS.match(address)
    if match is None:
        raise CheckpointError(f"{address!r} is not the address of a file", hint="Write hf://OWNER/REPO/FILE.gguf.")
    with _explained(match[1], match[2] or "", file=match[3]):
        return Path(hf_hub_download(match[1], match[3], revision=match[2]))


@contextlib.contextmanager
def _explained(name: str, revision: str, file: str = "") -> Iterator[None]:
    from huggingface_hub import errors as hub_errors

    try:
        yield
    except hub_errors.LocalEntryNotFoundError:
        raise SourceUnavailable(
            f"cannot reach the Hub for {name}, and it is not in the local cache",
            hint="Check the network or HF_ENDPOINT; with HF_HUB_OFFLINE=1 only what was fetched before is used.",
        ) from None
    except hub_errors.RevisionNotFoundError:
        raise CheckpointError(f"{name} has no revision {revision!r} on the Hub") from None
    except hub_errors.RepositoryNotFoundError:
        problem = f"no model {name!r} on the Hub, and no directory of that name here"
        raise CheckpointError(problem, hint="A private model needs HF_TOKEN.") from None
    except hub_errors.EntryNotFoundError:
        raise CheckpointError(f"{name} has no file {file} on the Hub") from None
    except (hub_errors.HfHubHTTPError, OSError) as error:
        raise SourceUnavailable(f"the Hub did not answer for {name}: {error}") from None
