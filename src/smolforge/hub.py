"""Models and tokenizers by their Hub id, through `huggingface_hub` and its own settings (HF_ENDPOINT, HF_TOKEN)."""

from __future__ import annotations

import re
from pathlib import Path

from smolforge.errors import CheckpointError, SourceUnavailable

MODEL_ID = re.compile(r"^[\w.-]+/[\w.-]+(@[\w./-]+)?$")


def is_model_id(text: str) -> bool:
    """Whether `text` has the form OWNER/NAME[@REVISION]."""
    return bool(MODEL_ID.match(text)) and not text.startswith((".", "/"))


def fetch_model(model_id: str, patterns: list[str]) -> Path:
    """Directory with the files of a Hub model that match `patterns`, downloaded once and cached.

    Raises:
        CheckpointError: there is no such model or revision, or it is not public.
        SourceUnavailable: the Hub cannot be reached and the files are not in the local cache.
    """
    from huggingface_hub import errors as hub_errors
    from huggingface_hub import snapshot_download

    name, _, revision = model_id.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except hub_errors.LocalEntryNotFoundError:
        raise SourceUnavailable(
            f"cannot reach the Hub for {name}, and it is not in the local cache",
            hint="Check the network or HF_ENDPOINT; with HF_HUB_OFFLINE=1 only what was fetched before is used.",
        ) from None
    except hub_errors.RevisionNotFoundError:
        raise CheckpointError(f"{name} has no revision {revision!r} on the Hub") from None
    except hub_errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"no model {name!r} on the Hub, and no directory of that name here",
            hint="A private model needs HF_TOKEN.",
        ) from None
    except (hub_errors.HfHubHTTPError, OSError) as error:
        raise SourceUnavailable(f"the Hub did not answer for {name}: {error}") from None
