"""The native attention against torch's in float64, forward and backward, for any shape and documents."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import both, inputs

from smolforge.model.attention import blocked, native, native_rows, native_unavailable, sdpa
from smolforge.model.documents import causal_mask

missing = native_unavailable()
pytestmark = pytest.mark.skipif(missing is not None, reason=f"no native attention: {missing}")


def near(ours, theirs, truth) -> None:
    """No further from the truth than twice what torch's own bf16 kernel is; where gradients cancel, from 0."""
    for a, b, t in zip(ours, theirs, truth, strict=True):
        assert a.dtype == torch.bfloat16 and a.shape == t.shape
        assert (a - t).norm() < 2 * (b - t).norm() + 1e-3 * t.norm() + 1e-5


def of(batch, heads, kv_heads, length, width):
    narrow = inputs(batch, heads, kv_heads, length, width, torch.bfloat16)
    return narrow, [x.detach().double().requires_grad_() for x in narrow]


@pytest.mark.parametrize("heads, kv_heads, width", [(9, 3, 64), (4, 4, 32), (3, 1, 96), (2, 1, 256)])
@pytest.mark.parametrize("length", [2, 31, 32, 33, 45, 200])
def test_as_near_to_the_truth_as_sdpa(heads, kv_heads, width, length) -> None:
    narrow, wide = of(2, heads, kv_heads, length, width)
    near(both(native, narrow), both(sdpa, narrow), both(sdpa, wide))


@given(st.lists(st.lists(st.integers(1, 70), min_size=4, max_size=4), min_size=1, max_size=3), st.booleans())
@settings(max_examples=25, deadline=None)
def test_document_borders_are_kept(documents: list[list[int]], shared: bool) -> None:
    length = min(sum(lengths) for lengths in documents)
    ids = [torch.arange(4).repeat_interleave(torch.tensor(lengths))[:length] for lengths in documents]
    mask = causal_mask(torch.stack(ids[:1] if shared else ids))
    narrow, wide = of(len(documents), 4, 2, length, 32)
    near(both(native, narrow, mask), both(sdpa, narrow, mask), both(sdpa, wide, mask))


def test_bits_do_not_depend_on_threads() -> None:
    narrow, _ = of(2, 6, 3, 100, 32)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(both(native, narrow))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_strides_as_they_come() -> None:
    """Heads next to each other, apart, and with d not contiguous."""
    narrow, _ = of(2, 4, 2, 40, 32)
    expected = both(native, narrow)
    for first, second in ((1, 2), (2, 3)):
        moved = [x.detach().transpose(first, second).contiguous().transpose(first, second) for x in narrow]
        got = both(native, [x.requires_grad_() for x in moved])
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize("width, dtype", [(16, torch.bfloat16), (48, torch.bfloat16), (64, torch.float32)])
def test_other_shapes_and_precisions_go_to_blocked(width, dtype) -> None:
    tensors = inputs(1, 4, 2, 20, width, dtype)
    assert torch.equal(native(*tensors, None), blocked(*tensors, None))


def test_the_operator_is_sound_under_the_compiler() -> None:
    narrow, _ = of(1, 2, 1, 20, 32)
    first = torch.zeros(1, 20, dtype=torch.int32)
    for mask in (None, first):
        torch.library.opcheck(native_rows, (*narrow, mask))


def test_scores_are_never_kept() -> None:
    narrow, _ = of(1, 2, 2, 512, 32)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        native(*narrow, None)
    assert kept and max(kept) <= 2 * 512 * 32
