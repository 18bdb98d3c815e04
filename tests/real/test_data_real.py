"""Real text under the real tokenizer: every container, exact resume, an honest share of held-out documents."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smolforge.config import DataConfig
from smolforge.data import Corpus, Loader, data_digest, merge_cursors
from smolforge.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(real_data: Path) -> Tokenizer:
    """SmolLM2's own."""
    return Tokenizer.from_pretrained(real_data / "tokenizer" / "smollm2-135m")


def configured(sources: dict[str, float], **keys: object) -> DataConfig:
    """Windows of 256 tokens in 4 lanes."""
    return DataConfig.model_validate({"sources": sources, "sequence_length": 256, "lanes": 4, **keys})


def test_a_mixture_of_real_text_resumes_exactly_on_other_ranks(real_data: Path, tokenizer: Tokenizer) -> None:
    text = real_data / "text"
    sources = {str(text / "tinystories.txt"): 0.5, str(text / "classic_books.jsonl"): 0.3}
    sources[str(text / "wikitext2_valid.txt")] = 0.2
    with Corpus.open(configured(sources)) as corpus:
        with Loader(corpus, tokenizer, sequences_per_step=8) as loader:
            made = list(itertools.islice(loader, 8))
        cursor = json.loads(json.dumps(made[2].cursor))
        ranks = [Loader(corpus, tokenizer, sequences_per_step=8, rank=r, world=4, cursor=cursor) for r in range(4)]
        for step in range(3, 8):
            parts = [next(rank) for rank in ranks]
            assert data_digest([d for part in parts for d in part.digests]) == data_digest(made[step].digests)
        assert merge_cursors([part.cursor for part in parts]) == made[7].cursor
        for rank in ranks:
            rank.close()
        assert all(batch.tokens.max() < tokenizer.vocab_size for batch in made)


def test_windows_decode_to_the_text_they_came_from(real_data: Path, tokenizer: Tokenizer) -> None:
    with Corpus.open(configured({str(real_data / "text" / "tinystories.txt"): 1.0}, workers=0)) as corpus:
        texts = {d.address: d.text for d in corpus.documents(held_out=False)}
        with Loader(corpus, tokenizer, sequences_per_step=8) as loader:
            batch = next(loader)
        whole = "".join(texts.values())
        for row in batch.tokens:
            for part in tokenizer.decode(row.tolist(), skip_special_tokens=False).split("<|endoftext|>"):
                assert part.strip("\ufffd") in whole
        held = {d.text for d in corpus.documents(held_out=True)}
        assert 5 < len(held) < 50  # 1% of 2,317
        assert not held & set(texts.values())


def test_the_same_books_as_parquet_and_jsonl_give_the_same_documents(real_data: Path, tmp_path: Path) -> None:
    original = real_data / "text" / "classic_books.jsonl"
    texts = [json.loads(line)["text"] for line in original.read_text(encoding="utf-8").split("\n") if line]
    pq.write_table(pa.table({"text": texts}), tmp_path / "books.parquet", row_group_size=5)
    for path in (tmp_path / "books.parquet", original):
        with Corpus.open(configured({str(path): 1})) as corpus:
            assert [d.text for d in corpus.documents()] == texts


def test_a_real_cosmopedia_record_is_read_by_its_text_column(real_data: Path) -> None:
    path = real_data / "text" / "cosmopedia_v2_record.jsonl"
    with Corpus.open(configured({str(path): 1})) as corpus:
        (document,) = corpus.documents()
    assert document.text == json.loads(path.read_text())["text"]
