"""A model and a tokenizer, shared by the tests of this room."""

from __future__ import annotations

import pytest
from tiny_llama import make_model

from smolforge.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level tokenizer of 400 tokens, some of them whole words."""
    text = (
        "the quick brown fox jumps over the lazy dog and says hello world, once upon a time in a galaxy; naïve café 🙂"
    )
    return Tokenizer.train([text] * 20, 400)


@pytest.fixture(scope="session")
def model():
    """The plain tiny model."""
    return make_model()
