"""The real training step on GPUs that are not there: devices, precisions, kernels, waits, and the memory plan.

Two layers stand for all: each does the same. The presets as they are follow among the slow tests.
"""

from __future__ import annotations

from typing import Any

import pytest

TWO = "model.num_hidden_layers=2"
MASKED, MUON, PURE = "data.mask_documents=true", "optimizer.name=muon", "training.precision=bf16-pure"
FAST = [
    ("H100", "smollm2-135m", [TWO]),
    ("H100", "smollm2-135m", [TWO, MASKED, MUON]),
    ("4090", "smollm2-135m", [TWO, PURE]),
    ("4090", "smollm2-135m", [TWO, MASKED, "training.precision=fp32"]),
    ("4090", "smollm2-135m", [TWO, "training.precision=fp32-high", "training.z_loss=1e-4"]),
    ("H100", "smollm2-135m", [TWO, "training.loss=full", "training.micro_batch=2"]),
    ("H100", "seed-recreation", [TWO]),
    ("T4", "smollm2-135m", [TWO, MUON]),
    ("T4", "seed-recreation", [TWO]),
    ("T4", "pocket", []),
    ("T4", "seed-recipe", [TWO, "training.memory=3GB", "training.tokens_per_step=8192", "training.micro_batch=auto"]),
]
PRESETS = ("pocket", "seed-recipe", "seed-recreation", "smollm2-135m", "smollm2-360m", "smollm2-1.7b")
PRECISIONS = {"H100": ("bf16", "bf16-pure", "fp32", "fp32-high", "fp16"), "T4": ("fp16", "fp32")}


def check(seen: dict[str, Any]) -> None:
    """What holds for every step on every card."""
    what = {key: value for key, value in seen.items() if key != "reasons"}
    assert "error" not in seen, what
    assert not seen["elsewhere"], "parameters or moments that are not on the GPU"
    computed = {"bf16": "bfloat16", "bf16-pure": "bfloat16", "fp16": "float16"}.get(seen["precision"], "float32")
    assert seen["hidden"] == [f"torch.{computed}"], "the head computes in the precision of the hidden states"
    assert not seen["waits"], "nothing in a step makes the host wait for the GPU"
    assert sum(seen["to_host"].values()) == 1, "all figures of a step travel together"
    assert "math" not in seen["kernels"], "no attention keeps its scores"
    # Forward and backward of a layer, the loss of 8,192 tokens; for a tensor only bf16 with rounding does something.
    rounding = 80 * seen["tensors"] if seen["precision"] == "bf16-pure" else 0
    assert seen["operations"] < 300 + 160 * seen["layers"] + 35 * -(-seen["tokens"] // 8192) + rounding, what
    if not seen["recompute"] and seen["loss"] == "chunked":
        assert seen["saved"] == pytest.approx(seen["activations"], rel=0.1), what


@pytest.fixture(scope="module")
def seen(rehearse) -> list[dict[str, Any]]:
    """All of `FAST`, in one process: starting it takes longer than a step."""
    return rehearse([{"card": card, "preset": preset, "overrides": overrides} for card, preset, overrides in FAST])


@pytest.mark.parametrize("index", range(len(FAST)), ids=lambda i: "-".join([FAST[i][0], FAST[i][1], *FAST[i][2]]))
def test_a_step_on_a_card(seen, index) -> None:
    check(seen[index])


def test_attention_kernels(seen) -> None:
    found = [(step["attention"], step["kernels"]) for step in seen]
    assert found[0] == ("sdpa", {"flash": 2}) and found[1] == ("varlen", {}) and found[2] == ("sdpa", {"flash": 2})
    assert found[3] == found[4] == found[7] == ("expanded", {"efficient": 2})


def test_sixteen_bits_on_each_card(seen) -> None:
    assert [seen[i]["precision"] for i in (0, 2, 7, 9)] == ["bf16", "bf16-pure", "fp16", "fp16"]
    assert seen[0]["orthogonalized"] == [] and seen[1]["orthogonalized"] == ["torch.bfloat16"]
    assert seen[7]["orthogonalized"] == seen[9]["orthogonalized"] == ["torch.float16"]


@pytest.mark.parametrize(
    ("work", "result"), [({"rows": 64}, [64]), ({"rows": 1, "prompt": 256}, [1, 49_152])], ids=["decode", "read"]
)
def test_what_a_decoder_records(rehearse, work, result) -> None:
    """On the device, in what the card multiplies, with kernels that neither keep scores nor repeat the cache."""
    wanted = [{"card": card, "preset": "smollm2-135m", **work} for card in ("H100", "T4")]
    for seen, precision in zip(rehearse(wanted), ("bf16", "fp16"), strict=True):
        assert "error" not in seen, seen
        assert seen["cache"] == ("torch.bfloat16" if precision == "bf16" else "torch.float16")
        assert any(line.startswith(f"precision: {precision} (") for line in seen["decisions"])
        assert seen["kernels"] == {"efficient": seen["layers"]} and seen["result"] == result
        assert not seen["waits"] and not seen["to_host"] and seen["operations"] < 100 + 40 * seen["layers"], seen


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("card", PRECISIONS)
def test_every_preset_and_precision(rehearse, card, preset) -> None:
    muon = "optimizer.name=adamw" if preset == "pocket" else MUON
    pure = ["optimizer.name=adamw"]  # muon keeps its weights in fp32
    wanted = [[f"training.precision={name}", *(pure if name == "bf16-pure" else []), *([] if preset == "pocket" else ["training.micro_batch=1"])]
              for name in PRECISIONS[card]]  # fmt: skip
    wanted = [*wanted, [muon, *wanted[0]], ["training.micro_batch=1", "data.mask_documents=true"]]
    for step in rehearse([{"card": card, "preset": preset, "overrides": overrides} for overrides in wanted]):
        check(step)
