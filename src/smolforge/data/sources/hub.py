"""SRC is a dataset of the Hugging Face Hub: hf://datasets/OWNER/NAME[@REV]/PATH, or OWNER/NAME[@REV]:CONFIG.

Questions go through the real `huggingface_hub` client, which knows HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and its
own cache. A source is resolved to a commit, and a run stays with its commit however the branch moves. The files
of a configuration are those its dataset card names, else those of a folder of its name; of several splits the
training split is taken. A file that was downloaded before is read from the client's cache.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from smolforge.data.cards import configurations, inside, select, training_patterns, wildcard_free_folder
from smolforge.data.network import Trouble, passes, retry_after
from smolforge.data.readers import format_of, known_endings
from smolforge.data.remote import RemoteFile
from smolforge.data.shard import Context, Source
from smolforge.data.sources.url import RemoteShard
from smolforge.errors import DataError, SmolforgeError, SourceChanged

T = TypeVar("T")

PREFIX = "hf://datasets/"
_LONG = re.compile(r"^hf://datasets/([\w.-]+/[\w.-]+)(?:@([\w./%-]+?))?/(.*)$")
_SHORT = re.compile(r"^([\w.-]+/[\w.-]+)(?:@([\w./-]+))?:([\w.-]+)$")
MAX_FILES = 200_000


class HubShard(RemoteShard):
    """A file of a dataset at a commit."""

    local: Path | None = None

    def read(self, start: int, length: int) -> bytes:
        if self.local is None:
            return super().read(start, length)
        try:
            with self.local.open("rb") as file:
                file.seek(start)
                data = file.read(length)
        except OSError as error:
            raise DataError(f"cannot read {self.local}: {error.strerror}") from None
        if len(data) != length:
            raise DataError(f"{self.local} is cut short", hint="Delete it; it will be fetched again.")
        return data

    def whole(self) -> Path:
        return self.local or super().whole()


def matches(spec: str) -> bool:
    """Whether SRC names a dataset of the Hub."""
    return spec.startswith("hf://") or bool(_SHORT.match(spec) and not Path(spec).exists())


def resolve(spec: str, context: Context, recorded: dict[str, Any] | None) -> Source:
    """The dataset's files at a commit.

    Raises:
        DataError: there is no such dataset, revision, configuration or file, or offline and not on this machine.
        SourceChanged: the commit of the index is gone.
        SourceUnavailable: the network stayed away.
    """
    long, short = _LONG.match(spec), _SHORT.match(spec)
    match = long or short
    if not match:
        raise DataError(
            f"{spec} names no dataset", field="data.sources", hint=f"Write {PREFIX}OWNER/NAME[@REVISION]/PATH."
        )
    hub = _Hub(spec, match[1], (match[2] or "").replace("%2F", "/") or None, context)
    path, config = (match[3].strip("/"), None) if long else (None, match[3])
    if context.offline:
        return hub.offline(path, config, recorded)
    info = hub.info(recorded["revision"] if recorded else hub.revision)
    revision = str(info.sha)
    files = hub.of_config(info, revision, str(config)) if path is None else hub.of_path(revision, path)
    if not files:
        raise DataError(f"{spec} matches no file of known format", hint=f"Known endings: {known_endings()}.")
    return Source(spec, "hub", [hub.shard(revision, *file) for file in sorted(files)], revision)


class _Hub:
    """Questions about one dataset."""

    def __init__(self, spec: str, repo: str, revision: str | None, context: Context) -> None:
        from huggingface_hub import HfApi

        self.spec, self.repo, self.revision, self.context = spec, repo, revision, context
        self.api = HfApi()

    def info(self, revision: str | None) -> Any:
        """The dataset at a revision: its commit and its card."""
        return self._ask(lambda: self.api.dataset_info(self.repo, revision=revision), revision)

    def of_path(self, revision: str, path: str) -> list[tuple[str, int, str]]:
        """(path, size, oid) of the file, the folder's files, or the files that match a pattern."""
        if any(mark in path for mark in "*?["):
            return self._matching(revision, [path])
        if path:
            found = self._ask(
                lambda: self.api.get_paths_info(self.repo, [path], revision=revision, repo_type="dataset"), revision
            )
            files = [_described(entry) for entry in found if hasattr(entry, "size")]
            if files:
                if format_of(path) is None:
                    raise DataError(f"{self.spec} has an unknown ending", hint=f"Known endings: {known_endings()}.")
                return files
            if not found:
                raise DataError(f"{self.repo} has no {path!r} at {revision[:12]}", field="data.sources")
        return _known(self._list(revision, path))

    def of_config(self, info: Any, revision: str, config: str) -> list[tuple[str, int, str]]:
        """(path, size, oid) of a configuration's training files."""
        card = info.card_data.to_dict() if info.card_data else {}
        patterns = training_patterns(card, config, self.spec)
        if patterns:
            return _known(self._matching(revision, patterns))
        for folder in (config, f"data/{config}"):
            if files := _training(_known(self._list(revision, folder))):
                return files
        known = [str(entry.get("config_name")) for entry in configurations(card)]
        raise DataError(
            f"{self.repo} has no configuration and no folder {config!r}",
            field="data.sources",
            hint=f"Its configurations: {', '.join(known)}." if known else f"Write {PREFIX}{self.repo}/PATH.",
        )

    def shard(self, revision: str, path: str, size: int, oid: str) -> HubShard:
        """A file of the dataset, readable."""
        from huggingface_hub import hf_hub_url, try_to_load_from_cache
        from huggingface_hub.utils import build_hf_headers

        url = hf_hub_url(self.repo, path, repo_type="dataset", revision=revision)
        # The commit pins the content; the host that stores it has ETags of its own.
        file = RemoteFile(self.context.network, url, path, headers=build_hf_headers, size=size)
        shard = HubShard(file, path, format_of(path) or "", {"oid": oid}, self.context)
        local = try_to_load_from_cache(self.repo, path, revision=revision, repo_type="dataset")
        if isinstance(local, (str, os.PathLike)) and Path(local).stat().st_size == size:
            shard.local, shard.remote = Path(local), False
        return shard

    def offline(self, path: str | None, config: str | None, recorded: dict[str, Any] | None) -> Source:
        """What is on this machine: the shards of an index, or the client's snapshot of the dataset."""
        if recorded:
            revision = recorded["revision"]
            shards = [self.shard(revision, e["file"], e["size"], e["identity"]["oid"]) for e in recorded["shards"]]
            return Source(self.spec, "hub", list(shards), revision)
        from huggingface_hub import DatasetCard, snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            root = Path(
                snapshot_download(self.repo, repo_type="dataset", revision=self.revision, local_files_only=True)
            )
        except LocalEntryNotFoundError:
            raise DataError(
                f"{self.repo} at {self.revision or 'main'} is not on this machine, and the network is not to be used",
                field="data.sources",
                hint=f"Fetch it with `hf download {self.repo} --repo-type dataset`, or go online.",
            ) from None
        names = [p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()]
        found = [(name, (root / name).stat().st_size, (root / name).resolve().name) for name in names]
        if path is not None:
            wanted = select(found, [path] if path else ["**"]) or select(found, [f"{path}/**"])
        else:
            readme = root / "README.md"
            card = DatasetCard.load(readme).data.to_dict() if readme.is_file() else {}
            patterns = training_patterns(card, str(config), self.spec)
            wanted = select(found, patterns or [f"{config}/**", f"data/{config}/**"])
            wanted = wanted if patterns else _training(wanted)
        files = _known(wanted)
        if not files:
            raise DataError(f"{self.spec}: its files are not on this machine, and the network is not to be used")
        return Source(self.spec, "hub", [self.shard(root.name, *file) for file in sorted(files)], root.name)

    def _matching(self, revision: str, patterns: list[str]) -> list[tuple[str, int, str]]:
        files: dict[str, tuple[str, int, str]] = {}
        for folder in {wildcard_free_folder(pattern) for pattern in patterns}:
            files |= {file[0]: file for file in self._list(revision, folder)}
        return select(list(files.values()), patterns)

    def _list(self, revision: str, folder: str) -> list[tuple[str, int, str]]:
        """All files below a folder; none where there is no such folder."""
        from huggingface_hub.errors import EntryNotFoundError

        def listing() -> list[tuple[str, int, str]]:
            files = []
            try:
                for entry in self.api.list_repo_tree(
                    self.repo, folder or None, recursive=True, revision=revision, repo_type="dataset"
                ):
                    if hasattr(entry, "size"):
                        files.append(_described(entry))
                    if len(files) > MAX_FILES:
                        raise DataError(f"{self.repo} lists over {MAX_FILES:,} files", hint="Name a folder of it.")
            except EntryNotFoundError:
                return []
            return files

        return self._ask(listing, revision)

    def _ask(self, question: Callable[[], T], revision: str | None) -> T:
        """Ask the Hub; what may pass is tried again, what may not is explained."""

        def one() -> T:
            try:
                return question()
            except SmolforgeError:
                raise
            except Exception as error:
                raise self._explain(error, revision) from None

        return self.context.network.attempt("the Hub", self.spec, one)

    def _explain(self, error: Exception, revision: str | None) -> Exception:
        from huggingface_hub import errors

        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        if isinstance(error, errors.GatedRepoError):
            return DataError(
                f"{self.repo} is gated", hint="Accept its terms on its page, then set HF_TOKEN.", field="data.sources"
            )
        if isinstance(error, errors.RepositoryNotFoundError):
            return DataError(
                f"no dataset {self.repo!r} on the Hub", hint="A private one needs HF_TOKEN.", field="data.sources"
            )
        if isinstance(error, errors.RevisionNotFoundError):
            if revision and revision != self.revision:
                return SourceChanged(f"{self.repo} no longer has commit {revision}, which the run was made with")
            return DataError(f"{self.repo} has no revision {revision!r}", field="data.sources")
        if isinstance(error, errors.HFValidationError):
            return DataError(f"{self.repo} names no dataset: {error}", field="data.sources")
        if status is not None and response is not None and passes(status):
            return Trouble(
                f"{status} {getattr(response, 'reason_phrase', '')}".strip(), wait=retry_after(response.headers)
            )
        if status is not None:
            return DataError(f"the Hub refuses {self.spec}: {status}", field="data.sources")
        # Which HTTP library the client stands on differs by its version; faults on the way share these roots.
        if type(error).__module__.partition(".")[0] in {"httpx", "httpx2", "httpcore", "requests", "urllib3"}:
            return Trouble(f"a broken connection ({type(error).__name__})")
        if isinstance(error, (OSError, TimeoutError)):
            return Trouble(f"a broken connection ({type(error).__name__})")
        return DataError(f"the Hub's answer about {self.spec} makes no sense: {error}", field="data.sources")


def _described(entry: Any) -> tuple[str, int, str]:
    lfs = getattr(entry, "lfs", None)
    return inside(str(entry.path)), int(entry.size), str(lfs.sha256 if lfs else entry.blob_id)


def _known(files: list[tuple[str, int, str]]) -> list[tuple[str, int, str]]:
    return [file for file in files if format_of(file[0])]


def _training(files: list[tuple[str, int, str]]) -> list[tuple[str, int, str]]:
    """Of a folder without a card: the training files where some are called so, else all."""
    return [file for file in files if "train" in file[0].rpartition("/")[2].lower()] or files
