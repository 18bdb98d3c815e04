"""The chunked loss against autograd of the plain one."""

import pytest
import torch
import torch.nn.functional as F

from smolforge.model.loss import IGNORE, chunked_loss, full_loss


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 16, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(53, 16, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(53, (37,), generator=g)
    targets[[3, 11, 36]] = IGNORE
    return hidden, weight, targets


def plain(hidden, weight, targets, scale, z_weight):
    logits = F.linear(hidden, weight)
    z = logits.logsumexp(-1)[targets != IGNORE].square().sum()
    return scale * (F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORE) + z_weight * z)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-6)])
@pytest.mark.parametrize("chunk", [5, 37, 100])
@pytest.mark.parametrize("z_weight", [0.0, 1e-2])
def test_gradients_equal_autograd(dtype, tolerance, chunk, z_weight) -> None:
    hidden, weight, targets = inputs(dtype)
    expected = torch.autograd.grad(3 * plain(hidden, weight, targets, 1 / 34, z_weight), (hidden, weight))
    loss, total = chunked_loss(hidden, weight, targets, scale=1 / 34, chunk=chunk, z_weight=z_weight)
    got = torch.autograd.grad(3 * loss, (hidden, weight))
    assert torch.allclose(loss, plain(hidden, weight, targets, 1 / 34, z_weight), atol=tolerance)
    assert torch.allclose(total, plain(hidden, weight, targets, 1.0, 0.0), atol=34 * tolerance, rtol=1e-6)
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours - theirs).abs().max() < tolerance


def test_gradcheck() -> None:
    hidden, weight, targets = inputs(torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: chunked_loss(h, w, targets, scale=0.1, chunk=8, z_weight=0.01)[0], (hidden, weight)
    )


def peak_bytes(loss, tokens: int, vocabulary: int, chunk: int = 64, width: int = 32) -> int:
    """What torch's allocator held at most during a loss and its gradients, beyond their inputs."""
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss(hidden, weight, targets, scale=1 / tokens, chunk=chunk)[0].backward()
    kineto = profile.profiler
    assert kineto is not None
    held = most = 0
    events = [event for event in kineto.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def test_the_peak_is_not_vocabulary_times_tokens() -> None:
    """A chunk of logits, and gradients as large as the inputs: eight times the tokens add their own gradients only."""
    few, many, vocabulary = 512, 4096, 2048
    added = peak_bytes(chunked_loss, many, vocabulary) - peak_bytes(chunked_loss, few, vocabulary)
    logits = (many - few) * vocabulary * 4
    assert added <= 2 * (many - few) * 32 * 4, added  # logits are 64 times as many bytes as a gradient of the hidden
    assert peak_bytes(full_loss, many, vocabulary) - peak_bytes(full_loss, few, vocabulary) >= logits
    # And by the vocabulary it grows with a chunk's tokens, not with all.
    wider = peak_bytes(chunked_loss, many, 2 * vocabulary) - peak_bytes(chunked_loss, many, vocabulary)
    assert wider < 6 * 64 * vocabulary * 4 < many * vocabulary * 4, wider
