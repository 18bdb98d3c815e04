"""The blocked attention against torch's, forward and backward, and what it keeps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smolforge.config import ModelConfig
from smolforge.model import attention
from smolforge.model.architecture import build_model
from smolforge.model.attention import blocked, sdpa, sdpa_fp32
from smolforge.model.documents import causal_mask, document_borders


def inputs(batch, heads, kv_heads, length, width, dtype) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(length)
    shapes = [(batch, heads, length, width), *[(batch, kv_heads, length, width)] * 2]
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def both(attend, tensors, mask=None) -> list[torch.Tensor]:
    """Output and gradients under a loss that weighs every element differently."""
    out = attend(*tensors, mask)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out, *torch.autograd.grad((out * weights).sum(), tensors)]


# Lengths below, at, just above and far above a block (BLOCK_ROWS / group positions), grouped and not.
@pytest.mark.parametrize("heads, kv_heads", [(9, 3), (4, 4), (6, 1)])
@pytest.mark.parametrize("length", [2, 63, 64, 65, 257])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_equals_sdpa(heads, kv_heads, length, dtype, tolerance) -> None:
    tensors = inputs(2, heads, kv_heads, length, 16, dtype)
    for ours, theirs in zip(both(blocked, tensors), both(sdpa, tensors), strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert (ours - theirs).abs().max() < tolerance * theirs.abs().max()


@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.integers(1, 17))
@settings(max_examples=30, deadline=None)
def test_any_shape_and_block(batch, kv_heads, group, length, block) -> None:
    q, k, v = inputs(batch, kv_heads * group, kv_heads, length, 8, torch.float64)
    rows = q.view(batch, kv_heads, group, length, 8).transpose(2, 3).reshape(batch * kv_heads, length * group, 8)
    flat = [x.flatten(0, 1) for x in (k, v)]
    out = attention.blocked_rows(rows * 8**-0.5, *flat, None, group, block)
    out = out.view(batch, kv_heads, length, group, 8).transpose(2, 3).reshape(q.shape)
    assert torch.allclose(out, sdpa(q, k, v, None), atol=1e-12)


def test_gradcheck(monkeypatch) -> None:
    monkeypatch.setattr(attention, "BLOCK_ROWS", 6)
    tensors = inputs(1, 4, 2, 7, 4, torch.float64)
    masks = [None, causal_mask(torch.tensor([[0, 0, 1, 1, 1, 2, 2]]))]
    for mask in masks:
        assert torch.autograd.gradcheck(lambda q, k, v, mask=mask: blocked(q, k, v, mask), tensors)
    for mask in (None, causal_mask(torch.tensor([[0, 0, 0, 1, 1]]))[:, 0]):
        flat = [x.flatten(0, 1) for x in inputs(1, 2, 2, 5, 4, torch.float32)]
        torch.library.opcheck(attention.blocked_rows, (*flat, mask, 1, 2))


def test_bf16_is_as_near_to_the_truth_as_sdpa() -> None:
    exact = both(sdpa, inputs(2, 9, 3, 200, 64, torch.float64))
    tensors = inputs(2, 9, 3, 200, 64, torch.bfloat16)
    ours, theirs = both(blocked, tensors), both(sdpa, tensors)
    for a, b, truth in zip(ours, theirs, exact, strict=True):
        assert (a - truth).norm() < 2 * (b - truth).norm()


@given(st.lists(st.lists(st.integers(1, 90), min_size=4, max_size=4), min_size=1, max_size=3), st.booleans())
@settings(max_examples=30, deadline=None)
def test_document_borders_are_kept(documents: list[list[int]], shared: bool) -> None:
    length = min(sum(lengths) for lengths in documents)
    ids = [torch.arange(4).repeat_interleave(torch.tensor(lengths))[:length] for lengths in documents]
    mask = causal_mask(torch.stack(ids[:1] if shared else ids))
    tensors = inputs(len(documents), 4, 2, length, 8, torch.float64)
    for ours, theirs in zip(both(blocked, tensors, mask), both(sdpa, tensors, mask), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


@given(st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=9), min_size=1, max_size=3), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_packed_documents_without_a_mask_equal_the_masked_module(documents: list[list[int]], seed: int) -> None:
    """A whole model, its losses and all its gradients, for random packings: `varlen` and `expanded` against a mask."""
    length = min(sum(lengths) for lengths in documents)
    ids = torch.stack(
        [torch.arange(9).repeat_interleave(torch.tensor(n + [0] * (9 - len(n))))[:length] for n in documents]
    )
    config = ModelConfig(
        vocab_size=50, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = torch.randint(50, (2, *ids.shape), generator=generator)
    found = []
    for way in ("sdpa", "varlen", "expanded"):
        model = build_model(config, dtype=torch.float64, seed=seed, attention=way)
        loss, _ = model.loss(inputs, targets, document_ids=ids)
        loss.backward()
        found.append([loss, *(p.grad for p in model.parameters())])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-12, rtol=1e-9)


def test_document_borders_are_a_power_of_two_and_end_with_empty_documents() -> None:
    ids = torch.tensor([[0, 0, 0, 1], [1, 1, 2, 2]])
    borders = document_borders(ids)
    assert borders.dtype == torch.int32 and borders.tolist() == [0, 3, 4, 6] + [8] * 13
    many = document_borders(torch.arange(40).view(1, 40))
    assert len(many) == 64 + 1 and many.tolist()[:41] == list(range(41))


def test_expanded_heads_keep_no_scores_on_a_kernel_without_groups() -> None:
    q, k, v = inputs(2, 6, 2, 20, 8, torch.float64)
    for mask in (None, causal_mask(torch.arange(20).view(1, 20) // 7)):
        for ours, theirs in zip(both(attention.expanded, [q, k, v], mask), both(sdpa, [q, k, v], mask), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


def test_a_group_as_rows_reads_the_cache_without_repeating_it() -> None:
    q, k, v = inputs(3, 6, 2, 20, 8, torch.float64)
    positions = torch.tensor([[3, 4, 5], [0, 11, 12], [17, 18, 19]])
    three = (torch.arange(20) <= positions[..., None])[:, None]  # (B, 1, T, S)
    last = torch.ones(3, 20, dtype=torch.bool).tril(17)  # as `sdpa` makes it of the last positions, without a batch
    for queries, mask in (
        (q[:, :, 5:6], None), (q[:, :, 5:6], three[:, :, :1]), (q[:, :, 5:8], three), (q[:, :, 17:], last)
    ):  # fmt: skip
        torch.testing.assert_close(attention.as_rows(queries, k, v, mask), sdpa(queries, k, v, mask))


def test_varlen_needs_a_causal_kernel(monkeypatch) -> None:
    from torch.nn.attention import varlen

    if torch.__version__ >= "2.13":  # 2.10 has no windows
        assert attention.varlen_unavailable() is None
    monkeypatch.setattr(varlen, "varlen_attn", lambda query, key, value, cu_seq_q, is_causal=False: None)
    assert "has no windows" in str(attention.varlen_unavailable())


def test_caches_go_to_sdpa() -> None:
    q, k, v = inputs(2, 4, 2, 12, 8, torch.float32)
    assert torch.equal(blocked(q[:, :, -3:], k, v, None), sdpa(q[:, :, -3:], k, v, None))


def test_fp32_inside_bf16() -> None:
    tensors = inputs(1, 4, 2, 12, 8, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        out = sdpa_fp32(*tensors, None)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, sdpa(*(x.float() for x in tensors), None).bfloat16())


def test_flex_equals_sdpa() -> None:
    tensors = [x.detach() for x in inputs(1, 4, 2, 20, 16, torch.float32)]
    mask = causal_mask(torch.tensor([[0] * 8 + [1] * 12]))
    for m in (None, mask):
        assert torch.allclose(attention.flex(*tensors, m), sdpa(*tensors, m), atol=1e-5)


def test_scores_are_never_kept() -> None:
    """Between forward and backward only tensors that grow with T are alive, none with T x T."""
    tensors = inputs(1, 2, 2, 512, 8, torch.float32)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        blocked(*tensors, None)
    assert kept and max(kept) <= 2 * 512 * 8


@pytest.mark.parametrize("way", ["sdpa", "expanded"])
def test_a_block_in_autocast_compiles_as_one_graph(way) -> None:
    """Norms leave autocast, which must not cut the graph."""
    config = ModelConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    ids, documents, found = torch.arange(16).view(2, 8), torch.tensor([[0] * 5 + [1] * 3] * 2), []
    for compiled in (False, True):
        model = build_model(config, seed=0, attention=way)
        for layer in model.decoder.layers if compiled else ():
            layer.compile(backend="aot_eager", dynamic=False, fullgraph=True)
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = model.loss(ids, ids, document_ids=documents)
        loss.backward()
        found.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(found[1], found[0], atol=0, rtol=0)
