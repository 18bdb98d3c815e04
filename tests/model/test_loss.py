"""The chunked loss against autograd of the plain one."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from smolforge import kernels
from smolforge.config import ModelConfig
from smolforge.model import loss
from smolforge.model.architecture import build_model
from smolforge.model.loss import IGNORE, LOSSES, chunked_loss, full_loss, native_chunk_loss, torch_chunk_loss

missing = kernels.unavailable()
needs_native = pytest.mark.skipif(missing is not None, reason=f"no native loss: {missing}")
NEEDS = {
    "linear": pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch has it from 2.13 on"),
    "native": needs_native,
}
WAYS = [chunked_loss, pytest.param(LOSSES["native"], marks=needs_native, id="native")]


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
@pytest.mark.parametrize("way", WAYS)
def test_gradients_equal_autograd(way, dtype, tolerance, chunk, z_weight) -> None:
    hidden, weight, targets = inputs(dtype)
    expected = torch.autograd.grad(3 * plain(hidden, weight, targets, 1 / 34, z_weight), (hidden, weight))
    loss, total = way(hidden, weight, targets, scale=1 / 34, chunk=chunk, z_weight=z_weight)
    got = torch.autograd.grad(3 * loss, (hidden, weight))
    assert torch.allclose(loss, plain(hidden, weight, targets, 1 / 34, z_weight), atol=tolerance)
    assert torch.allclose(total, plain(hidden, weight, targets, 1.0, 0.0), atol=34 * tolerance, rtol=1e-6)
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours - theirs).abs().max() < tolerance


@pytest.mark.parametrize("tokens_per_step", [4096, 524_288])
def test_fp16_gradients_are_made_unscaled(tokens_per_step) -> None:
    """1 / tokens is below what fp16 holds: scaled in fp16, 99% of the head's rows would be 0, and then 65,536 overflows."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(256, 64, generator=g).half()
    weight, targets = torch.randn(16_384, 64, generator=g) * 0.02, torch.randint(16_384, (256,), generator=g)

    def gradients(x, w, compute):
        x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
        (compute(x, w, targets, scale=1 / tokens_per_step)[0] * 65_536).backward()  # the gradient scaler's first factor
        return x.grad.double(), w.grad.double()

    exact = gradients(hidden.double(), weight.half().double(), full_loss)
    for ours, theirs in zip(gradients(hidden, weight, chunked_loss), exact, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-3
        assert ours.any(dim=1).float().mean() > 0.999


@pytest.mark.parametrize("spread, likely", [(1, 0), (3, 0), (1, 4), (3, 4)])
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_how_far_the_gradient_of_a_head_in_16_bits_is_from_the_truth(half, spread, likely) -> None:
    """In fp16 less than a thousandth. In bf16 what rounding costs a head without chunks is more than that by itself.

    There the chunks add less than a thousandth; summed in bf16 they would add more. The spread of the logits and
    the likelihood of the targets are those of a loss from 10.5 down to 1.1.
    """
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2048, 64, generator=g), torch.randn(512, 64, generator=g) * spread / 8
    targets = torch.randint(512, (2048,), generator=g)
    rows = weight[targets]
    hidden, weight = (hidden + rows / rows.norm(dim=1, keepdim=True) * likely).to(half), weight.to(half)

    def gradient(w, x, compute, **options):
        w = w.clone().requires_grad_()
        (compute(x, w, targets, scale=1 / 2048, **options)[0] * 65_536).backward()
        return w.grad.double()

    exact = gradient(weight.double(), hidden.double(), full_loss)
    for stored in (weight.float(), weight):
        whole, chunks = (
            float((found - exact).norm() / exact.norm())
            for found in (gradient(stored, hidden, full_loss), gradient(stored, hidden, chunked_loss, chunk=128))
        )
        print(f"{half}, spread {spread}, likely {likely}, {stored.dtype}: whole {whole:.1e}, in chunks {chunks:.1e}")
        assert chunks < (1e-3 if half == torch.float16 else whole + 1e-3)


def test_products_that_a_gpu_leaves_in_fp32_bring_the_gradient_within_a_thousandth(monkeypatch) -> None:
    """For logits of a few units; beyond, the logits' own rounding to bf16 counts more than all else."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2048, 64, generator=g).bfloat16(), torch.randn(999, 64, generator=g).div(8).bfloat16()
    targets = torch.randint(999, (2048,), generator=g)

    def gradient(w, x, compute):
        w = w.requires_grad_()
        compute(x, w, targets, scale=1 / 2048)[0].backward()
        return w.grad

    def add(total, made, rows, first):  # torch.mm with out_dtype, which torch has on CUDA only
        total.addmm_(made.float().t(), rows.float(), beta=0 if first else 1)

    exact = gradient(weight.double(), hidden.double(), full_loss)
    on_cpu = gradient(weight.float(), hidden, chunked_loss)
    monkeypatch.setattr(loss, "_add_product", add)
    on_gpu = gradient(weight.float(), hidden, chunked_loss)
    far = [float((found - exact).norm() / exact.norm()) for found in (on_gpu, on_cpu)]
    assert far[0] < 1e-3 < far[1], far


def test_gradcheck() -> None:
    hidden, weight, targets = inputs(torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: chunked_loss(h, w, targets, scale=0.1, chunk=8, z_weight=0.01)[0], (hidden, weight)
    )


@needs_native
@pytest.mark.parametrize("words", [1, 7, 16, 53, 5000])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
def test_the_native_loss_of_a_chunk(words, dtype, tolerance) -> None:
    """Against float64; in bf16 the gradients are rounded once, at the end."""
    g = torch.Generator().manual_seed(words)
    logits = (torch.randn(40, words, generator=g) * 6).to(dtype)
    targets = torch.randint(words, (40,), generator=g)
    targets[[0, 39]] = IGNORE
    ours, theirs, scale = logits.clone(), logits.double(), torch.tensor(0.25)
    sums = native_chunk_loss(ours, targets, scale, 1e-3)
    expected = torch_chunk_loss(theirs, targets, scale.double(), 1e-3)
    for a, b in zip(sums, expected, strict=True):
        assert a.dtype == torch.float32 and float(a) == pytest.approx(float(b), rel=1e-6, abs=1e-6)
    assert ((ours - theirs).abs() <= tolerance * theirs.abs() + 1e-7).all()
    assert not ours[[0, 39]].any()


@needs_native
def test_the_native_loss_shows_what_is_not_finite_and_no_target() -> None:
    for bad in (float("nan"), float("inf")):
        logits = torch.zeros(3, 40)
        logits[1, 17] = bad
        total, _ = native_chunk_loss(logits, torch.tensor([1, 2, 3]), torch.tensor(1.0), 0.0)
        assert not total.isfinite() and not logits[1].isfinite().all()
    with pytest.raises(IndexError, match="40 columns"):
        native_chunk_loss(torch.zeros(2, 40), torch.tensor([1, 40]), torch.tensor(1.0), 0.0)
    with pytest.raises(IndexError):
        native_chunk_loss(torch.zeros(2, 40), torch.tensor([1, -1]), torch.tensor(1.0), 0.0)


def peak_bytes(loss, tokens: int, vocabulary: int, width: int = 32) -> int:
    """What torch's allocator held at most during a loss and its gradients, beyond their inputs."""
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss(hidden, weight, targets, scale=1 / tokens)[0].backward()
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
    added = peak_bytes(functools.partial(chunked_loss, chunk=64), many, vocabulary) - peak_bytes(
        functools.partial(chunked_loss, chunk=64), few, vocabulary
    )
    logits = (many - few) * vocabulary * 4
    assert added <= 2 * (many - few) * 32 * 4, added  # logits are 64 times as many bytes as a gradient of the hidden
    assert peak_bytes(full_loss, many, vocabulary) - peak_bytes(full_loss, few, vocabulary) >= logits
    # And by the vocabulary it grows with a chunk's tokens, not with all.
    wider = peak_bytes(functools.partial(chunked_loss, chunk=64), many, 2 * vocabulary) - peak_bytes(
        functools.partial(chunked_loss, chunk=64), many, vocabulary
    )
    assert wider < 6 * 64 * vocabulary * 4 < many * vocabulary * 4, wider


@pytest.mark.parametrize("way", [pytest.param(way, marks=NEEDS.get(way, ())) for way in LOSSES])
@pytest.mark.parametrize("count, rows", [(0, 0), (8, 8), (9, 16), (24, 24)])
def test_positions_that_do_not_count_cost_no_product(monkeypatch, way, count, rows) -> None:
    monkeypatch.setattr(loss, "ROWS", 8)
    config = ModelConfig(
        vocab_size=53,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = build_model(config, loss=way)
    words, targets = torch.randint(0, 53, (2, 2, 12)).unbind()
    targets.view(-1)[torch.randperm(24)[count:]] = IGNORE
    expected = F.cross_entropy(model(words).flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    with FlopCounterMode(display=False) as whole:
        found, nats = model.loss(words, targets)
        found.backward()
    torch.testing.assert_close((found, nats), (expected, expected))
    torch.testing.assert_close([parameter.grad for parameter in model.parameters()], list(gradients))
    if way == "full":  # the others write their products in place, which the counter does not see
        with FlopCounterMode(display=False) as body:
            model.decoder(words).sum().backward()
        head = whole.get_total_flops() - body.get_total_flops()
        assert head == 3 * 2 * rows * 16 * 53  # forward, and backward to both of its operands
