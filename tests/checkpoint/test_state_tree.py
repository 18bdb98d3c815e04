"""Any tree of state comes back exactly, and no pickle is involved."""

from __future__ import annotations

import json
import math
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smolforge.checkpoint.state import TENSORS, TREE, load_state, save_state
from smolforge.errors import CheckpointError

DTYPES = [
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8, torch.int8, torch.int16, torch.int32,
    torch.int64, torch.bool, torch.complex64,
]  # fmt: skip


def same(a: Any, b: Any) -> bool:
    """Equal in type, value and bits."""
    if isinstance(a, torch.Tensor):
        equal_bits = a.contiguous().view(-1).view(torch.uint8).equal(b.contiguous().view(-1).view(torch.uint8))
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and equal_bits
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b)
    if isinstance(a, dict):
        keys_a, keys_b = list(a), list(b)
        return len(a) == len(b) and all(same(x, y) for x, y in zip(keys_a, keys_b, strict=True)) and all(
            same(a[key], b[key]) for key in a
        )  # fmt: skip
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@st.composite
def tensors(draw: Any) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    count = math.prod(shape) * dtype.itemsize
    raw = draw(st.binary(min_size=count, max_size=count))
    if dtype == torch.bool:
        raw = bytes(byte & 1 for byte in raw)
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape)


LEAVES = (
    st.none() | st.booleans() | st.integers() | st.integers(min_value=2**53) | st.floats() | st.text() | st.binary()
    | tensors() | st.sampled_from([math.inf, -math.inf, math.nan, -0.0, 5e-324, 1.7976931348623157e308])
)  # fmt: skip
KEYS = st.text(max_size=5) | st.integers(-5, 5) | st.sampled_from(["$tensor", "$dict", "a.b", "__metadata__"])
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=4)
        | st.dictionaries(st.tuples(st.integers(0, 3), st.text(max_size=2)), inner, max_size=2)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(tree=TREES)
def test_every_tree_comes_back_exactly(tmp_path_factory: Any, tree: Any) -> None:
    directory = tmp_path_factory.mktemp("state")
    save_state(directory, tree)
    again = load_state(directory)
    assert same(tree, again), (tree, again)
    json.loads((directory / TREE).read_text(), parse_constant=pytest.fail)  # strict JSON: no NaN, no Infinity


def test_the_state_of_training_comes_back(tmp_path: Path) -> None:
    layer = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    tree = {
        "optimizer": optimizer.state_dict(),
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
        "numpy": np.random.default_rng(3).bit_generator.state,
        "legacy": np.random.RandomState(3).get_state(),  # what older code saves
    }
    save_state(tmp_path, tree)
    again = load_state(tmp_path)
    assert same(tree, again)
    optimizer.load_state_dict(again["optimizer"])
    random.setstate(again["python"])
    torch.set_rng_state(again["torch"])


def test_views_shared_tensors_and_names_that_collide(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tree = {"base": base, "again": base, "row": base[1], "column": base[:, 2], "t": base.T, "flat": base.view(-1),
            "a": {"b": base[0]},
            "a.b": torch.ones(1), "parameter": torch.nn.Parameter(torch.ones(2))}  # fmt: skip
    save_state(tmp_path, tree)
    again = load_state(tmp_path)
    assert all(
        torch.equal(again[key], tree[key]) for key in ("base", "again", "row", "column", "t", "flat", "parameter")
    )
    assert torch.equal(again["a"]["b"], base[0])
    assert torch.equal(again["a.b"], torch.ones(1))
    assert (tmp_path / TENSORS).stat().st_size < 2000


def test_writing_to_a_loaded_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    save_state(tmp_path, {"x": torch.zeros(1000)})
    before = (tmp_path / TENSORS).read_bytes()
    load_state(tmp_path)["x"].fill_(7)
    assert (tmp_path / TENSORS).read_bytes() == before


@pytest.mark.parametrize("value", [object(), {1, 2}, np.float32(1), np.array(["a"]), lambda: 0, torch.float32])
def test_what_cannot_be_stored_exactly_is_refused_with_its_place(tmp_path: Path, value: Any) -> None:
    with pytest.raises(TypeError, match=r"state\.a\.1"):
        save_state(tmp_path, {"a": [0, value]})


@pytest.mark.parametrize(
    "tree",
    ['{"$tensor": "no such"}', '{"$tensor": ["x"]}', '{"$int": "zz"}', '{"$bytes": "?"}', '{"$float": "00"}',
     '{"$dict": [1]}', '{"$dict": [[{"$dict": []}, 1]]}', '{"$what": 1}', '{"$tuple": 3}', '{"$array": 5}',
     "[" * 100_000, '{"$int": 5}', '{"$float": null}'],
)  # fmt: skip
def test_a_damaged_tree_is_one_clear_error(tmp_path: Path, tree: str) -> None:
    save_state(tmp_path, {"x": torch.zeros(2)})
    (tmp_path / TREE).write_text(f'{{"format": 1, "tree": {tree}}}')
    with pytest.raises(CheckpointError, match=r"state\.json"):
        load_state(tmp_path)


def test_a_model_without_state_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no state"):
        load_state(tmp_path / "training")
