"""Datasets of the Hub, through the real client against a server that speaks its API."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data.conftest import Logged, batches, digests, jsonl, named, parquet
from faults.server import Drop, FaultServer, Status, as_hub, every, first
from smolforge.config import build_config
from smolforge.data import Corpus, Network
from smolforge.data.sources import expand_names
from smolforge.data.sources.hub import inside, pattern_regex, training_patterns
from smolforge.errors import DataError, SmolforgeError, SourceChanged, SourceUnavailable
from smolforge.training.run_data import keep_places

CARD = b"""---
license: apache-2.0
configs:
- config_name: cosmo
  data_files:
  - split: train
    path: cosmo/train-*
  - split: test
    path: ["cosmo/test-*"]
- config_name: one
  data_files: plain/b.parquet
- config_name: escape
  data_files: ../../etc/passwd
- config_name: dir
  data_dir: plain
---
# A dataset
"""


@pytest.fixture
def hub(server: FaultServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FaultServer:
    """The server as the Hub of this process."""
    as_hub(server, monkeypatch, tmp_path / "hf")
    server.push("owner/set", dataset(tmp_path))
    return server


def dataset(folder: Path, more: int = 0) -> dict[str, bytes]:
    """The files of a dataset; `more` documents make another commit."""
    files = {"README.md": CARD, "plain/notes.bin": b"no data"}
    for name, count in (("cosmo/train-0", 60), ("cosmo/train-1", 30 + more), ("cosmo/test-0", 10), ("plain/b", 20)):
        path = folder / name.replace("/", "-")
        files[f"{name}.parquet"] = parquet(path, named(count, name), 10).read_bytes()
    files["lines/train.jsonl"] = jsonl(folder / "x.jsonl", named(25, "line")).read_bytes()
    files["lines/test.jsonl"] = files["lines/train.jsonl"]
    return files


def files_of(corpus: Corpus) -> list[str]:
    """Names of the shards."""
    return [shard["file"] for shard in corpus.index["sources"][0]["shards"]]


TRAIN = ["cosmo/train-0.parquet", "cosmo/train-1.parquet"]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("owner/set:cosmo", TRAIN),
        ("owner/set:one", ["plain/b.parquet"]),
        ("owner/set:dir", ["plain/b.parquet"]),
        ("owner/set:plain", ["plain/b.parquet"]),
        ("owner/set:lines", ["lines/train.jsonl"]),
        ("owner/set@main:cosmo", TRAIN),
        ("hf://datasets/owner/set/cosmo", ["cosmo/test-0.parquet", *TRAIN]),
        ("hf://datasets/owner/set@main/plain/b.parquet", ["plain/b.parquet"]),
        ("hf://datasets/owner/set/*/train-*.parquet", TRAIN),
        ("hf://datasets/owner/set/**.jsonl", ["lines/test.jsonl", "lines/train.jsonl"]),
    ],
)
def test_a_dataset_is_resolved_to_the_files_of_a_commit(
    opened: Any, network: Network, hub: FaultServer, spec: str, expected: list[str]
) -> None:
    corpus = opened(spec, network=network)
    assert files_of(corpus) == expected
    entry = corpus.index["sources"][0]
    assert entry["revision"] == hub.branches["owner/set"]["main"]
    assert len(list(corpus.documents())) == entry["rows"]
    assert all(len(shard["identity"]["oid"]) == 64 for shard in entry["shards"])


# As their cards and files on the Hub are named.
FINEWEB = b"---\nconfigs:\n- config_name: sample-10BT\n  data_files:\n  - {split: train, path: sample/10BT/*}\n---\n"
KNOWN_DATASETS = {
    "HuggingFaceTB/smollm-corpus": ["cosmopedia-v2/train-0.parquet", "fineweb-edu-dedup/train-0.parquet"],
    "HuggingFaceFW/fineweb-edu": ["sample/10BT/000_00000.parquet", "data/CC-MAIN-2013-20/train-0.parquet"],
    "HuggingFaceTB/dclm-edu": ["data/part-0.parquet"],
    "karpathy/climbmix-400b-shuffle": ["shard_00000.parquet", "shard_00099.parquet", "shard_06542.parquet"],
}


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("cosmopedia-v2", [["cosmopedia-v2/train-0.parquet"]]),
        ("fineweb-edu", [["sample/10BT/000_00000.parquet"]]),
        ("dclm-edu", [["data/part-0.parquet"]]),
        ("climbmix", [["shard_00000.parquet", "shard_00099.parquet"]]),
        ("smollm-corpus", [["fineweb-edu-dedup/train-0.parquet"], ["cosmopedia-v2/train-0.parquet"]]),
    ],
)
def test_a_short_name_stands_for_a_dataset(
    opened: Any, network: Network, hub: FaultServer, tmp_path: Path, name: str, files: list[list[str]]
) -> None:
    data = parquet(tmp_path / "p.parquet", named(20, "text"), 10).read_bytes()
    for repository, paths in KNOWN_DATASETS.items():
        card = FINEWEB if "fineweb" in repository else b""
        hub.push(repository, {"README.md": card, **dict.fromkeys(paths, data)})
    corpus = opened((name, 3.0), network=network)
    assert [[shard["file"] for shard in source["shards"]] for source in corpus.index["sources"]] == files
    assert sum(corpus.weights) == pytest.approx(3.0)


def test_a_name_is_not_read_as_one_where_it_is_a_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert expand_names({"fineweb-edu": 2.0, "x": 1.0}) == {"HuggingFaceFW/fineweb-edu:sample-10BT": 2.0, "x": 1.0}
    (tmp_path / "fineweb-edu").mkdir()
    assert expand_names({"fineweb-edu": 2.0}) == {"fineweb-edu": 2.0}
    config = keep_places(build_config("pocket", data={"sources": {"cosmopedia-v2": 1.0, "fineweb-edu": 1.0}}))
    kept = {"HuggingFaceTB/smollm-corpus:cosmopedia-v2": 1.0, str(tmp_path / "fineweb-edu"): 1.0}
    assert config.data.sources == kept, "config.yaml has what the names stand for"


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("owner/set:nothing", "no configuration and no folder 'nothing'(.|\n)*cosmo, one"),
        ("owner/set:escape", "not a path inside it"),
        ("owner/none:cosmo", "no dataset 'owner/none'(.|\n)*HF_TOKEN"),
        ("owner/set@nix:cosmo", "no revision 'nix'"),
        ("hf://datasets/owner/set/nix.parquet", "has no 'nix.parquet'"),
        ("hf://datasets/owner/set/plain/notes.bin", "unknown ending"),
        ("hf://datasets/owner/set/nix/*.parquet", "matches no file"),
        ("hf://models/owner/set", "does not name a dataset"),
        ("hf://datasets/-owner-/set--x/a.parquet", "does not name a dataset"),
    ],
)
def test_what_is_not_there_is_said(opened: Any, network: Network, hub: FaultServer, spec: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        opened(spec, network=network)


def test_a_faulty_hub_gives_the_same_stream(
    opened: Any, network: Network, hub: FaultServer, logged: Logged, tmp_path: Path
) -> None:
    truth = digests(batches(opened("owner/set:cosmo", network=network, cache=0), 20))
    for fault in (
        every(3, Drop(after=50), of="store"),
        every(2, Status(503), of="store"),
        every(4, Status(500), of="resolve"),
        first(2, Status(429, {"Retry-After": "1"}), of="store"),
    ):
        hub.fault = fault
        for workers in (0, 2):
            assert digests(batches(opened("owner/set:cosmo", network=network, cache=0, workers=workers), 20)) == truth
    assert any("503" in line for line in logged())


def test_redirects_are_kept_while_they_last_and_renewed_when_expired(
    opened: Any, network: Network, hub: FaultServer
) -> None:
    truth = digests(batches(opened("owner/set:cosmo", network=network, cache=0), 20))
    resolves = sum("/resolve/" in request.path for request in hub.requests)
    assert resolves == 2  # one per file
    hub.redirect_uses = 2
    assert digests(batches(opened("owner/set:cosmo", network=network, cache=0), 20)) == truth
    assert sum("/resolve/" in request.path for request in hub.requests) > 4
    hub.redirect_uses = 0  # refused even when fresh: that is no passing trouble
    with pytest.raises(DataError, match="403"):
        opened("owner/set:cosmo", network=network, cache=0)


def test_a_run_stays_with_its_commit_when_the_branch_moves(
    opened: Any, network: Network, hub: FaultServer, tmp_path: Path
) -> None:
    corpus = opened("owner/set:cosmo", network=network, cache=0)
    truth = digests(batches(corpus, 20))
    old = corpus.index["sources"][0]["revision"]
    new = hub.push("owner/set", dataset(tmp_path, more=7))
    again = opened("owner/set:cosmo", network=network, cache=0, index=corpus.index)
    assert digests(batches(again, 20)) == truth
    fresh = opened("owner/set:cosmo", network=network, cache=0)
    assert fresh.index["sources"][0]["revision"] == new != old
    assert fresh.index_hash != corpus.index_hash
    del hub.commits["owner/set"][old]
    with pytest.raises(SourceChanged, match=old):
        opened("owner/set:cosmo", network=network, cache=0, index=corpus.index)


def test_a_hub_that_stays_away(opened: Any, network: Network, hub: FaultServer) -> None:
    hub.fault = lambda _: Status(503)
    network.patience = 5
    with pytest.raises(SourceUnavailable, match="503"):
        opened("owner/set:cosmo", network=network)


def test_the_token_goes_to_the_hub_and_not_to_the_store(
    opened: Any, network: Network, hub: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = "secret"
    with pytest.raises(DataError, match="HF_TOKEN"):
        opened("owner/set:cosmo", network=network)
    monkeypatch.setenv("HF_TOKEN", "secret")
    hub.reset()
    batches(opened("owner/set:cosmo", network=network, cache=0), 5)
    for request in hub.requests:
        assert ("/store/" in request.path) != ("secret" in str(request.headers)), request
    assert sum("/store/" in request.path for request in hub.requests) > 4


def test_offline_reads_what_the_client_has_downloaded(
    opened: Any, network: Network, hub: FaultServer, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"owner/set at main is not on this machine(.|\n)*hf download"):
        opened("owner/set:cosmo", network=network, offline=True)
    online = opened("owner/set:cosmo", network=network, cache=0)
    truth = digests(batches(online, 20))
    snapshot(hub, tmp_path / "hf")
    hub.reset()
    hub.fault = lambda _: Status(500)
    for index in (None, online.index):
        offline = opened("owner/set:cosmo", network=network, cache=0, offline=True, index=index)
        assert offline.index["hash"] == online.index_hash
        assert digests(batches(offline, 20)) == truth
    assert hub.requests == []
    with pytest.raises(DataError, match="not on this machine"):
        opened("owner/set:nothing", network=network, offline=True)


def test_offline_goes_on_from_our_own_cache(opened: Any, network: Network, hub: FaultServer) -> None:
    online = opened("owner/set:cosmo", network=network)
    truth = digests(batches(online, 20))
    hub.reset()
    offline = opened("owner/set:cosmo", network=network, offline=True, index=online.index)
    assert digests(batches(offline, 20)) == truth
    assert hub.requests == []


def snapshot(hub: FaultServer, root: Path) -> None:
    """The client's cache as `hf download` leaves it (huggingface_hub's documented layout)."""
    import hashlib

    sha = hub.branches["owner/set"]["main"]
    base = root / "datasets--owner--set"
    (base / "refs").mkdir(parents=True)
    (base / "refs" / "main").write_text(sha)
    (base / "blobs").mkdir()
    for name, data in hub.commits["owner/set"][sha].items():
        blob = base / "blobs" / hashlib.sha256(data).hexdigest()
        blob.write_bytes(data)
        link = base / "snapshots" / sha / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))


def test_the_client_honours_its_environment(hub: FaultServer, tmp_path: Path) -> None:
    hub.token = "secret"
    code = (
        "from smolforge.config import DataConfig\nfrom smolforge.data import Corpus\n"
        "with Corpus.open(DataConfig(sources={'owner/set:cosmo': 1}, cache=0)) as corpus:\n"
        "    print(sum(1 for _ in corpus.documents()))\n"
    )
    environment = {**os.environ, "HF_ENDPOINT": hub.root, "HF_TOKEN": "secret", "HF_HOME": str(tmp_path / "home")}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (run.stdout.strip(), run.returncode) == ("90", 0), run.stderr


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../x", "a\\b", "a\nb", "http://evil/x", "a/.."])
def test_paths_that_leave_the_dataset_are_refused(path: str) -> None:
    with pytest.raises(DataError, match="not a path inside"):
        inside(path)


def test_a_listing_with_a_path_that_leaves_is_refused(opened: Any, network: Network, hub: FaultServer) -> None:
    hub.push("owner/evil", {"cosmo/../../train.parquet": b"x"})
    with pytest.raises(DataError, match="not a path inside"):
        opened("owner/evil:cosmo", network=network)


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("a/*.parquet", "a/b.parquet", "a/b/c.parquet"),
        ("**/x", "a/b/x", "a/b/y"),
        ("**/x", "x", "xx"),
        ("a/**", "a/b/c", "b/a"),
        ("t-?[0-9].x", "t-a3.x", "t-ab.x"),
        ("t[!a]", "tb", "ta"),
        ("a.b", "a.b", "aXb"),
        ("[", "[", "a"),
        ("[z-a]", "[z-a]", "z"),
    ],
)
def test_patterns_of_cards(pattern: str, yes: str, no: str) -> None:
    assert pattern_regex(pattern).match(yes)
    assert not pattern_regex(pattern).match(no)


@pytest.mark.parametrize("configs", [None, 3, "x", [3], [{"config_name": "a"}], [{"config_name": "a", "data_files": 3}],
                                     [{"config_name": "a", "data_files": [{"split": "train", "path": 3}]}]])  # fmt: skip
def test_a_card_that_makes_no_sense_names_nothing(configs: Any) -> None:
    with contextlib.suppress(SmolforgeError):
        assert training_patterns({"configs": configs}, "a", "spec") == []
