""".json: one array of objects, or lines; read item by item, with a place for each error."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.conftest import batches, digests, jsonl, named
from smolforge.data.readers.as_lines import split_array
from smolforge.errors import DataError

TEXTS = [*named(40), 'quotes " \\ [ ] { } , and\nline ends', "Ünïcödé 🙂"]
ROWS = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]


def texts(corpus: Any) -> list[str]:
    """In canonical order."""
    return [d.text for d in corpus.documents()]


def test_an_array_and_lines_give_the_same_stream(opened: Any, tmp_path: Path) -> None:
    (tmp_path / "compact.json").write_text(json.dumps(ROWS))
    (tmp_path / "pretty.json").write_text("\ufeff\n" + json.dumps(ROWS, indent=2, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "windows.json").write_bytes(json.dumps(ROWS, indent=1).replace("\n", "\r\n").encode())
    (tmp_path / "packed.json.gz").write_bytes(gzip.compress(json.dumps(ROWS, indent=2).encode()))
    (tmp_path / "lines.json").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "lines.json.gz").write_bytes(gzip.compress((tmp_path / "lines.json").read_bytes()))
    truth = digests(batches(opened(jsonl(tmp_path / "a.jsonl", TEXTS), holdout=0), 10))
    for path in tmp_path.glob("*.json*"):
        for cache in (0, 1 << 30):
            corpus = opened(path, cache=cache, holdout=0)
            assert texts(corpus) == TEXTS and digests(batches(corpus, 10)) == truth, path
            again = opened(path, cache=cache, holdout=0, index=corpus.index)
            assert digests(batches(again, 10, workers=2)) == truth, path


def test_bad_items_are_named_or_left_out(opened: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    cases = {
        json.dumps([*ROWS, {"id": 7}]): "a.json, item 43 has no column 'text'",
        json.dumps([*ROWS, 5]): "a.json, item 43 is not a JSON object but int",
        json.dumps(ROWS)[:-9]: "a.json, item 42 is not valid JSON",  # cut short
        "[]": "holds no documents",
    }
    for content, said in cases.items():
        path.write_text(content)
        with pytest.raises(DataError) as caught:
            opened(path)
        assert said in str(caught.value), said
    path.write_text(json.dumps([ROWS[0], {"id": 7}, *ROWS[1:]])[:-9])
    assert texts(opened(path, on_error="skip")) == TEXTS[:-1]
    path.write_bytes(b'[{"text": "a"}, {"text": "\xff"}, {"text": "b"}]')
    assert texts(opened(path, on_error="skip")) == ["a", "b"]


@pytest.mark.parametrize(
    "content", ['[{"text": "a"}, {"text": oops}, {"text": "b"}' + " " * 99 + "]", "[" * 100_000 + " "]
)
def test_what_cannot_be_divided_is_an_error_in_any_case(opened: Any, tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    for on_error in ("fail", "skip"):
        with pytest.raises(DataError, match=r"a.json, item \d is not valid JSON"):
            opened(tmp_path / "a.json", on_error=on_error)


def test_a_single_object_is_told_what_is_wanted(opened: Any, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"data": ROWS}, indent=1))
    with pytest.raises(DataError, match="first line is not valid JSON"):
        opened(tmp_path / "a.json")


def test_in_a_folder_json_beside_other_text_describes_it(opened: Any, tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text('{"license": "mit"}')
    jsonl(tmp_path / "a.jsonl", TEXTS)
    assert texts(opened(tmp_path)) == TEXTS
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "dataset_info.json").write_text(json.dumps(ROWS))
    assert texts(opened(tmp_path)) == TEXTS


@settings(max_examples=60, deadline=None)
@given(st.lists(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
                             lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)),
       st.sampled_from([None, 1]), st.booleans(), st.integers(1, 9))  # fmt: skip
def test_any_array_is_divided_into_its_items(items: list[Any], indent: int | None, ascii: bool, block: int) -> None:
    data = json.dumps(items, indent=indent, ensure_ascii=ascii).encode("utf-8", "surrogatepass")
    blocks = (data[at : at + block] for at in range(0, len(data), block))
    lines = b"".join(split_array(blocks, "x")).decode("utf-8", "surrogatepass").split("\n")[:-1]
    assert [json.loads(line) for line in lines] == json.loads(json.dumps(items))


def test_a_large_item_is_read_in_time(tmp_path: Path) -> None:
    data = json.dumps([{"text": "word " * 3_000_000}, {"text": "b"}]).encode()
    blocks = (data[at : at + (1 << 16)] for at in range(0, len(data), 1 << 16))
    assert [len(line) for line in split_array(blocks, "x")] == [15_000_013, 14]
