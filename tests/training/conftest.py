"""Fixtures of the training tests; the helpers beside it can be imported by name."""

from tiny import make_run

__all__ = ["make_run"]
