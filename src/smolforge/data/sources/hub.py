"""SRC is a dataset of the Hugging Face Hub: hf://datasets/OWNER/NAME[@REV]/PATH, or OWNER/NAME[@REV]:CONFIG.

Questions go through `huggingface_hub`, which knows HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and its own cache. A source is
resolved to a commit, and a run stays with its commit when the branch moves. The files of a configuration are those that
the dataset card names, else those of a folder of its name; of several splits the training split is used. A file that
was downloaded before is read from the client's cache. Patterns and paths from a dataset must stay inside it.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from glob import has_magic
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from smolforge.data.fetch import HttpFile, Trouble, may_pass, retry_after
from smolforge.data.sources import Context, Source, check_ending, no_known_file, of_known_format
from smolforge.data.sources.url import RemoteShard
from smolforge.errors import DataError, SourceChanged

T = TypeVar("T")
File = tuple[str, int, str]  # path, bytes, oid
logger = logging.getLogger(__name__)

PREFIX = "hf://datasets/"
_LONG = re.compile(r"^hf://datasets/([\w.-]+/[\w.-]+)(?:@([\w./%-]+?))?/(.*)$")
_SHORT = re.compile(r"^([\w.-]+/[\w.-]+)(?:@([\w./-]+))?:([\w.-]+)$")
_GLOB = re.compile(r"\*\*/|\*\*|\*|\?|\[.[^\]]*\]|.", re.DOTALL)
MAX_FILES = 200_000


def matches(spec: str) -> bool:
    """Whether SRC names a dataset of the Hub."""
    return spec.startswith("hf://") or bool(_SHORT.match(spec) and not Path(spec).exists())


def resolve(spec: str, context: Context, recorded: dict[str, Any] | None) -> Source:
    """The dataset's files at a commit."""
    long, short = _LONG.match(spec), _SHORT.match(spec)
    match = long or short
    if not match:
        hint = f"Write {PREFIX}OWNER/NAME[@REVISION]/PATH."
        raise DataError(f"{spec} does not name a dataset", field="data.sources", hint=hint)
    dataset = _Dataset(spec, match[1], (match[2] or "").replace("%2F", "/") or None, context)
    path, config = (match[3].strip("/"), "") if long else (None, match[3])
    if context.offline:
        revision, files = dataset.on_disk(path, config, recorded)
    else:
        info = dataset.info(recorded["revision"] if recorded else dataset.revision)
        revision = str(info.sha)
        files = dataset.of_config(info, revision, config) if path is None else dataset.of_path(revision, path)
    if not files:
        raise no_known_file(f"{spec} matches no file of a known format")
    return Source(spec, "hub", [dataset.shard(revision, *file) for file in sorted(files)], revision)


class _Dataset:
    """Questions about one dataset."""

    def __init__(self, spec: str, repo: str, revision: str | None, context: Context) -> None:
        from huggingface_hub import HfApi

        self.spec, self.repo, self.revision, self.context = spec, repo, revision, context
        self.api = HfApi()

    def info(self, revision: str | None) -> Any:
        """The dataset at a revision: its commit and its card."""
        return self._ask(lambda: self.api.dataset_info(self.repo, revision=revision), revision)

    def of_path(self, revision: str, path: str) -> list[File]:
        """The file, the folder's files, or the files that match a pattern."""
        if has_magic(path):
            return _known(self._matching(revision, [path]))
        if path:
            place: dict[str, Any] = {"revision": revision, "repo_type": "dataset"}
            found = self._ask(lambda: self.api.get_paths_info(self.repo, [path], **place), revision)
            files = [_described(entry) for entry in found if hasattr(entry, "size")]
            if files:
                check_ending(path, self.spec)
                return files
            if not found:
                raise DataError(f"{self.repo} has no {path!r} at {revision[:12]}", field="data.sources")
        return _known(self._list(revision, path))

    def of_config(self, info: Any, revision: str, config: str) -> list[File]:
        """A configuration's training files."""
        card = info.card_data.to_dict() if info.card_data else {}
        patterns = training_patterns(card, config, self.spec)
        if patterns:
            return _known(self._matching(revision, patterns))
        for folder in (config, f"data/{config}"):
            if files := _training(_known(self._list(revision, folder))):
                return files
        known = [str(entry.get("config_name")) for entry in configurations(card)]
        hint = f"Its configurations: {', '.join(known)}." if known else f"Write {PREFIX}{self.repo}/PATH."
        raise DataError(f"{self.repo} has no configuration and no folder {config!r}", field="data.sources", hint=hint)

    def shard(self, revision: str, path: str, size: int, oid: str) -> RemoteShard:
        """A file of the dataset, readable."""
        from huggingface_hub import hf_hub_url, try_to_load_from_cache
        from huggingface_hub.utils import build_hf_headers

        url = hf_hub_url(self.repo, path, repo_type="dataset", revision=revision)
        # The commit fixes the content; the host that stores it has ETags of its own.
        file = HttpFile(self.context.network, url, path, size, build_hf_headers)
        shard = RemoteShard(file, path, {"oid": oid}, self.context)
        local = try_to_load_from_cache(self.repo, path, revision=revision, repo_type="dataset")
        if isinstance(local, (str, os.PathLike)) and Path(local).stat().st_size == size:
            shard.local, shard.remote = Path(local), False
        return shard

    def on_disk(self, path: str | None, config: str, recorded: dict[str, Any] | None) -> tuple[str, list[File]]:
        """Commit and files without the network: those of an index, or of the client's snapshot of the dataset."""
        if recorded:
            files = [(entry["file"], entry["size"], entry["identity"]["oid"]) for entry in recorded["shards"]]
            return recorded["revision"], files
        from huggingface_hub import DatasetCard, snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            folder = snapshot_download(self.repo, repo_type="dataset", revision=self.revision, local_files_only=True)
        except LocalEntryNotFoundError:
            hint = f"Fetch it with `hf download {self.repo} --repo-type dataset`, or go online."
            where = f"{self.repo} at {self.revision or 'main'} is not on this machine"
            raise DataError(f"{where}, and the network must not be used", field="data.sources", hint=hint) from None
        root = Path(folder)
        paths = [path for path in root.rglob("*") if path.is_file()]
        found = [(p.relative_to(root).as_posix(), p.stat().st_size, p.resolve().name) for p in paths]
        if path is not None:
            wanted = select(found, [path] if path else ["**"]) or select(found, [f"{path}/**"])
        else:
            readme = root / "README.md"
            card = DatasetCard.load(readme).data.to_dict() if readme.is_file() else {}
            patterns = training_patterns(card, config, self.spec)
            wanted = select(found, patterns or [f"{config}/**", f"data/{config}/**"])
            wanted = wanted if patterns else _training(wanted)
        files = _known(wanted)
        if not files:
            raise DataError(f"{self.spec}: its files are not on this machine, and the network must not be used")
        return root.name, files

    def _matching(self, revision: str, patterns: list[str]) -> list[File]:
        """The files that match a pattern, listed from the last folder that has no wildcard before it."""
        folders = {re.split(r"[*?\[]", pattern)[0].rpartition("/")[0] for pattern in patterns}
        return select(sorted({file for folder in folders for file in self._list(revision, folder)}), patterns)

    def _list(self, revision: str, folder: str) -> list[File]:
        """All files below a folder; none where there is no such folder."""
        from huggingface_hub.errors import EntryNotFoundError

        def listing() -> list[File]:
            place: dict[str, Any] = {"revision": revision, "repo_type": "dataset"}
            tree = self.api.list_repo_tree(self.repo, folder or None, recursive=True, **place)
            try:
                entries = (entry for entry in tree if hasattr(entry, "size"))
                files = [_described(entry) for entry in islice(entries, MAX_FILES + 1)]
            except EntryNotFoundError:
                return []
            if len(files) > MAX_FILES:
                raise DataError(f"{self.repo} lists over {MAX_FILES:,} files", hint="Name a folder of it.")
            return files

        return self._ask(listing, revision)

    def _ask(self, question: Callable[[], T], revision: str | None) -> T:
        """Ask the Hub; what may pass is tried again, other errors are explained."""
        return self.context.network.attempt("the Hub", self.spec, question, partial(self._explain, revision))

    def _explain(self, revision: str | None, error: Exception) -> Exception:
        from huggingface_hub import errors

        def refused(message: str, hint: str | None = None) -> DataError:
            return DataError(message, field="data.sources", hint=hint)

        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        if isinstance(error, errors.GatedRepoError):
            return refused(f"{self.repo} is gated", "Accept its terms on its page, then set HF_TOKEN.")
        if isinstance(error, errors.RepositoryNotFoundError):
            return refused(f"no dataset {self.repo!r} on the Hub", "A private one needs HF_TOKEN.")
        if isinstance(error, errors.RevisionNotFoundError):
            if revision and revision != self.revision:
                return SourceChanged(f"{self.repo} no longer has commit {revision}, which the run was made with")
            return refused(f"{self.repo} has no revision {revision!r}")
        if isinstance(error, errors.HFValidationError):
            return refused(f"{self.repo} does not name a dataset: {error}")
        if response is not None and status is not None and may_pass(status):
            reason = getattr(response, "reason_phrase", "")
            return Trouble(f"{status} {reason}".strip(), wait=retry_after(response.headers))
        if status is not None:
            return refused(f"the Hub refuses {self.spec}: {status}")
        # Which HTTP library the client uses differs by its version; faults on the way share these roots.
        library = type(error).__module__.partition(".")[0]
        if isinstance(error, OSError) or library in {"httpx", "httpx2", "httpcore", "requests", "urllib3"}:
            return Trouble(f"a broken connection ({type(error).__name__})")
        return refused(f"the Hub's answer about {self.spec} makes no sense: {error}")


# -- dataset cards


def configurations(card: dict[str, Any]) -> list[dict[str, Any]]:
    """The configurations that a card declares."""
    configs = card.get("configs")
    return [entry for entry in configs if isinstance(entry, dict)] if isinstance(configs, list) else []


def training_patterns(card: dict[str, Any], config: str, spec: str) -> list[str]:
    """The patterns that a dataset card names for a configuration's training split; none where it names none."""
    entry = next((entry for entry in configurations(card) if entry.get("config_name") == config), {})
    data_files = entry.get("data_files")
    items = data_files if isinstance(data_files, list) else [data_files]
    patterns = [item for item in items if isinstance(item, str)]
    splits = [item for item in items if isinstance(item, dict)]
    names = [str(item.get("split")) for item in splits]
    if len(names) > 1:
        used = "train is" if "train" in names else "all are"
        logger.info("%s: of the splits %s, %s used", spec, ", ".join(names), used)
    for item in [item for item in splits if item.get("split") == "train"] or splits:
        path = item.get("path")
        patterns += [p for p in (path if isinstance(path, list) else [path]) if isinstance(p, str)]
    folder = entry.get("data_dir")
    if not patterns and isinstance(folder, str):
        patterns = [f"{folder.strip('/')}/**"]
    return [inside(pattern.removeprefix("./")) for pattern in patterns]


def inside(path: str) -> str:
    """The path itself, if it stays inside the dataset; else DataError."""
    if "://" in path or path.startswith("/") or "\\" in path or ".." in path.split("/") or not path.isprintable():
        raise DataError(f"the dataset names {path!r}, which is not a path inside it", field="data.sources")
    return path


def select(files: Sequence[File], patterns: Sequence[str]) -> list[File]:
    """The files that match one of the patterns."""
    wanted = [pattern_regex(pattern) for pattern in patterns]
    return [file for file in files if any(regex.match(file[0]) for regex in wanted)]


def pattern_regex(pattern: str) -> re.Pattern[str]:
    """A glob over paths: `*` and `?` within a folder, `**` across folders, [abc] one of these."""
    known = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}

    def translate(match: re.Match[str]) -> str:
        token = match[0]
        if len(token) < 3 or token in known:
            return known.get(token) or re.escape(token)
        chosen = token[1:-1].replace("\\", "\\\\").replace("[", "\\[")
        return f"[{'^' + chosen[1:] if chosen[0] in '!^' else chosen}]"

    try:
        return re.compile(_GLOB.sub(translate, pattern) + r"\Z")
    except re.error:
        return re.compile(re.escape(pattern) + r"\Z")


def _described(entry: Any) -> File:
    lfs = getattr(entry, "lfs", None)
    return inside(str(entry.path)), int(entry.size), str(lfs.sha256 if lfs else entry.blob_id)


def _known(files: list[File]) -> list[File]:
    return of_known_format(files, lambda file: file[0])


def _training(files: list[File]) -> list[File]:
    """Of a folder without a card: the training files where some are named so, else all."""
    return [file for file in files if "train" in file[0].rpartition("/")[2].lower()] or files
