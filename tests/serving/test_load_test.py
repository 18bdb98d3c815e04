"""`smolforge bench serve`: every token is counted, and a server that does not start is an error."""

from __future__ import annotations

import logging
import sys

import pytest

from smolforge.errors import RunFailed
from smolforge.serving import load_test


def test_each_level_counts_all_its_tokens(tiny_run, caplog):
    caplog.set_level(logging.INFO, "smolforge")
    result = load_test.measure(str(tiny_run), clients=(1, 3), tokens=6, rounds=2)
    assert [level["clients"] for level in result["levels"]] == [1, 3]
    for level in result["levels"]:
        assert level["tokens"] == level["clients"] * 6 * 2
        assert level["tokens_per_second"] == level["tokens"] / level["seconds"]
        assert 0 < level["first_token_seconds"] <= level["slowest_first_token_seconds"] < level["seconds"]
    told = [message for message in caplog.messages if "clients" in message]
    assert len(told) == 2 and told[0].startswith("1 clients")
    rows = load_test.table(result).splitlines()
    assert "tiny" in rows[0] and [row.split()[0] for row in rows[2:]] == ["1", "3"]


def test_a_server_that_ends_or_refuses_is_an_error(server):
    command = [sys.executable, "-c", "raise SystemExit('no luck today')"]
    for url in (None, "http://127.0.0.1:9"):
        with pytest.raises(RunFailed, match="did not start") as error, load_test.start_server(command, url=url):
            pass
        assert "no luck today" in str(error.value)
    with pytest.raises(RunFailed, match="401"):  # this one wants a key
        load_test.sweep(server.url, "tiny-chat", (1,), 4, 1)
