"""The map of the code is true: docstrings name the files, functions and files stay short, old names are gone."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "smolforge"
FILES = sorted(SOURCE.rglob("*.py"))
PACKAGES = sorted(path.parent for path in FILES if path.name == "__init__.py" and path.parent != SOURCE)
# A line of a package's map: four blanks or none, the file (sub/name.py for a folder without a map), what it is.
ENTRY = re.compile(r"^ *([\w/]+\.py)(?=  )")
# The redesign ended at 19,500 lines; a feature may add what it needs, and a simplification lowers the limit again.
MAX_LINES, MAX_FILES, MAX_FUNCTION, MAX_FILE = 30_657, 177, 60, 400

# HOUSE words: the old name as a whole word, where it is distinctive enough to search for.
OLD_NAMES = (
    r"Sampling\(", r"\bPiece\b", r"\bPicked\b", r"\bLookup\b", r"\bRanks\b", r"\bUpdater\b", r"\bKeep\(", r"\bBodies\b",
    r"class (Choice|Step|Pool|Figures|Observer|Pace|Stop|Session|Slice|Guard)\b", r"\bgive_back\b",
    r"\bwiring\.apply\b", r"\bsettle_(batch|config)\b", r"\b_settle\b", r"\bEngine\.(of|load)\b", r"\bconfig\.dim\b",
    r"\bnative\.py\b", r"\bfreeze\(", r"\bsay: (Callable\[\[str\], None|Say)", r"\bsay=", r"\bstream_text\b", r"\bread_samples\b",
    r"\bmixed_texts\b", r"\bderivations\b", r"\bkept_f16\b", r"\bfooter\b\.STOP",
)  # fmt: skip
# The old English, in code and documentation.
OLD_PHRASES = (
    r"gone on with", r"go on with", r"none of this model", r"\bis no (YAML|port|count|JSON|time|range|step)\b",
    r"\bdear\b", r"\bvouch", r"\bguests?\b(?! of)", r"\bfloors? of the house\b", r"\brooms\b", r"shares? their fate",
    r"told at once", r"passes from becoming one", r"bare loop", r"\bstayed away\b", r"one that warms up",
    r"holds the logits\)", r"leaves the cache\)",
)  # fmt: skip


def _functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def _expected(package: Path) -> set[str]:
    """The files that the package's map has to name; a subfolder with a map of its own is named there."""
    own = {path for path in package.rglob("*.py") if path.name != "__init__.py"}
    for inner in PACKAGES:
        if inner != package and package in inner.parents:
            own -= {path for path in own if inner in path.parents}
    return {path.relative_to(package).as_posix() for path in own}


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_the_docstring_of_a_package_names_its_files(package: Path) -> None:
    doc = ast.get_docstring(ast.parse((package / "__init__.py").read_text()), clean=False) or ""
    named = [match[1] for line in doc.splitlines() if (match := ENTRY.match(line))]
    named = [name for name in named if not name.endswith("__init__.py")]
    own = [name for name in named if not any((package / name).is_relative_to(p) for p in PACKAGES if p != package)
           or (package / name).parent == package]  # fmt: skip
    assert sorted(own) == sorted(set(own)) == sorted(_expected(package))


def test_functions_and_files_are_short() -> None:
    long = []
    for path in FILES:
        text = path.read_text()
        count = len(text.splitlines())
        if count > MAX_FILE:
            long.append(f"{path.relative_to(SOURCE)}: {count} lines")
        for node in _functions(ast.parse(text)):
            lines = (node.end_lineno or 0) - node.lineno + 1
            if lines > MAX_FUNCTION:
                long.append(f"{path.relative_to(SOURCE)}:{node.lineno} {node.name}: {lines} lines")
    assert not long, "\n".join(long)


def test_the_package_is_small() -> None:
    lines = sum(len(path.read_text().splitlines()) for path in FILES)
    assert lines <= MAX_LINES and len(FILES) <= MAX_FILES, f"{lines} lines in {len(FILES)} files"


def _found(patterns: tuple[str, ...], paths: list[Path]) -> list[str]:
    expression = re.compile("|".join(patterns))
    return [
        f"{path.relative_to(ROOT)}:{number}: {match[0]}"
        for path in paths
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if (match := expression.search(line))
    ]


def test_old_names_are_gone() -> None:
    examples = [*(ROOT / "examples").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    assert not (found := _found(OLD_NAMES, [*FILES, *examples])), "\n".join(found)


def test_the_old_english_is_gone() -> None:
    pages = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"]
    native = [*SOURCE.rglob("*.cpp"), *SOURCE.rglob("*.h")]
    assert not (found := _found(OLD_PHRASES, [*FILES, *pages, *native])), "\n".join(found)
