"""A model directory without what only training needs: what other programs, a Space and the Hub are given.

`training/` holds optimizer state twice the size of the model, and manifest.json covers it too, so neither goes along.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from smolforge.checkpoint.format import CARD, CONFIG, GENERATION_CONFIG, check_vocabulary, check_weights, read_config
from smolforge.checkpoint.weights import SHARD_INDEX, read_weights, weight_files
from smolforge.errors import BadInput, RunFailed
from smolforge.files import no_room
from smolforge.tokenizer import TOKENIZER_FILES, Tokenizer


def model_files(directory: Path) -> list[Path]:
    """The files of a model directory that make it a model, after reading what they hold.

    Raises:
        CheckpointError: the directory is no whole model.
    """
    config = read_config(directory)
    check_vocabulary(config, Tokenizer.from_pretrained(directory))
    weights = weight_files(directory)
    check_weights(config, read_weights(directory), str(weights[0]))
    others = [CONFIG, GENERATION_CONFIG, CARD, SHARD_INDEX, *TOKENIZER_FILES]
    named = [path for name in others if (path := directory / name).is_file()]
    return sorted({*named, *weights})


def copy_model(directory: Path, out: Path) -> None:
    """Copy the model in `directory` to `out`, which is made whole or not at all.

    Raises:
        BadInput: `out` is there already.
        RunFailed: no room on the disk.
    """
    files = model_files(directory)
    with fresh_directory(Path(out), needed=sum(path.stat().st_size for path in files)) as beside:
        for path in files:
            shutil.copyfile(path, beside / path.name)


@contextlib.contextmanager
def fresh_directory(out: Path, *, needed: int = 0) -> Iterator[Path]:
    """A directory to fill, which gets the name `out` only when the block ends well.

    Args:
        out: a path that does not exist, or an empty directory.
        needed: bytes it will take, for the error where there is no room.

    Raises:
        BadInput: `out` is there already, or cannot be made.
        RunFailed: no room on the disk.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"{out} is there already", field="out", hint="Give a directory that does not exist yet.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise BadInput(f"cannot make {out}: {error.strerror}", field="out") from None
    try:
        beside.chmod(0o755)  # mkdtemp's own is for secrets
        yield beside
        beside.replace(out)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        failure = no_room(error, out, needed)
        if isinstance(failure, RunFailed):
            failure.hint = "Nothing was changed. Free some room and try again."
        raise failure from None
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
