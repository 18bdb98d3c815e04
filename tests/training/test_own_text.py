"""Folders of people's own texts: what is told before training, epochs, and that all of them train with no option."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_run, tiny_file, validations_of  # noqa: F401

from smolforge import cli
from smolforge.config import build_config
from smolforge.data import Corpus
from smolforge.distributed import DistributedContext
from smolforge.run import Run
from smolforge.tokenizer import Tokenizer
from smolforge.training import recipe
from smolforge.training.data_size import resolve_epochs
from smolforge.training.recipe import resolve_batch
from smolforge.training.run_data import keep_places

WORDS = Path(__file__).parents[2] / "src" / "smolforge" / "tales"


def sentences(count: int, seed: int = 0) -> str:
    """Sentences of the embedded corpus' own pages."""
    lines = (WORDS / "topics.txt").read_text().split("\n")
    draw = random.Random(seed)
    return "\n".join(draw.choice(lines) for _ in range(count))


def test_the_text_is_counted_in_one_line_and_epochs_become_steps(
    make_run: Callable[..., Run], tmp_path: Path, caplog: pytest.LogCaptureFixture  # noqa: F811
) -> None:  # fmt: skip
    caplog.set_level("INFO", logger="smolforge")
    place = tmp_path / "texts"
    place.mkdir()
    for i in range(20):
        (place / f"{i}.md").write_text(sentences(6, i))
    run = make_run(data={"sources": {str(place): 1.0}}, training={"epochs": 2})
    (line,) = [message for message in caplog.messages if message.startswith("data: ")]
    assert line.startswith("data: 20 files, ") and ", 20 documents, about " in line
    steps = build_config(str(run.config_path)).total_steps
    assert re.search(rf"this run reads (1\.9|2|2\.1) epochs \({steps:,} steps\)", line)
    tokenizer = Tokenizer.from_pretrained(run.checkpoints_path / "last")
    exact = sum(len(tokenizer.encode(path.read_text())) + 1 for path in place.iterdir())
    assert 1.7 < steps * 256 / (exact * 0.95) < 2.3
    assert validations_of(run)


@pytest.mark.parametrize("given", [None, 96])
def test_the_batch_follows_from_a_length_in_epochs_as_from_one_in_tokens(
    make_run: Callable[..., Run], tmp_path: Path, given: int | None  # noqa: F811
) -> None:  # fmt: skip
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": sentences(6, i)}) + "\n" for i in range(60)))
    data = {"sources": {str(tmp_path / "text.jsonl"): 1.0}, "sequence_length": 16, "lanes": 1}
    config = build_config(str(make_run(data=data, training={"epochs": 4, "tokens_per_step": given}).config_path))
    tokens = config.total_steps * config.tokens_per_step
    by_tokens = config.with_keys("training", tokens=tokens, steps=None, epochs=None, tokens_per_step=None)
    expected = given or resolve_batch(by_tokens, torch.device("cpu")).tokens_per_step
    assert config.tokens_per_step == expected < recipe.MOST["cpu"]


class Several(DistributedContext):
    """The main one of several processes, which the others follow."""

    def broadcast(self, value: Any) -> Any:
        return value


def test_each_of_several_processes_has_a_sequence_of_a_short_text() -> None:
    config = build_config("pocket", training={"epochs": 0.001, "steps": None, "tokens_per_step": None})
    tokenizer = Tokenizer.train([sentences(9)], 300)
    batches = []
    with Corpus.open(config.data) as corpus:
        for processes in (1, 64):
            resolved, _ = resolve_epochs(config, corpus, tokenizer, Several(world_size=processes), torch.device("cpu"))
            batches.append(resolved.sequences_per_step)
    assert batches[0] < 64 == batches[1]


def test_an_empty_file_among_those_of_a_shell_pattern_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").write_text("")
    sources = {str(tmp_path / name): 1.0 for name in ("a.txt", "b.txt")}
    kept = keep_places(build_config(None, data={"sources": sources})).data.sources
    assert list(kept) == [str(tmp_path / "a.txt")]
    assert "1 empty file passed over: " in caplog.text
    alone = keep_places(build_config(None, data={"sources": {str(tmp_path / "b.txt"): 1.0}})).data.sources
    assert list(alone) == [str(tmp_path / "b.txt")], "whose error then says that it is empty"


def folders() -> dict[str, Callable[[Path], None]]:
    """Name of a kind of folder: what makes one."""

    def write(folder: Path, files: dict[str, str], **keys: str) -> None:
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, **{"encoding": "utf-8", **keys})

    page = "<html><head><title>Page</title></head><body><p>%s</p></body></html>"
    greek = "Ἐν ἀρχῇ ἦν ὁ λόγος καὶ ὁ λόγος ἦν πρὸς τὸν θεόν.\n"
    code = sorted(WORDS.parent.rglob("*.py"))[:60]
    return {
        "one novel": lambda f: write(f, {"novel.txt": sentences(9000)}),
        "29 books": lambda f: write(f, {f"{i}.txt": sentences(3000, i) for i in range(29)}),
        "20 notes": lambda f: write(f, {f"{i}.md": sentences(5, i) for i in range(20)}),
        "one note": lambda f: write(f, {"note.txt": sentences(3)}),
        "two sentences": lambda f: write(f, {"a.txt": "The fox sat by the river.", "b.txt": "The owl slept all day."}),
        "mixed endings": mixed,
        "UTF-16": lambda f: write(f, {f"{i}.txt": sentences(200, i) for i in range(9)}, encoding="utf-16"),
        "one line of 30 MB": lambda f: write(f, {"line.txt": (sentences(20000).replace("\n", " ") * 40)[: 30 << 20]}),
        "a line of 30 MB in jsonl": lambda f: write(f, {"a.jsonl": json.dumps({"text": (sentences(20000) * 40)[: 30 << 20]})}),
        "one word of 2 MB": lambda f: write(f, {"word.txt": "a1b2c3d4e5" * 200_000}),
        "3,000 tiny files": lambda f: write(f, {f"{i % 50}/{i}.txt": sentences(1, i) for i in range(3000)}),
        "two languages": lambda f: write(f, {"en.txt": sentences(900), "gr.txt": greek * 900}),
        "code": lambda f: write(f, {path.name: path.read_text() for path in code}),
        "pages": lambda f: write(f, {f"{i}.html": page % sentences(50, i) for i in range(30)}),
        "a table": lambda f: write(f, {"a.csv": "id,text\n" + "".join(f'{i},"{sentences(2, i)}"\n' for i in range(400))}),
        "rows": lambda f: write(f, {"a.jsonl": "".join(json.dumps({"text": sentences(9, i)}) + "\n" for i in range(300))}),
        "empty files too": lambda f: write(f, {"a.txt": sentences(400), "b.txt": "", "c.md": ""}),
        "pictures too": lambda f: write(f, {"a.txt": sentences(400), "b.png": "\x89PNG", "c.jpg": "x", "Makefile": "x"}),
        "deep": lambda f: write(f, {"/".join("abcdefghij"[: i + 1]) + f"/{i}.txt": sentences(100, i) for i in range(10)}),
        "windows lines": lambda f: write(f, {f"{i}.txt": sentences(300, i).replace("\n", "\r\n") for i in range(5)}),
        "one file many times": lambda f: write(f, {f"{i}.txt": sentences(80) for i in range(30)}),
    }  # fmt: skip


def mixed(folder: Path) -> None:
    """A file of each ending."""
    from data.documents import PAGE, docx, epub, pdf

    text = sentences(40)
    for name, content in {
        "a.txt": text, "b.md": text, "c.html": PAGE, "d.jsonl": json.dumps({"text": text}), "e.json": json.dumps([{"text": text}]),
        "f.csv": f'text\n"{text}"\n', "g.tsv": "text\nA row of a table.\n",
    }.items():  # fmt: skip
        (folder / name).write_text(content)
    (folder / "h.pdf").write_bytes(pdf(["The fox sat by the river."]))
    (folder / "i.docx").write_bytes(docx([text], [["a", "b"]]))
    (folder / "j.epub").write_bytes(epub({"one": text}, ["one"]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", folders())
def test_a_folder_trains_with_no_option_and_prints_a_held_out_figure(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from smolforge.training import auto

    monkeypatch.setattr(auto, "MINUTES", 0.03)  # of the five that a run takes otherwise
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    folders()[kind](tmp_path / "texts")
    assert cli.run(["train", "--data", "texts"]) == 0
    told = capsys.readouterr().err
    assert "bits per byte" in told and "data: " in told and "length: " in told
    assert validations_of(Run(tmp_path / "runs" / "texts"))[-1][1]["bits_per_byte"] > 0
