"""What a user may name as SRC on this machine, what is in it, and the one clear error for what is wrong with it."""

from __future__ import annotations

import gzip
import json
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data.conftest import Bytes, batches, digests, jsonl, named, parquet
from smolforge.data import Loader
from smolforge.data.cache import Cache
from smolforge.data.readers.text import PIECE, first_piece, pieces, pieces_of_file
from smolforge.errors import DataError, SmolforgeError, SourceChanged

TEXTS = named(30)


def texts(corpus: Any) -> list[str]:
    """In canonical order."""
    return [d.text for d in corpus.documents()]


def test_every_local_format_gives_the_same_documents(opened: Any, tmp_path: Path) -> None:
    plain = jsonl(tmp_path / "a.jsonl", TEXTS).read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(plain[:500]) + gzip.compress(plain[500:]))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(plain[:500]) + zstandard.compress(plain[500:]))
    (tmp_path / "d.txt").write_text("\n<|endoftext|>\n\n".join(TEXTS), encoding="utf-8")
    (tmp_path / "e.txt.gz").write_bytes(gzip.compress((tmp_path / "d.txt").read_bytes()))
    parquet(tmp_path / "f.parquet", TEXTS, 7)
    for path in sorted(tmp_path.glob("*.*")):
        assert texts(opened(path)) == TEXTS, path
        assert texts(opened(path, cache=0)) == TEXTS, path


def test_string_types_of_parquet(opened: Any, tmp_path: Path) -> None:
    for i, kind in enumerate((pa.large_string(), pa.dictionary(pa.int32(), pa.string()))):
        path = tmp_path / f"{i}.parquet"
        pq.write_table(pa.table({"text": pa.array(TEXTS).cast(kind), "n": list(range(30))}), path, row_group_size=4)
        assert texts(opened(path)) == TEXTS


def test_folders_and_globs_are_read_in_the_order_of_names(opened: Any, tmp_path: Path) -> None:
    (tmp_path / "deep" / ".hidden").mkdir(parents=True)
    jsonl(tmp_path / "b.jsonl", ["b"])
    jsonl(tmp_path / "deep" / "a.jsonl", ["deep"])
    jsonl(tmp_path / "deep" / ".hidden" / "x.jsonl", ["never"])
    jsonl(tmp_path / ".x.jsonl", ["never"])
    (tmp_path / "README.md").write_text("never")
    corpus = opened(tmp_path)
    assert [(d.address.file, d.text) for d in corpus.documents()] == [("b.jsonl", "b"), ("deep/a.jsonl", "deep")]
    assert texts(opened(f"{tmp_path}/*.jsonl")) == ["b"]
    assert texts(opened(f"{tmp_path}/**/*.jsonl")) == ["b", "deep"]


def test_blank_documents_and_lines_are_passed_over(opened: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"text": "one"}\n\n  \n{"text": ""}\n{"text": " \\n"}\n{"text": null}\n{"text": "two"}')
    assert texts(opened(path)) == ["one", "two"]
    pq.write_table(pa.table({"text": ["one", None, "", "two"]}), tmp_path / "a.parquet")
    assert texts(opened(tmp_path / "a.parquet")) == ["one", "two"]


def test_half_a_surrogate_pair_becomes_a_replacement(opened: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud83dz \\ud83d\\ude00"}\n')
    assert texts(opened(path)) == ["a\ufffdz \U0001f600"]


def test_a_long_text_is_dealt_in_pieces_and_ends_once(opened: Any, tmp_path: Path) -> None:
    lines = "".join(f"line {i} of a long book\n" for i in range(60_000))
    (tmp_path / "book.txt").write_text(lines)
    corpus = opened(tmp_path / "book.txt", holdout=0.1)
    found = list(corpus.documents())
    assert "".join(d.text for d in found) == lines
    assert all(len(d.text.encode()) <= PIECE and d.text.endswith("\n") for d in found)
    assert any(True for _ in corpus.documents(held_out=True))
    whole = opened(tmp_path / "book.txt", holdout=0, lanes=1, sequence_length=999)
    total = len(lines.encode()) + 1
    ends = sum((batch.tokens == 0).sum() for batch in batches(whole, total // 1000 - 1, sequences_per_step=1))
    assert ends <= 1  # of the one document, wherever its last piece fell in the order


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([b"a", b"\xc3\xa9", b"a b ", b"line\n", b"<S>", b"<S>\r\n\n", b"\n", b"<"]),
                       st.integers(1, 40_000)), max_size=8),
    st.sampled_from([b"<S>", b""]),
    st.data(),
)  # fmt: skip
def test_pieces_join_to_the_file_and_any_run_of_them_cuts_the_same(
    tmp_path_factory: Any, runs: list[tuple[bytes, int]], separator: bytes, data: st.DataObject
) -> None:
    content = b"".join(word * min(count, 120_000 // len(word)) for word, count in runs)
    path = tmp_path_factory.getbasetemp() / "pieces.txt"
    path.write_bytes(content)
    found = list(pieces_of_file(path, separator))
    assert b"".join(found) == content
    assert found == list(pieces(content, separator))
    for piece in found:
        piece.decode()
        assert len(piece) <= PIECE + len(separator) + 64
        assert not separator or piece.count(separator) <= 1
    if found:
        a = data.draw(st.integers(0, len(found) - 1))
        b = data.draw(st.integers(a + 1, len(found)))
        assert list(pieces(b"".join(found[a:b]), separator)) == found[a:b]
        assert first_piece(content, 0, separator) == len(found[0])


def bad_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Name: (file, what its error must say)."""
    good = parquet(folder / "good.parquet", TEXTS).read_bytes()

    def write(name: str, content: bytes) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    line = b'{"text": "fine"}\n'
    return {
        "missing": (folder / "nothing.jsonl", "no such file"),
        "empty file": (write("empty.txt", b""), "is empty"),
        "unknown ending": (write("a.xyz", b"text\nhello"), "unknown ending"),
        "cut parquet": (write("cut.parquet", good[:-100]), "PAR1"),
        "tiny parquet": (write("tiny.parquet", b"PAR1"), "too short"),
        "footer too long": (write("long.parquet", good[:-8] + b"\xff\xff\xff\x7fPAR1"), "footer claims"),
        "footer of noise": (write("noise.parquet", good[:-400] + b"\0" * 392 + good[-8:]), "damaged"),
        "latin-1 txt": (write("latin.txt", b"caf\xe9 is not utf-8"), "0xe9 at offset 3"),
        "latin-1 jsonl": (write("latin.jsonl", line + b'{"text": "caf\xe9"}\n'), f"offset {len(line) + 13}"),
        "no JSON": (write("no.jsonl", b"hello\n"), "no.jsonl, first line is not valid JSON"),
        "a list": (write("list.jsonl", b"[1]\n"), "not a JSON object but list"),
        "no column": (write("other.jsonl", b'{"content": "x", "id": 1}\n'), "It has: 'content', 'id'"),
        "no text": (write("number.jsonl", b'{"text": 3}\n'), "not text but int"),
        "blank lines": (write("blank.jsonl", b"\n\n"), "no documents"),
        "cut gz": (write("cut.jsonl.gz", gzip.compress(line * 99)[:-12]), "damaged"),
        "no gz": (write("no.jsonl.gz", b"hello there"), "damaged"),
        "cut zst": (write("cut.jsonl.zst", zstandard.compress(os.urandom(4000).hex().encode())[:-12]), "inside a zstd"),
        "no zst": (write("no.jsonl.zst", b"hello there"), "damaged"),
    }


def test_each_bad_file_has_one_clear_error(opened: Any, tmp_path: Path) -> None:
    for name, (path, said) in bad_files(tmp_path).items():
        with pytest.raises(DataError) as caught:
            pytest.fail(f"{name} was taken: {texts(opened(path))[:3]}")
        assert said in str(caught.value), name
        assert path.name in str(caught.value) or "documents" in said, name


def test_parquet_without_the_text_column_names_those_it_has(opened: Any, tmp_path: Path) -> None:
    pq.write_table(pa.table({"content": ["a"], "score": [1.0]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"no column 'text'(.|\n)*'content', 'score'"):
        opened(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="is not text but double"):
        opened(tmp_path / "a.parquet", text_column="score")
    assert texts(opened(tmp_path / "a.parquet", text_column="content")) == ["a"]


def test_a_bad_line_deep_in_a_file_is_named_when_it_is_read(opened: Any, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", TEXTS)
    path.write_text(path.read_text() + '{"txet": "x"}\n')
    for workers in (0, 2):
        with pytest.raises(DataError, match=r"a.jsonl, line 31 has no column 'text'"):
            batches(opened(path, workers=workers), 999)


def test_nothing_named(opened: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file matches"):
        opened(tmp_path / "*.parquet")
    with pytest.raises(DataError, match="holds no text"):
        opened(tmp_path)
    with pytest.raises(DataError, match="owner/data:CONFIG"):
        opened("owner/data")


def test_all_documents_blank(opened: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="all are blank"):
        batches(opened(jsonl(tmp_path / "b.jsonl", [" "])), 1)


def test_a_bomb_stops_at_the_bound_of_the_cache(opened: Any, tmp_path: Path) -> None:
    zeros = b'{"text": "' + b"a" * 2_000_000 + b'"}\n'
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(zeros * 5))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(zeros * 5))
    for name in ("a.jsonl.gz", "a.jsonl.zst"):
        with pytest.raises(DataError, match="larger than the cache may be"):
            opened(tmp_path / name, cache=3_000_000)
    left = [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    assert not left


def test_the_index_is_equal_for_equal_content_wherever_it_lies(opened: Any, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    parquet(tmp_path / "one" / "a.parquet", TEXTS)
    jsonl(tmp_path / "one" / "b.jsonl", TEXTS)
    first = opened(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    second = opened(tmp_path / "two", workers=2)
    assert first.index_hash == second.index_hash
    assert digests(batches(first, 5)) == digests(batches(second, 5))
    kept = json.loads(json.dumps(first.index))
    assert opened(tmp_path / "two", index=kept).index_hash == first.index_hash
    rows = [(s["file"], [g[0] for g in s["groups"]]) for s in first.index["sources"][0]["shards"]]
    assert rows == [("a.parquet", [10, 10, 10]), ("b.jsonl", [30])]


def test_a_changed_source_is_named_with_what_changed(opened: Any, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    parquet(folder / "a.parquet", TEXTS)
    path = jsonl(folder / "b.jsonl", TEXTS)
    index = opened(folder).index

    def refused(pattern: str) -> None:
        with pytest.raises(SourceChanged, match=pattern):
            opened(folder, index=index)

    content = path.read_bytes()
    path.write_bytes(content + b'{"text": "more"}\n')
    refused(r"b.jsonl changed: its size was")
    path.write_bytes(content.replace(b"doc 1 ", b"dog 1 "))
    refused(r"b.jsonl changed: its hash was")
    path.write_bytes(content)  # the same bytes again, another time of change
    assert opened(folder, index=index).index == index
    jsonl(folder / "c.jsonl", ["new"])
    refused("c.jsonl is not in the index that the run started with")
    (folder / "c.jsonl").unlink()
    (folder / "a.parquet").unlink()
    refused("a.parquet is no longer there")


def test_settings_that_change_the_text_are_a_changed_source(opened: Any, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", TEXTS)
    index = opened(path).index
    for keys in ({"text_column": "other"}, {"separator": "---"}):
        with pytest.raises(SourceChanged):
            opened(path, index=index, **keys)
    with pytest.raises(SourceChanged, match="1 sources"):
        opened(path, (tmp_path / "b.jsonl", 1.0), index=index)


def test_a_file_cut_while_the_run_reads_it_is_an_error(opened: Any, tmp_path: Path) -> None:
    for path in (parquet(tmp_path / "a.parquet", named(3000), 100), jsonl(tmp_path / "b.jsonl", named(3000))):
        corpus = opened(path)
        os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(SmolforgeError):
            list(corpus.documents())


def test_a_damaged_index_is_refused(opened: Any, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", TEXTS)
    index = opened(path).index
    for damage in (
        {},
        {**index, "version": 99},
        {**index, "hash": "0" * 64},
        {**index, "sources": None},
        json.loads(json.dumps(index).replace("[30,", "[31,")),
    ):
        with pytest.raises(DataError, match="index"):
            opened(path, index=damage)


def test_the_texts_of_a_mixture_keep_to_its_weights(opened: Any, tmp_path: Path) -> None:
    a = jsonl(tmp_path / "a.jsonl", ["a" * 100] * 50)
    b = jsonl(tmp_path / "b.jsonl", ["b" * 300] * 50)
    corpus = opened((a, 0.75), (b, 0.25), holdout=0)
    first = [text[0] for text, _ in zip(corpus.texts(held_out=False), range(40), strict=False)]
    assert 34 <= first.count("a") <= 38
    assert len(list(corpus.texts())) == 100


@pytest.mark.parametrize("separator", ["\n", "\n\n", "\n---\n"])
def test_a_separator_may_end_in_a_newline(opened: Any, tmp_path: Path, separator: str) -> None:
    (tmp_path / "a.txt").write_text(separator.join(TEXTS))
    corpus = opened(tmp_path / "a.txt", separator=separator, lanes=1, holdout=0)
    assert texts(corpus) == TEXTS
    made = batches(corpus, 20, sequences_per_step=2)
    epoch = sum(len(text.encode()) + 1 for text in TEXTS)
    tokens = sum(batch.tokens.size for batch in made)
    assert sum((batch.tokens == 0).sum() for batch in made) >= len(TEXTS) * (tokens // epoch)


def test_more_files_than_a_process_may_open(opened: Any, tmp_path: Path) -> None:
    (tmp_path / "many").mkdir()
    for i in range(150):
        (tmp_path / "many" / f"{i:03}.txt").write_text(f"text {i} " * 30)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(used + 60, hard), hard))
    try:
        corpus = opened(tmp_path / "many", workers=2)
        assert len(batches(corpus, 200)) == 200
        assert len(texts(corpus)) == 150
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_byte_order_mark_is_not_text(opened: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone<|endoftext|>two")
    assert texts(opened(tmp_path / "a.txt")) == ["one", "two"]
    (tmp_path / "b.txt").write_bytes("hello there".encode("utf-16"))
    assert texts(opened(tmp_path / "b.txt")) == ["hello there"]


def test_an_empty_file_in_a_folder_is_passed_over(opened: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text("text")
    assert texts(opened(tmp_path)) == ["text"]
    with pytest.raises(DataError, match="is empty"):
        opened(tmp_path / "a.txt")


def test_linked_files_are_read_once(opened: Any, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    root = tmp_path / "data"
    root.mkdir()
    for folder, name in ((root, "b.txt"), (tmp_path / "elsewhere", "c.txt")):
        (folder / name).write_text(name)
    (root / "a.txt").symlink_to("b.txt")
    (root / "f.raw").write_text("f.txt")
    (root / "f.txt").symlink_to("f.raw")  # whose own name has no known ending
    for name in ("d.txt", "e.txt"):
        (root / name).symlink_to(tmp_path / "elsewhere" / "c.txt")
    assert sorted((d.address.file, d.text) for d in opened(root).documents()) == [
        ("b.txt", "b.txt"),
        ("d.txt", "c.txt"),
        ("f.txt", "f.txt"),
    ]


def test_linked_folders_are_followed_once_and_names_need_not_be_utf_8(opened: Any, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (tmp_path / "elsewhere").mkdir()
    root.mkdir()
    (tmp_path / "elsewhere" / "a.txt").write_text("linked")
    Path(os.fsdecode(os.fsencode(root) + b"/caf\xe9.txt")).write_text("named")
    (root / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(root)
    corpus = opened(root)
    assert [(d.address.file, d.text) for d in corpus.documents()] == [
        ("caf\\xe9.txt", "named"),
        ("link/a.txt", "linked"),
    ]
    json.dumps(corpus.index).encode()


def test_a_dotted_column_next_to_a_struct(opened: Any, tmp_path: Path) -> None:
    struct = pa.array([{"b": "inner"}] * 3)
    pq.write_table(pa.table({"a": struct, "a.b": ["one", "two", "three"]}), tmp_path / "a.parquet")
    assert texts(opened(tmp_path / "a.parquet", text_column="a.b")) == ["one", "two", "three"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664)])
def test_other_users_can_read_the_cache(tmp_path: Path, monkeypatch, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        cache = Cache(tmp_path, 1 << 20)
        cache.keep_range("a", b"range")
        path = cache.file("b", [b"file"], what="b")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in path.parent.iterdir()} == {mode}

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "utime", refuse)  # as for the files of another user
    assert cache.range("a") == b"range" and cache.file("b", iter(()), what="b").read_bytes() == b"file"


def test_a_huge_document_is_tokenized_in_parts(opened: Any, tmp_path: Path) -> None:
    longest = 0

    class Measured(Bytes):
        def encode_batch(self, texts: list[str]) -> list[list[int]]:
            nonlocal longest
            longest = max(longest, sum(map(len, texts)))
            return super().encode_batch(texts)

    text = "a line of a huge record\n" * 100_000
    corpus = opened(jsonl(tmp_path / "a.jsonl", [text]), lanes=1, holdout=0, sequence_length=9999)
    with Loader(corpus, Measured(), sequences_per_step=1) as loader:
        made = b"".join(bytes((next(loader).tokens[0] - 1).clip(0).astype("u1")) for _ in range(240))
    assert made == text.encode()[: len(made)]
    assert longest <= 1 << 18
