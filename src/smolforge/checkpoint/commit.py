"""Commit, verify, find and prune checkpoints. A checkpoint exists completely or not at all.

Writing: the files go to a hidden directory next to the final one and are fsynced, manifest.json (size and sha256 of
each file) last; then the directory is renamed and the link `last` set. A process killed at any instant leaves the
checkpoints as they were, plus at most a hidden directory, which readers ignore and `sweep` removes.

Reading: the files are compared with the manifest, so a flipped byte, a truncated file or a missing one is reported by
name and the checkpoint before it is used. The manifest carries a checksum of itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import shutil
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from smolforge.checkpoint.weights import check_safetensors, is_inside
from smolforge.errors import CheckpointError, RunFailed
from smolforge.files import NO_ROOM, free_bytes, read_json, sync_directory, sync_file

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
PINNED = "pinned"  # a file of this name in a checkpoint keeps it for good
LAST, BEST = "last", "best"  # links to the newest checkpoint, and to the one with the lowest held-out loss
TRAINING = "training"  # the folder of what only resuming reads
MAX_MANIFEST_BYTES = 16 << 20
_STEP = re.compile(r"^step-(\d{8,})$")
_ASIDE = re.compile(r"^\.old-step-(\d{8,})-[0-9a-f]+$")
_BLOCK = 4 << 20


def step_name(step: int) -> str:
    """The directory name of a step: step-00005000."""
    return f"step-{step:08d}"


def step_of(directory: Path) -> int | None:
    """The step that a checkpoint directory is named after, or None."""
    match = _STEP.match(directory.name)
    return int(match[1]) if match else None


def steps(checkpoints: Path) -> list[int]:
    """The steps that have a checkpoint directory, oldest first; whether they are whole is not looked at."""
    if not checkpoints.is_dir():
        return []
    found = (step_of(entry) for entry in checkpoints.iterdir() if entry.is_dir() and not entry.is_symlink())
    return sorted(step for step in found if step is not None)


def commit(checkpoints: Path, step: int, write: Callable[[Path], None], *, expected_bytes: int | None = None) -> Path:
    """Make the checkpoint of `step`, replacing one of the same step; its directory.

    Args:
        write: fills the directory that it is given. An error that it raises leaves the checkpoints as they were.
        expected_bytes: about how much it will write; if less is free, that is an error before anything is written.

    Raises:
        RunFailed: no room on the disk, or what was written cannot be read back.
    """
    checkpoints.mkdir(parents=True, exist_ok=True)
    if expected_bytes is not None and expected_bytes > free_bytes(checkpoints):
        raise _no_room(checkpoints, step, expected_bytes)
    temporary = checkpoints / f".tmp-{step_name(step)}-{uuid.uuid4().hex}"
    try:
        temporary.mkdir()
        write(temporary)
        _seal(temporary, step)
        target = _move_into_place(temporary, checkpoints, step)
    except BaseException as error:
        written = tree_bytes(temporary)
        shutil.rmtree(temporary, ignore_errors=True)
        if is_no_room(error):
            raise _no_room(checkpoints, step, max(expected_bytes or 0, written)) from error
        raise
    point(checkpoints, LAST, target.name)
    return target


def is_no_room(error: BaseException) -> bool:
    """Whether a disk is full; safetensors reports the operating system's error only in its text."""
    return getattr(error, "errno", None) in NO_ROOM or any(f"(os error {code})" in str(error) for code in NO_ROOM)


def _seal(directory: Path, step: int) -> None:
    """Check, fsync and list all files in `directory`; the manifest is written last."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    for path in files:
        if path.suffix == ".safetensors":
            try:
                check_safetensors(path)
            except CheckpointError as error:
                raise RunFailed(f"{path.name} could not be read back after writing: {error.message}") from None
        sync_file(path)
    listed = {path.relative_to(directory).as_posix(): entry for path, entry in _hash_files(files)}
    for folder in sorted({path.parent for path in files} | {directory}, key=lambda p: -len(p.parts)):
        sync_directory(folder)
    manifest = directory / MANIFEST
    manifest.write_text(_manifest_text(step, listed), encoding="utf-8")
    sync_file(manifest)
    sync_directory(directory)


def _move_into_place(temporary: Path, checkpoints: Path, step: int) -> Path:
    target = checkpoints / step_name(step)
    aside = None
    if target.exists():
        # Between the two renames the step is only found by `_replaced`.
        aside = checkpoints / f".old-{target.name}-{uuid.uuid4().hex}"
        target.rename(aside)
    try:
        temporary.rename(target)
    except OSError:
        if aside is not None:
            aside.rename(target)
        raise
    sync_directory(checkpoints)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def point(checkpoints: Path, name: str, target: str) -> None:
    """Set the link `name` in the directory of checkpoints to one of them."""
    link = checkpoints / f".last-{uuid.uuid4().hex}"
    # Some filesystems have no symbolic links. They are for people; nothing here reads them.
    with contextlib.suppress(OSError):
        link.symlink_to(target)
        link.replace(checkpoints / name)
        sync_directory(checkpoints)
    link.unlink(missing_ok=True)


def _hash_files(files: list[Path]) -> Iterable[tuple[Path, dict[str, Any]]]:
    # hashlib lets other threads run while it works on a block of this size.
    with ThreadPoolExecutor(max_workers=4) as pool:
        yield from zip(files, pool.map(describe_file, files), strict=True)


def describe_file(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return {"size": size, "sha256": digest.hexdigest()}


def _manifest_text(step: int, files: dict[str, dict[str, Any]]) -> str:
    content: dict[str, Any] = {"format": 1, "step": step, "files": dict(sorted(files.items()))}
    content["sha256"] = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps(content, indent=1) + "\n"


def read_manifest(directory: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """The step and the files (path: size and sha256) that a checkpoint's manifest lists.

    Raises:
        CheckpointError: it is missing, damaged, or names a file outside the directory.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{MANIFEST} is missing: the checkpoint was never finished")
    content = read_json(path, limit=MAX_MANIFEST_BYTES, field=MANIFEST)
    step, files = content.get("step"), content.get("files")
    if type(step) is not int or not isinstance(files, dict) or content.get("format") != 1:
        raise CheckpointError("is damaged", field=MANIFEST)
    if _manifest_text(step, files).encode() != path.read_bytes():
        raise CheckpointError("is damaged: its own checksum does not fit", field=MANIFEST)
    for name, entry in files.items():
        if not is_inside(name):
            raise CheckpointError(f"names {name!r}, which is not a file inside the checkpoint", field=MANIFEST)
        if not isinstance(entry, dict) or set(entry) != {"size", "sha256"} or type(entry["size"]) is not int:
            raise CheckpointError(f"has no size and sha256 for {name}", field=MANIFEST)
    return step, files


def verify(directory: Path, *, training: bool = True, contents: bool = True) -> list[str]:
    """What is wrong with a checkpoint, each problem naming its file; empty when it is whole.

    Files that the manifest does not list are accepted unless they are weights.

    Args:
        training: False leaves out the optimizer and state of training, which a model is used without. They are
            three times as large as the model.
        contents: whether every byte is read and compared, or the sizes alone.
    """
    try:
        step, listed = read_manifest(directory)
    except CheckpointError as error:
        return [str(error)]
    if step_of(directory) not in (None, step):
        return [f"{MANIFEST}: is that of step {step}"]
    problems, present = [], []
    for name, entry in listed.items():
        path = directory / name
        if not training and PurePosixPath(name).parts[0] == TRAINING:
            continue
        if not path.is_file():
            problems.append(f"{name}: is missing")
        elif (size := path.stat().st_size) != entry["size"]:
            problems.append(f"{name}: is {size:,} bytes, expected {entry['size']:,}")
        elif contents:
            present.append(path)
    try:
        for path, found in _hash_files(present):
            name = path.relative_to(directory).as_posix()
            if found["sha256"] != listed[name]["sha256"]:
                expected = str(listed[name]["sha256"])[:12]
                problems.append(f"{name}: its bytes have changed (sha256 {found['sha256'][:12]}, expected {expected})")
    except OSError as error:
        problems.append(f"{error.filename}: cannot be read: {error.strerror}")
    for path in sorted(directory.rglob("*.safetensors*")):
        name = path.relative_to(directory).as_posix()
        if name not in listed and (training or not name.startswith(f"{TRAINING}/")):
            problems.append(f"{name}: is not in {MANIFEST}")
    return problems


def newest_whole(checkpoints: Path, *, training: bool = True) -> Path | None:
    """The newest checkpoint that `verify` finds whole, or None; logs which newer ones are damaged, and how."""
    known = _replaced(checkpoints) | {step: checkpoints / step_name(step) for step in steps(checkpoints)}
    for _, directory in sorted(known.items(), reverse=True):
        problems = verify(directory, training=training)
        if not problems:
            return directory
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        logger.warning(f"checkpoint {directory.name} is damaged and not used: {problems[0]}{more}")
    return None


def _replaced(checkpoints: Path) -> dict[int, Path]:
    """By step, the checkpoints that were being replaced when the process was killed."""
    entries = checkpoints.iterdir() if checkpoints.is_dir() else ()
    return {int(match[1]): entry for entry in entries if (match := _ASIDE.match(entry.name))}


def sweep(checkpoints: Path) -> list[str]:
    """Remove what killed processes left unfinished; the names removed. The caller holds the run's lock."""
    if not checkpoints.is_dir():
        return []
    for step, aside in _replaced(checkpoints).items():
        if not (checkpoints / step_name(step)).exists():
            aside.rename(checkpoints / step_name(step))
    removed = []
    for entry in sorted(checkpoints.iterdir()):
        if entry.name.startswith((".tmp-step-", ".old-step-", ".gone-step-")):
            shutil.rmtree(entry, ignore_errors=True)
            removed.append(entry.name)
        elif entry.name.startswith(".last-"):
            entry.unlink(missing_ok=True)
    return removed


def prune(checkpoints: Path, *, keep: int, keep_every: int | None = None, best: int | None = None) -> list[int]:
    """Remove old checkpoints; the steps removed.

    The newest `keep` stay, every step that `keep_every` divides, the `best` step, and those with a file named `pinned`
    inside. A checkpoint with a missing or cut file does not count among the newest, so that
    damage never pushes a whole one out. At least the newest whole one always stays.
    """
    present = steps(checkpoints)
    whole = [step for step in present if not verify(checkpoints / step_name(step), contents=False)]
    newest = whole[-max(1, keep) :]
    removed = []
    for step in present:
        directory = checkpoints / step_name(step)
        stays = step in {*newest, best} or (keep_every and step % keep_every == 0)
        # Damaged and newer than what is kept: it stays to be looked at, and is replaced in its turn.
        if stays or (directory / PINNED).exists() or not newest or step > newest[0]:
            continue
        # Renamed first: a kill in the middle leaves nothing that looks like a checkpoint.
        gone = checkpoints / f".gone-{directory.name}-{uuid.uuid4().hex}"
        directory.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
        removed.append(step)
    return removed


def _no_room(checkpoints: Path, step: int, needed: int) -> RunFailed:
    previous = newest_whole(checkpoints)
    if previous is not None:
        needed = max(needed, tree_bytes(previous))
    safe = f"The newest checkpoint, {previous}, is whole." if previous else "There is no earlier checkpoint."
    amounts = f"about {needed:,} bytes are needed, {free_bytes(checkpoints):,} are free"
    return RunFailed(
        f"no room on the disk for the checkpoint of step {step} in {checkpoints}: {amounts}",
        hint=f"{safe} Free some room (or lower checkpoint.keep) and start the same command again.",
    )


def tree_bytes(directory: Path) -> int:
    """Bytes of all files below a directory."""
    total = 0
    for path in directory.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total
