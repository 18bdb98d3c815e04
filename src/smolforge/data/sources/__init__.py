"""Sources: from what the user names (SRC) to a list of shards, each a file that can be read by range.

    local.py   files, folders and globs on this machine
    url.py     files behind http(s)://, and behind s3://, gs://, az:// and any other protocol of fsspec
    hub.py     datasets of the Hugging Face Hub

A source is a module in `SOURCES` with two functions: `matches(spec)`, whether SRC belongs to it, and `resolve(spec,
context, recorded)`, as `resolve_source`. Adding one is a file and a line. The embedded corpus is
`smolforge.tales.source`.
"""

from __future__ import annotations

import glob
import importlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, TypeVar

from smolforge.data.cache import Cache, ReadAhead
from smolforge.data.fetch import Network
from smolforge.errors import DataError

T = TypeVar("T")

ENDINGS = {
    ".parquet": "parquet", ".jsonl": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".txt": "txt",
    ".html": "html", ".htm": "html", ".xhtml": "html", ".pdf": "pdf", ".docx": "docx", ".epub": "epub",
    **dict.fromkeys((".md", ".markdown", ".rst", ".tex", ".org", ".adoc", ".text", ".log", ".srt"), "md"),
    **dict.fromkeys((".py", ".js", ".mjs", ".jsx", ".ts", ".tsx", ".vue", ".css", ".php", ".rb", ".pl"), "code"),
    **dict.fromkeys((".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".cu", ".rs", ".go", ".zig", ".swift", ".asm"), "code"),
    **dict.fromkeys((".java", ".kt", ".scala", ".cs", ".fs", ".dart", ".hs", ".ml", ".ex", ".erl", ".clj"), "code"),
    **dict.fromkeys((".sh", ".bash", ".sql", ".lua", ".r", ".jl", ".el", ".lisp", ".f90", ".pas", ".tcl"), "code"),
}  # fmt: skip
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}  # may follow the ending of a text format
NEVER_COMPRESSED = {"parquet", "pdf", "docx", "epub"}
KNOWN_ENDINGS = (
    ".txt, .md, .html, .jsonl, .json, .csv, .tsv, .parquet, .pdf, .docx, .epub and those of source code; "
    "all but .parquet and the three after it also with .gz, .zst, .bz2 or .xz"
)
# A folder elsewhere is chosen from by names alone: the first of these groups that has files, which the others describe.
GROUPS = ({"parquet", "jsonl", "txt"}, {"json", "csv", "tsv"}, {"html", "md", "code", "pdf", "docx", "epub"})
# The same for conversations, which plain text is not.
CHAT_GROUPS = ({"parquet", "jsonl"}, {"json", "csv", "tsv"})


# Short names of datasets on the Hub, each for one source or for several with their shares.
_CORPUS = "HuggingFaceTB/smollm-corpus"
NAMES: dict[str, dict[str, float]] = {
    "cosmopedia-v2": {f"{_CORPUS}:cosmopedia-v2": 1.0},
    "fineweb-edu": {"HuggingFaceFW/fineweb-edu:sample-10BT": 1.0},
    "dclm-edu": {"hf://datasets/HuggingFaceTB/dclm-edu/data/*.parquet": 1.0},
    # The first 100 of 6,543 shuffled shards: the index of a run reads the footer of each.
    "climbmix": {"hf://datasets/karpathy/climbmix-400b-shuffle/shard_000*.parquet": 1.0},
    # 0.7 and 0.15 in config_smollm1_135M.yaml (github.com/huggingface/smollm); its code parts have no text on the Hub.
    "smollm-corpus": {f"{_CORPUS}:fineweb-edu-dedup": 0.7 / 0.85, f"{_CORPUS}:cosmopedia-v2": 0.15 / 0.85},
}


def format_of(name: str) -> str | None:
    """The format that the ending of a file's name tells, or None."""
    lower = name.lower()
    stem = next((lower.removesuffix(c) for c in COMPRESSIONS if lower.endswith(c)), lower)
    found = ENDINGS.get(PurePosixPath(stem).suffix)
    return None if found in NEVER_COMPRESSED and stem != lower else found


def of_known_format(files: Iterable[T], name: Callable[[T], str] = str) -> list[T]:
    """The files of the first of `GROUPS` that a folder has any of."""
    known = [(file, format) for file in files if (format := format_of(name(file)))]
    groups = ([file for file, format in known if format in group] for group in GROUPS)
    return next((group for group in groups if group), [])


def check_ending(name: str, named: str) -> str:
    """The format that the ending of `name` tells; DataError, about what the user `named`, where it tells none."""
    format = format_of(name)
    if format is None:
        raise no_known_file(f"{named} has an unknown ending")
    return format


def no_known_file(problem: str) -> DataError:
    """The error for a source without files that a reader knows."""
    return DataError(problem, field="data.sources", hint=f"Known endings: {KNOWN_ENDINGS}.")


def damaged(name: str, problem: object) -> DataError:
    """The error for a file whose bytes make no sense."""
    message = " ".join(str(problem).split())[:300]
    return DataError(f"{name} is damaged: {message}", field="data.sources", hint="Fetch or write the file again.")


@dataclass
class Context:
    """What sources and readers share: keys of the configuration, the caches, the network."""

    column: str
    separator: str | None
    on_error: str
    read_ahead: ReadAhead
    offline: bool
    cache: Cache
    network: Network
    format: str = "text"  # of rows, as `data.format`


class Shard(ABC):
    """One file of a source."""

    name: str  # path inside the source, with `/`; errors and addresses call it so
    format: str  # a key of `readers.READERS`
    size: int  # bytes
    remote: bool = False  # whether reading it uses the network
    notes: Mapping[str, Any] = MappingProxyType({})  # what may change without harm; kept next to the identity

    def read(self, start: int, length: int) -> bytes:
        """Exactly `length` bytes from `start`; raises as `resolve_source`."""
        raise NotImplementedError(f"{self.name} has no bytes")

    def whole(self) -> Path:
        """A local file with all its bytes; a remote one is fetched into the cache once."""
        raise NotImplementedError(f"{self.name} is not a file")

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What must stay equal while a run lives, JSON-able; part of the index and its hash."""

    def difference(self, recorded: dict[str, Any]) -> str | None:
        """What changed since an index entry was made, in words, or None."""
        if recorded["size"] != self.size:
            return f"its size was {recorded['size']:,} bytes and is {self.size:,}"
        now = self.identity()
        changed = ((key, was) for key, was in recorded["identity"].items() if now.get(key) != was)
        return next((f"its {key} was {was} and is {now.get(key)}" for key, was in changed), None)

    def forget(self) -> None:
        """Drop cached bytes: what was read made no sense."""
        return


@dataclass
class Source:
    """A resolved source."""

    spec: str
    kind: str  # the key of its module in `SOURCES`
    shards: list[Shard]  # in canonical order (by name)
    revision: str | None = None  # the commit, where there is one
    entropy_bits_per_byte: Callable[[], float] | None = None


# The first module that matches a SRC resolves it; `local` matches everything.
SOURCES = {
    "tales": "smolforge.tales.source",
    "web": "smolforge.data.sources.url",
    "hub": "smolforge.data.sources.hub",
    "local": "smolforge.data.sources.local",
}


def absolute(spec: str) -> str:
    """SRC with an absolute path, where it is a file, folder or glob on this machine; any other is unchanged."""
    if _module_of(spec).__name__ != SOURCES["local"]:
        return spec
    path = Path(spec).expanduser()
    if path.exists():
        return os.path.abspath(path)  # noqa: PTH100 (links stay: they may point elsewhere later)
    if not glob.has_magic(spec) or path.is_absolute():
        return str(path)
    return os.path.normpath(f"{glob.escape(str(Path.cwd()))}/{path}")


def expand_names(sources: Mapping[str, float]) -> dict[str, float]:
    """`sources` with each short name replaced by what it stands for; a path that exists is not a name."""
    expanded: dict[str, float] = {}
    for source, weight in sources.items():
        parts = {source: 1.0} if Path(source).exists() else NAMES.get(source, {source: 1.0})
        for part, share in parts.items():
            expanded[part] = expanded.get(part, 0.0) + weight * share
    return expanded


def _module_of(spec: str) -> Any:
    modules = (importlib.import_module(name) for name in SOURCES.values())
    return next(module for module in modules if module.matches(spec))


def resolve_source(spec: str, context: Context, recorded: dict[str, Any] | None = None) -> Source:
    """Find the shards that SRC names; `recorded` is its entry in an earlier index.

    Raises:
        DataError: there is no such source, or it cannot be read; SourceChanged, where it is not the recorded one.
        SourceUnavailable: the network did not answer.
    """
    return _module_of(spec).resolve(spec, context, recorded)
