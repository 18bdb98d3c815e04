"""Stop strings never show, nothing before them is lost, and characters are whole."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from smolforge.generation.sequence import Detokenizer
from smolforge.tokenizer import StreamDecoder


class Letters:
    """A decoder whose tokens are pieces of a known text."""

    def __init__(self, pieces):
        self.pieces = pieces

    def push(self, token_id):
        return self.pieces[token_id]

    def flush(self):
        return ""


def shown(pieces, stops):
    """What a stream shows, piece by piece."""
    stream, out = Detokenizer(Letters(pieces), stops), []
    for i in range(len(pieces)):
        out.append(stream.push(i))
        if stream.stopped:
            return out, True
    out.append(stream.flush())
    return out, stream.stopped


def reference(pieces, stops):
    """The text before the stop that is complete first."""
    text = ""
    for piece in pieces:
        text += piece
        found = [text.find(stop) for stop in stops if stop in text]
        if found:
            return text[: min(found)], True
    return text, False


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.text("abc", max_size=3), max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_joined_pieces_are_the_text_before_the_stop(pieces, stops):
    out, stopped = shown(pieces, stops)
    assert ("".join(out), stopped) == reference(pieces, stops)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=8), st.text("ab", min_size=1, max_size=4))
def test_no_part_of_a_stop_is_shown_early(pieces, stop):
    out, _ = shown(pieces, [stop])
    whole, text = reference(pieces, [stop])[0], ""
    for piece in out:
        text += piece
        assert whole.startswith(text)


def test_text_is_not_held_back_longer_than_needed():
    stream = Detokenizer(Letters(["ab", "x"]), ["abc"])
    assert stream.push(0) == "" and stream.push(1) == "abx"


def test_half_characters_wait(tokenizer):
    ids = tokenizer.encode("a🙂é")
    stream = Detokenizer(StreamDecoder(tokenizer))
    pieces = [stream.push(i) for i in ids] + [stream.flush()]
    assert "".join(pieces) == "a🙂é" and not any("\ufffd" in piece for piece in pieces)
    assert len(ids) > 3, "the emoji must be spread over tokens for this to be a test"
