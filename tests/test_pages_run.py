"""Every command of README and docs runs, page by page and in order, in a folder that has what the page names as its own.

They are run by the program of an installed wheel, with the extras that the pages name, in an environment of its own. Only
sizes are made small: models of one narrow layer, runs of some steps. A server stands for the Hub, and a tiny tuned
model for SmolLM2-135M-Instruct. docs/performance.md (measurements of minutes) and docs/seed.md (tests/examples) are left
out.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from faults.server import FaultServer
from smolforge.serving.load_test import start_server
from training.test_own_text import sentences

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", *(f"docs/{name}.md" for name in (
    "quickstart", "your-own-text", "data", "configuration", "resume", "chat", "finetuning", "serving"
))]  # fmt: skip
SIZES = {
    "model.hidden_size": 48, "model.intermediate_size": 64, "model.num_hidden_layers": 1, "model.vocab_size": 512,
    "model.num_attention_heads": 3, "model.num_key_value_heads": 3, "model.max_position_embeddings": 512,
    "data.sequence_length": 64, "data.lanes": 2, "training.tokens_per_step": 512, "training.steps": 130,
    "evaluation.tokens": 500, "samples.max_tokens": 4, "checkpoint.every": 65, "evaluation.every": 65, "samples.every": 65,
}  # fmt: skip
OWN_TOKENIZER = {"tokenizer.train.vocab_size": 512, "tokenizer.train.documents": 50}
STAND_IN = "smollm2"  # what a page calls SmolLM2-135M-Instruct
# Commands that this test does not run, and why.
LEFT_OUT = {
    "make test": "it is this test",
    "make demo": "its commands stand for it",
    "pip install": "tests install nothing",
    "hf://bartowski": "a file of the real Hub",
}


def commands(page: str) -> list[str]:
    """The commands of a page's blocks, without their comments; `make demo` as the Makefile has it."""
    found = []
    for block in re.findall(r"```sh\n(.*?)```", (ROOT / page).read_text(), re.DOTALL):
        for line in block.splitlines():
            command = line.split(" # ")[0].strip()
            if command == "make demo":
                demo = re.search(r"^demo:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
                assert demo
                lines = [line.strip() for line in demo[1].splitlines() if "$(BIN)/smolforge" in line]
                names = re.findall(r"^(\w+) := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
                for recipe in (line for line in lines if not line.startswith("@")):
                    for name, value in (*names, *names):
                        recipe = recipe.replace(f"$({name})", value)
                    found.append(recipe.removeprefix(".venv/bin/"))
            elif command and not command.startswith("#"):
                found.append(command)
    return found


def words_of(command: str, place: Path) -> list[str]:
    """The words of a command in `place`; those of `train` with sizes first, so that what it sets itself wins."""
    program, verb, *rest = shlex.split(command)
    found = (sorted(place.glob(word)) if "*" in word else [word] for word in rest)
    rest = [str(name) for names in found for name in names]
    new = verb == "train" and rest[0] != "--out" and not any(word.endswith("config.yaml") for word in rest)
    if new and rest[0] == "--data" and "--minutes" not in rest:  # whose size follows from its text and the time
        return [program, verb, *rest, "--minutes", "0.02"]
    if not new or rest[0] == "--data":
        return [program, verb, *rest]
    if "--tokens" in rest:  # of a run that takes days
        rest[rest.index("--tokens") + 1] = "16k"
    sizes = dict(SIZES)
    if "--init" in rest:
        sizes = {key: value for key, value in sizes.items() if not key.startswith("model.")}
    elif rest[0] == "pocket" or rest[0].endswith(".yaml"):
        sizes |= OWN_TOKENIZER
    return [program, verb, *(word for key, value in sizes.items() for word in ("--set", f"{key}={value}")), *rest]


@dataclasses.dataclass
class Home:
    """A folder with the texts and files that pages name as the reader's own, and programs of an installed wheel."""

    programs: Path
    folder: Path
    hub: FaultServer

    @property
    def environment(self) -> dict[str, str]:
        """Nothing of this checkout, and the Hub's stand-in."""
        kept = {name: os.environ[name] for name in ("LANG", "HOME", "OMP_NUM_THREADS") if name in os.environ}
        hub = {"HF_ENDPOINT": self.hub.root, "HF_HOME": str(self.folder / ".hub"), "HF_HUB_DISABLE_XET": "1"}
        return {**kept, **hub, "PATH": f"{self.programs}{os.pathsep}{os.defpath}"}

    def run(self, *words: str, place: Path | None = None) -> str:
        """Run a program of the wheel; what it printed. Its input is one question."""
        done = subprocess.run(
            [self.programs / words[0], *words[1:]], cwd=place or self.folder, env=self.environment, timeout=900,
            capture_output=True, text=True, input="Hello?\n",
        )  # fmt: skip
        assert not done.returncode, (words, done.stdout, done.stderr)
        return done.stdout


def named_extras() -> list[str]:
    """The extras that README and docs tell the reader to install."""
    text = "".join((ROOT / page).read_text() for page in PAGES)
    return sorted({name for names in re.findall(r"'(?:smolforge|\.)\[([\w,]+)\]'", text) for name in names.split(",")})


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment in which only the wheel is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(pip, check=True, timeout=900)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "venv", with_pip=True)
    found = folder / "venv" / "bin"
    wanted = f"{wheel}[{','.join(named_extras())}]"
    words = ["-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt"), wanted]
    if subprocess.run([found / "python", *words], timeout=1800).returncode:
        pytest.skip("the package index does not answer")
    return found


@pytest.fixture(scope="module")
def home(programs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """The texts, a stand-in for SmolLM2-135M-Instruct, and a Hub."""
    folder = tmp_path_factory.mktemp("pages")
    with FaultServer() as hub:
        home = Home(programs, folder, hub)
        write_files(folder)
        home.run(*words_of("smolforge train pocket --out base", folder))
        tune = "finetune base --data faq.csv --out talker --epochs 1 --set data.sequence_length=128"
        home.run("smolforge", *tune.split())
        home.run("smolforge", *f"export talker --to checkpoint --out {STAND_IN}".split())
        for name in ("model.gguf", "SmolLM2-135M-Instruct-Q4_K_M.gguf"):
            home.run("smolforge", *f"export {STAND_IN} --to gguf --out {name}".split())
        tokenizer = {path.name: path.read_bytes() for path in (folder / "base" / "tokenizer").iterdir()}
        hub.push("HuggingFaceTB/cosmo2-tokenizer", tokenizer)
        shutil.copytree(folder / "base" / "tokenizer", folder / "path" / "to" / "tokenizer")
        card = "---\nconfigs:\n- config_name: cosmopedia-v2\n  data_files: cosmopedia-v2/*\n---\n"
        shard = (folder / "stories.parquet").read_bytes()
        hub.push("HuggingFaceTB/smollm-corpus", {"README.md": card.encode(), "cosmopedia-v2/a.parquet": shard})
        shutil.rmtree(folder / "base")
        shutil.rmtree(folder / "talker")
        yield home


def write_files(folder: Path) -> None:
    """What the pages name as the reader's own: folders of texts, tables, a configuration."""
    for name in ("texts", "my_texts", "letters", "novels", "notes"):
        (folder / name).mkdir()
        for i in range(8):
            (folder / name / f"{i}.txt").write_text(sentences(60, i))
    rows = [f"Text {i} of a corpus that a machine wrote, for machines to learn from." for i in range(400)]
    for name in ("stories.parquet", "web.parquet"):
        pq.write_table(pa.table({"text": rows}), folder / name, row_group_size=50)
    lines = "".join(f'{{"text": "{row}"}}\n' for row in rows)
    (folder / "books.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    (folder / "faq.csv").write_text("question,answer\n" + "".join(f"What is {i}?,A number.\n" for i in range(40)))
    pair = {"prompt": "What is it?", "chosen": "A number.", "rejected": "A word."}
    (folder / "pairs.jsonl").write_text(
        "".join(json.dumps(pair | {"prompt": f"What is {i}?"}) + "\n" for i in range(40))
    )
    (folder / "my_run.yaml").write_text("preset: pocket\noptimizer: {lr: 0.002}\n")


def begin(page: str) -> list[str]:
    """What a page takes as given: the run of README's demo, or a run of the reader's own."""
    if page in ("docs/resume.md", "docs/serving.md", "docs/data.md"):
        return ["smolforge train pocket --out runs/pocket"]
    return [f"smolforge export {STAND_IN} --to checkpoint --out runs/mine"] if page == "docs/chat.md" else []


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run_in_order(page: str, home: Home, tmp_path: Path) -> None:
    place = tmp_path / "place"
    shutil.copytree(home.folder, place)
    ran = 0
    for command in [*begin(page), *commands(page)]:
        if any(command.startswith(part) or part in command for part in LEFT_OUT):
            continue
        assert command.startswith("smolforge "), command
        if command.startswith("smolforge serve "):
            serve([str(home.programs / "smolforge"), *shlex.split(command)[1:]], home, place)
        else:
            home.run(*words_of(command, place), place=place)
        ran += 1
    assert ran
    for block in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL):
        if "import smolforge" in block:
            home.run("python", "-c", block, place=place)


def serve(command: list[str], home: Home, place: Path) -> None:
    """Serve on a free port, ask for the page, and stop."""
    words = ["env", "-i", "-C", str(place), *(f"{name}={value}" for name, value in home.environment.items()), *command]
    with start_server([*words, "--port", "0"]) as server:
        assert "page/static/main.js" in httpx.get(server.url).text
        assert server.stop() == 0


def test_each_page_has_commands() -> None:
    assert all(commands(page) for page in PAGES)
    assert "smolforge train pocket --out runs/pocket" in commands("README.md"), (
        "the demo writes what the next ones read"
    )


def test_the_extras_that_the_pages_name_exist() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert "web" in named_extras() and all(
        re.search(rf"^{name} = \[", project, re.MULTILINE) for name in named_extras()
    )
