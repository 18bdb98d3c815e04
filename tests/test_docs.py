"""What the pages say can be typed, and what they link to exists."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import smolforge
from smolforge import cli, config

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "llms.txt",
    ROOT / "examples" / "README.md",
]
COMMAND = re.compile(rf"(?:^|`|-m )(smolforge (?:{'|'.join(cli.VERBS)})\b[^`\n|#]*)", re.MULTILINE)


def commands() -> list[tuple[str, str]]:
    return [(page.name, match.strip()) for page in PAGES for match in COMMAND.findall(page.read_text())]


@pytest.mark.parametrize("page, command", commands())
def test_every_command_parses_and_its_configuration_builds(page: str, command: str) -> None:
    words = shlex.split(command)[1:]
    if len(words) == 1 or any(word.isupper() or "[" in word or "..." in word for word in words):
        return  # the name of a verb, or a form with placeholders: not a command
    if "--help" in words:
        with pytest.raises(SystemExit) as left:
            cli.parser(words[0]).parse_args(words)
        assert left.value.code == 0
        return
    args = cli.parser(words[0]).parse_args(words)
    if args.verb == "train" and not (args.base or "").endswith(".yaml"):
        config.build_config(args.base or "pocket", args.overrides)


PROGRAM = re.compile(r"((?:benchmarks|examples)/[\w/]+\.(?:py|cpp))([^`\n|]*)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_programs_of_the_repository_exist_and_have_the_options(page: Path) -> None:
    for name, words in PROGRAM.findall(page.read_text()):
        if name.startswith("examples/test_"):
            continue  # a folder of tests/
        program = ROOT / name
        assert program.is_file(), name
        beside = [path for path in program.parent.glob("*.py") if f"from {path.stem} import" in program.read_text()]
        code = "".join(path.read_text() for path in [program, *beside])  # it may share its options with them
        for option in re.findall(r"(?<= )--[\w-]+", words):
            assert f'"{option}"' in code, f"{name} has no {option}"


def test_there_are_commands_to_check() -> None:
    assert len([c for c in commands() if c[0] == "README.md"]) >= 8


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_configuration_page_is_current() -> None:
    assert config.key_table() in (ROOT / "docs" / "configuration.md").read_text()


def test_the_readme_opens_with_exactly_two_commands() -> None:
    block = re.search(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block and [line.split("#")[0].strip() for line in block[1].splitlines()] == ["make demo", "make test"]


def test_the_ratios_of_the_readme_are_those_of_the_performance_page() -> None:
    table = re.search(r"## How fast\n(.*?)\n## ", (ROOT / "README.md").read_text(), re.DOTALL)
    measured = (ROOT / "docs" / "performance.md").read_text()
    ratios = re.findall(r"\d\.\d\d\b", table[1]) if table else []
    assert len(ratios) >= 10 and all(re.search(rf"(?<![\d.]){re.escape(ratio)}\b", measured) for ratio in ratios)


def test_the_picture_of_the_page_is_small() -> None:
    assert 10_000 < (ROOT / "docs" / "page.png").stat().st_size < 80_000


def site() -> dict:
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def test_the_navigation_names_every_page_once_and_no_other() -> None:
    pages: list[str] = []
    for entry in site()["nav"]:
        pages += [entry] if isinstance(entry, str) else [page for part in entry.values() for page in part]
    assert sorted(pages) == sorted(path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md"))


def test_the_front_page_leads_to_every_page() -> None:
    text = (ROOT / "docs" / "index.md").read_text()
    assert set(re.findall(r"\]\((\w[\w-]*\.md)\)", text)) == {path.name for path in (ROOT / "docs").glob("*.md")} - {
        "index.md"
    }


def test_the_page_of_python_has_each_public_name_once() -> None:
    named = re.findall(r"^::: smolforge\.(\w+)$", (ROOT / "docs" / "python.md").read_text(), re.MULTILINE)
    assert sorted([*named, "__version__"]) == dir(smolforge)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    mkdocs = shutil.which("mkdocs", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if mkdocs is None:
        pytest.skip("mkdocs is not installed: pip install '.[docs]'")
    done = subprocess.run(
        [mkdocs, "build", "--strict", "--site-dir", str(tmp_path / "site")], cwd=ROOT, capture_output=True, text=True
    )
    assert not done.returncode, done.stderr
    page = (tmp_path / "site" / "python.html").read_text()
    assert "Start a run or continue one" in page and "maximum number of tokens to score" in page
    pages = "".join(path.read_text() for path in (tmp_path / "site").glob("*.html"))
    assert not re.findall(r'(?:src|href)="https?://[^"]*\.(?:css|js|woff2?)[^"]*"', pages), (
        "nothing is loaded from elsewhere"
    )
