"""Every command of README and docs runs, page by page and in order, in a folder that has what the page names as its own.

Only sizes are made small: models of one narrow layer, runs of some steps. A server stands for the Hub, and a tiny tuned
model for SmolLM2-135M-Instruct. docs/performance.md (measurements of minutes) and docs/seed.md (tests/examples) are left
out.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from faults.server import FaultServer, as_hub
from serving_fixtures import serving
from smolforge import cli
from smolforge.training import auto
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


def words_of(command: str) -> list[str]:
    """The words of a command; those of `train` with sizes before them, so that what it sets itself wins."""
    verb, *rest = shlex.split(command)[1:]
    rest = [name for word in rest for name in (sorted(map(str, Path().glob(word))) if "*" in word else [word])]
    new = verb == "train" and rest[0] != "--out" and not any(word.endswith("config.yaml") for word in rest)
    if not new or rest[0] == "--data":  # whose size follows from its text
        return [verb, *rest]
    if "--tokens" in rest:  # of a run that takes days
        rest[rest.index("--tokens") + 1] = "16k"
    sizes = dict(SIZES)
    if "--init" in rest:
        sizes = {key: value for key, value in sizes.items() if not key.startswith("model.")}
    elif rest[0] == "pocket" or rest[0].endswith(".yaml"):
        sizes |= OWN_TOKENIZER
    return [verb, *(word for key, value in sizes.items() for word in ("--set", f"{key}={value}")), *rest]


def run(*words: str) -> str:
    """Run a command; what it printed. Its input is one question."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", io.StringIO("Hello?\n"))
        code = cli.run(words)
    assert code == 0, (words, code)
    return said.getvalue()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, FaultServer]]:
    """A folder with the texts and files that pages name as the reader's own, a stand-in, and a Hub."""
    folder = tmp_path_factory.mktemp("pages")
    with pytest.MonkeyPatch.context() as here, FaultServer() as hub:
        here.chdir(folder)
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
        run(*words_of("smolforge train pocket --out base"))
        run(
            "finetune",
            "base",
            "--data",
            "faq.csv",
            "--out",
            "talker",
            "--epochs",
            "1",
            "--set",
            "data.sequence_length=128",
        )
        run("export", "talker", "--to", "checkpoint", "--out", STAND_IN)
        for name in ("model.gguf", "SmolLM2-135M-Instruct-Q4_K_M.gguf"):
            run("export", STAND_IN, "--to", "gguf", "--out", name)
        tokenizer = {path.name: path.read_bytes() for path in (folder / "base" / "tokenizer").iterdir()}
        hub.push("HuggingFaceTB/cosmo2-tokenizer", tokenizer)
        shutil.copytree(folder / "base" / "tokenizer", folder / "path" / "to" / "tokenizer")
        card = "---\nconfigs:\n- config_name: cosmopedia-v2\n  data_files: cosmopedia-v2/*\n---\n"
        shard = (folder / "stories.parquet").read_bytes()
        hub.push("HuggingFaceTB/smollm-corpus", {"README.md": card.encode(), "cosmopedia-v2/a.parquet": shard})
        shutil.rmtree(folder / "base")
        shutil.rmtree(folder / "talker")
        yield folder, hub


def begin(page: str) -> list[str]:
    """What a page takes as given: the run of README's demo, or a run of the reader's own."""
    if page in ("docs/resume.md", "docs/serving.md", "docs/data.md"):
        return ["smolforge train pocket --out runs/pocket"]
    return [f"smolforge export {STAND_IN} --to checkpoint --out runs/mine"] if page == "docs/chat.md" else []


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run_in_order(
    page: str, home: tuple[Path, FaultServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(home[0], tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    monkeypatch.setattr(auto, "MINUTES", 0.02)
    as_hub(home[1], monkeypatch, tmp_path / "hf")
    ran = 0
    for command in [*begin(page), *commands(page)]:
        if any(command.startswith(part) or part in command for part in LEFT_OUT):
            continue
        assert command.startswith("smolforge "), command
        if command.startswith("smolforge serve "):
            with serving(Path(shlex.split(command)[2])) as server:  # on a free port
                assert "page/static/main.js" in server.get("/").text
                assert server.stop(signal.SIGTERM) == 0
        else:
            run(*words_of(command))
        ran += 1
    assert ran
    for block in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL):
        if "import smolforge" in block:
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(block, page, "exec"), {})


def test_each_page_has_commands() -> None:
    assert all(commands(page) for page in PAGES)
    assert "smolforge train pocket --out runs/pocket" in commands("README.md"), (
        "the demo writes what the next ones read"
    )
