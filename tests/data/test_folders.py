"""A folder of anything: what is read, what is left out and told, and one error for all that is bad."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from data.conftest import Logged, jsonl, parquet
from data.documents import PAGE, PAGE_TEXT, docx, epub, pdf
from smolforge.errors import DataError


def texts(corpus: Any) -> dict[str, str]:
    """File: its text."""
    found: dict[str, str] = {}
    for document in corpus.documents():
        found[document.address.file] = found.get(document.address.file, "") + document.text
    return found


def test_every_ending_is_read(opened: Any, tmp_path: Path) -> None:
    pytest.importorskip("pypdf")
    pytest.importorskip("docx")
    (tmp_path / "a.txt").write_text("plain")
    (tmp_path / "b.md").write_text("# marked")
    jsonl(tmp_path / "c.jsonl", ["lines"])
    (tmp_path / "d.json").write_text(json.dumps([{"text": "array"}]))
    (tmp_path / "e.csv").write_text('id,text\n1,"comma, separated"\n')
    (tmp_path / "f.tsv").write_text("id\ttext\n1\ttab, separated\n")
    parquet(tmp_path / "g.parquet", ["columns"])
    (tmp_path / "h.html").write_text(PAGE)
    (tmp_path / "i.html.gz").write_bytes(gzip.compress(PAGE.encode("utf-16")))
    (tmp_path / "j.pdf").write_bytes(pdf(["first line", "second line"]))
    (tmp_path / "k.docx").write_bytes(docx(["one", "two"], [["a", "b"], ["c", "d"]]))
    (tmp_path / "l.epub").write_bytes(epub({"one": "first", "two": "second"}, ["two", "one"]))
    assert texts(opened(tmp_path)) == {
        "a.txt": "plain", "b.md": "# marked", "c.jsonl": "lines", "d.json": "array", "e.csv": "comma, separated",
        "f.tsv": "tab, separated", "g.parquet": "columns", "h.html": PAGE_TEXT, "i.html.gz": PAGE_TEXT,
        "j.pdf": "first line\nsecond line\n", "k.docx": "one\n\ntwo\n\na\tb\nc\td\n", "l.epub": "second\n\nfirst\n",
    }  # fmt: skip


def test_what_is_left_out_is_told_by_ending(opened: Any, tmp_path: Path, logged: Logged) -> None:
    for name in ("a.png", "b.png", "Makefile"):
        (tmp_path / name).write_bytes(b"\x89PNG")
    (tmp_path / "labels.csv").write_text("id,label\n1,2\n")
    (tmp_path / "info.json").write_text('{"license": "mit"}')
    (tmp_path / "a.md").write_text("text")
    assert list(texts(opened(tmp_path))) == ["a.md"]
    told = "\n".join(logged())
    assert "2 .png" in told and "1 without an ending" in told
    assert "1 .csv (no column 'text')" in told and "1 .json (no column 'text')" in told


def test_a_readme_and_scripts_beside_data_describe_it(opened: Any, tmp_path: Path, logged: Logged) -> None:
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "make.py").write_text("print()")
    (tmp_path / "notes.md").write_text("a note")
    assert list(texts(opened(tmp_path))) == ["README.md", "make.py", "notes.md"]
    jsonl(tmp_path / "a.jsonl", ["data"])
    assert texts(opened(tmp_path)) == {"a.jsonl": "data", "notes.md": "a note"}
    assert "1 .md (describes the data), 1 .py (code beside data)" in "\n".join(logged())


def test_a_resumed_run_keeps_the_files_it_began_with(opened: Any, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "a.txt").write_text("plain")
    (tmp_path / "b.csv").write_text("text\nrow\n")
    index = opened(tmp_path).index
    (tmp_path / "c.md").write_text("written later, or of an ending that an older version did not read")
    assert list(texts(opened(tmp_path, index=index))) == ["a.txt", "b.csv"]


def test_a_resumed_run_leaves_out_what_describes_its_data(opened: Any, tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", ["data"])
    (tmp_path / "LICENSE.txt").write_text("MIT")
    index = opened(tmp_path).index
    (tmp_path / "README.txt").write_text("written later")
    assert texts(opened(tmp_path, index=index)) == {"a.jsonl": "data"}
    (tmp_path / "more.txt").write_text("more data")
    with pytest.raises(DataError, match=r"more\.txt is not in the index"):
        opened(tmp_path, index=index)


def test_a_broken_link_is_passed_over(opened: Any, tmp_path: Path, logged: Logged) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone.txt")
    assert texts(opened(tmp_path)) == {"a.txt": "text"}
    assert "1 broken link passed over" in "\n".join(logged())


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_utf_16_is_read_by_its_mark(opened: Any, tmp_path: Path, encoding: str) -> None:
    words = "Ünïcödé 🙂 text\n" * 90_000  # over a block, so that a character lies on its border
    mark = "\ufeff" if encoding.endswith("be") else ""
    (tmp_path / "a.txt").write_bytes((mark + words).encode(encoding))
    (tmp_path / "b.csv").write_bytes((mark + "text\nvalue\n").encode(encoding))
    (tmp_path / "c.jsonl").write_bytes((mark + '{"text": "line"}\n').encode(encoding))
    assert texts(opened(tmp_path)) == {"a.txt": words, "b.csv": "value", "c.jsonl": "line"}
    (tmp_path / "a.txt").write_bytes((mark + words).encode(encoding)[:-1])
    with pytest.raises(DataError, match=r"a\.txt begins as UTF-(16|32) and is not"):
        opened(tmp_path)


def test_one_error_names_all_bad_files(opened: Any, tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("fine")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.jsonl").write_text("no json\n")
    (tmp_path / "c.html").write_bytes(b"<p>caf\xe9</p>")
    (tmp_path / "d.epub").write_bytes(b"no zip")
    with pytest.raises(DataError) as caught:
        opened(tmp_path)
    message = str(caught.value)
    assert "4 of 5 files cannot be used" in message
    for said in ("a.txt is not UTF-8", "b.jsonl, first line", "c.html is not UTF-8", "d.epub cannot be read as epub"):
        assert said in message
    for i in range(60):
        (tmp_path / f"{i:02}.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="at least 20 of 65 files cannot be used"):
        opened(tmp_path)


def test_a_document_without_text_is_told_and_not_fatal(opened: Any, tmp_path: Path, logged: Logged) -> None:
    (tmp_path / "a.html").write_text("<img src=x>")
    (tmp_path / "b.txt").write_text("text")
    assert texts(opened(tmp_path)) == {"b.txt": "text"}
    assert "a.html holds no text, only pictures perhaps" in logged()


def test_a_missing_package_is_named(opened: Any, tmp_path: Path, monkeypatch: Any, logged: Logged) -> None:
    import importlib.util
    import sys

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pypdf" else find(name))
    monkeypatch.setitem(sys.modules, "pypdf", None)
    (tmp_path / "a.pdf").write_bytes(pdf(["text"]))
    (tmp_path / "b.txt").write_text("text")
    assert texts(opened(tmp_path)) == {"b.txt": "text"}
    assert "1 .pdf (needs pip install 'smolforge[documents]')" in "\n".join(logged())
    with pytest.raises(DataError, match=r"needs the package pypdf(.|\n)*smolforge\[documents\]"):
        opened(tmp_path / "a.pdf")


def test_the_index_counts_documents_and_the_bytes_of_their_text(opened: Any, tmp_path: Path) -> None:
    book = "a line of a book\n" * 20_000 + "the end"
    (tmp_path / "a.txt").write_text(book + "<|endoftext|>\nnext" + "<|endoftext|>")
    jsonl(tmp_path / "b.jsonl", ["one", "two\n"])
    shards = opened(tmp_path).index["sources"][0]["shards"]
    assert [(shard["documents"], shard["text_bytes"]) for shard in shards] == [(2, len(book) + 4), (2, 7)]
    assert sum(rows for rows, _ in shards[0]["groups"]) > 2, "a book is several rows"
