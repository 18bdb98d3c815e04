"""What a dataset card says about its files, and the patterns it says it with.

A card is written by whoever owns the dataset: a pattern or path that leaves the dataset is refused.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

from smolforge.errors import DataError

logger = logging.getLogger(__name__)

File = tuple[str, int, str]  # path, bytes, oid


def training_patterns(card: dict[str, Any], config: str, spec: str) -> list[str]:
    """The patterns that a dataset card names for a configuration's training split; none where it names none.

    Raises:
        DataError: a pattern leaves the dataset.
    """
    for entry in configurations(card):
        if entry.get("config_name") != config:
            continue
        data_files = entry.get("data_files")
        if isinstance(data_files, str):
            patterns = [data_files]
        else:
            items = data_files if isinstance(data_files, list) else []
            patterns = [item for item in items if isinstance(item, str)]
            splits = [item for item in items if isinstance(item, dict)]
            names = [str(item.get("split")) for item in splits]
            chosen = [item for item in splits if item.get("split") == "train"] or splits
            if len(names) > 1:
                used = "train is" if "train" in names else "all are"
                logger.info("%s: of the splits %s, %s used", spec, ", ".join(names), used)
            for item in chosen:
                path = item.get("path")
                paths = path if isinstance(path, list) else [path]
                patterns += [p for p in paths if isinstance(p, str)]
        folder = entry.get("data_dir")
        if not patterns and isinstance(folder, str):
            patterns = [f"{folder.strip('/')}/**"]
        return [inside(pattern.removeprefix("./")) for pattern in patterns]
    return []


def configurations(card: dict[str, Any]) -> list[dict[str, Any]]:
    """The configurations that a card declares."""
    configs = card.get("configs")
    return [entry for entry in configs if isinstance(entry, dict)] if isinstance(configs, list) else []


def inside(path: str) -> str:
    """The path itself, if it stays inside the dataset.

    Raises:
        DataError: it does not.
    """
    parts = path.split("/")
    if "://" in path or path.startswith("/") or "\\" in path or ".." in parts or not path.isprintable():
        raise DataError(f"the dataset names {path!r}, which is no path inside it", field="data.sources")
    return path


def select(files: Sequence[File], patterns: Sequence[str]) -> list[File]:
    """The files that match one of the patterns."""
    wanted = [pattern_regex(pattern) for pattern in patterns]
    return [file for file in files if any(regex.match(file[0]) for regex in wanted)]


def wildcard_free_folder(pattern: str) -> str:
    """The folder of a pattern up to its first wildcard."""
    parts = pattern.split("/")
    fixed = []
    for part in parts[:-1]:
        if any(mark in part for mark in "*?["):
            break
        fixed.append(part)
    return "/".join(fixed)


def pattern_regex(pattern: str) -> re.Pattern[str]:
    """A glob over paths: `*` and `?` within a folder, `**` across folders, [abc] one of these."""
    out, i = "", 0
    while i < len(pattern):
        if pattern.startswith("**/", i):
            out, i = out + "(?:.*/)?", i + 3
        elif pattern.startswith("**", i):
            out, i = out + ".*", i + 2
        elif pattern[i] == "*":
            out, i = out + "[^/]*", i + 1
        elif pattern[i] == "?":
            out, i = out + "[^/]", i + 1
        elif pattern[i] == "[" and "]" in pattern[i + 2 :]:
            end = pattern.index("]", i + 2)
            inside = pattern[i + 1 : end].replace("\\", "\\\\").replace("[", "\\[")
            out, i = out + f"[{'^' + inside[1:] if inside[0] in '!^' else inside}]", end + 1
        else:
            out, i = out + re.escape(pattern[i]), i + 1
    try:
        return re.compile(out + r"\Z")
    except re.error:
        return re.compile(re.escape(pattern) + r"\Z")
