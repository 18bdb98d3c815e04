"""The fixtures of this folder live in a module that the browser's tests share."""

from serving_fixtures import chat_model, server, slow_run, slow_server, tiny_run, tokenizer

__all__ = ["chat_model", "server", "slow_run", "slow_server", "tiny_run", "tokenizer"]
