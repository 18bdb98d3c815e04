"""What the pages say can be typed, and what they link to exists."""

import re
import shlex
from pathlib import Path

import pytest

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
        assert (ROOT / name).is_file(), name
        for option in re.findall(r"(?<= )--[\w-]+", words):
            assert f'"{option}"' in (ROOT / name).read_text(), f"{name} has no {option}"


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
