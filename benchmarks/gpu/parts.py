"""The parts of `first_day.py`, one to a process: python parts.py PART TARGET.json DEVICE [--rehearse].

A part adds rows to its table; each row is on disk before the next is measured. A row that fails says why in its column
`failure`, and the part goes on; its exit code is then 1.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "src"), str(Path(__file__).parent)]

# ruff: noqa: E402 (the package is found through the line above)
from smolforge.config import build_config
from smolforge.devices import choose_device, device_name, half_precision, known_peak_flops
from smolforge.distributed import DistributedContext
from smolforge.metrics_log import read_metrics
from smolforge.model import attention
from smolforge.model.architecture import build_model
from smolforge.model.documents import document_mask
from smolforge.model.loss import chunked_loss, full_loss
from smolforge.model.summary import flops_per_token
from smolforge.run import Run
from smolforge.training.optim import build_optimizer
from smolforge.training.optim.adamw import round_stochastically
from smolforge.training.optim.muon import orthogonalize
from smolforge.training.plan import make_plan, planned_memory
from smolforge.training.recorded import RecordedPasses
from smolforge.training.setup import TrainRequest, apply_plan
from smolforge.training.step import train_step
from smolforge.training.train import run_training

# A run of seconds; what is compared between devices and precisions.
RUN = """
model: {vocab_size: 280, hidden_size: 128, intermediate_size: 256, num_hidden_layers: 2, num_attention_heads: 4,
  num_key_value_heads: 2, max_position_embeddings: 256}
tokenizer: {train: {vocab_size: 280, documents: 100}}
data: {sequence_length: 128, lanes: 4, holdout: 0, workers: 1, mask_documents: true}
optimizer: {name: adamw, lr: 3.0e-3}
training: {tokens_per_step: 2048, micro_batch: 8, compile: "off", threads: 1}
samples: {prompts: []}
logging: {every: 1, trackers: []}
"""
SMALL = (
    "model.hidden_size=64", "model.num_attention_heads=4", "model.num_key_value_heads=2", "model.vocab_size=512",
    "model.intermediate_size=96", "model.num_hidden_layers=2", "training.threads=1",
)  # fmt: skip


class Part:
    """A part under way: where it runs, how large, and the table it fills."""

    def __init__(self, title: str, target: Path, device: torch.device, rehearsal: bool) -> None:
        self.title, self.target, self.device, self.rehearsal = title, target, device, rehearsal
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.failed = False

    def save(self) -> None:
        """Write what there is."""
        text = json.dumps({"title": self.title, "rows": self.rows, "notes": self.notes})
        self.target.with_suffix(".part").write_text(text)
        self.target.with_suffix(".part").replace(self.target)

    @contextlib.contextmanager
    def row(self, **known: Any) -> Iterator[dict[str, Any]]:
        """A row to fill in; an error inside is recorded in it."""
        row = dict(known)
        try:
            yield row
        except Exception as error:
            row["failure"] = f"{type(error).__name__}: {str(error).strip()[:200]}"
            self.failed = True
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        self.rows.append(row)
        self.save()

    def check(self, what: str, error: float, limit: float) -> None:
        """A row that passes where `error` is at most `limit`."""
        passed = error <= limit
        self.failed |= not passed
        self.rows.append({"check": what, "error": error, "limit": limit, "passed": "yes" if passed else "NO"})
        self.save()

    def seconds(self, job: Callable[[], Any], repetitions: int = 5) -> float:
        """Median of some timed repetitions after two that warm up."""
        times = []
        for number in range(2 + (1 if self.rehearsal else repetitions)):
            self.wait()
            began = time.perf_counter()
            job()
            self.wait()
            times += [time.perf_counter() - began] if number >= 2 else []
        return statistics.median(times)

    def wait(self) -> None:
        """Until the device has nothing to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def machine(part: Part) -> None:
    """What there is: card, driver, torch."""
    facts: dict[str, Any] = {"torch": torch.__version__, "device": device_name(part.device)}
    if part.device.type == "cuda":
        facts |= {
            "CUDA": torch.version.cuda, "capability": str(torch.cuda.get_device_capability(part.device)),
            "cuDNN": torch.backends.cudnn.version(), "peak TFLOP/s": (known_peak_flops(part.device) or 0) / 1e12,
            "varlen": attention.varlen_unavailable() or "available",
        }  # fmt: skip
    part.rows = [{"what": key, "value": value} for key, value in facts.items()]


def kernels(part: Part) -> None:
    """Numbers of each kernel against fp64 on the CPU."""
    device, half = part.device, half_precision(part.device)
    length, group = (64, 2) if part.rehearsal else (512, 3)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, length, 64, generator=generator) for heads in (3 * group, 3, 3))
    ids = torch.stack([torch.arange(length) // 50, torch.arange(length) // 37])
    for way in ("sdpa", "expanded", "varlen"):
        for documents in (None, ids):
            if documents is not None and way == "sdpa":
                continue  # flash takes no mask, so the plan never chooses it
            with part.row(check=f"attention {way}{'' if documents is None else ', packed documents'}") as row:
                row["error"] = max(_attention_errors(way, (q, k, v), documents, device, half))
                row["limit"], row["passed"] = 0.02, "yes" if row["error"] <= 0.02 else "NO"
                part.failed |= row["passed"] == "NO"
    hidden, weight = torch.randn(2048, 64, generator=generator).to(half), torch.randn(999, 64, generator=generator) / 8
    targets = torch.randint(999, (2048,), generator=generator)
    cpu, gradients = torch.device("cpu"), []
    for place, precision, compute in (
        (cpu, torch.float64, full_loss),
        (device, half, full_loss),
        (device, half, chunked_loss),
    ):
        w = weight.to(half).to(place, precision if precision == torch.float64 else torch.float32).requires_grad_()
        compute(hidden.to(place, precision), w, targets.to(place), scale=1 / 524_288)[0].mul(65_536).backward()
        assert w.grad is not None
        gradients.append(w.grad.double().cpu())
    exact, whole, chunks = gradients
    # In bf16 rounding costs any head more than a thousandth (docs/log.md); the chunks may add one.
    limit = 1e-3 if half == torch.float16 else _relative(whole, exact) + 1e-3
    part.check("gradient of the head", _relative(chunks, exact), limit)
    matrices = torch.randn(4, 96, 160, generator=generator)
    found = orthogonalize(matrices.to(device), half).double().cpu()
    part.check("Muon", _relative(found, orthogonalize(matrices).double()), 0.05)
    values, bits = (
        torch.randn(9999, generator=generator),
        torch.randint(-(2**31), 2**31, (9999,), generator=generator).int(),
    )
    rounded = [round_stochastically(values.to(place), bits.to(place)).cpu() for place in ("cpu", device)]
    part.check("stochastic rounding", float((rounded[0] != rounded[1]).sum()), 0)
    _check_sampling(part, generator)


def _attention_errors(
    way: str, tensors: Any, ids: Tensor | None, device: torch.device, half: torch.dtype
) -> list[float]:
    """Relative errors of output and gradients, against the mask in fp64."""
    found = []
    for name, place, dtype in (("sdpa", torch.device("cpu"), torch.float64), (way, device, half)):
        inputs = [x.to(half).to(place, dtype).requires_grad_() for x in tensors]
        mask = None if ids is None else document_mask(name, ids, place, dtype)
        out = attention.ATTENTION[name](*inputs, mask)
        out.square().sum().backward()
        found.append([x.double().cpu() for x in (out, *(x.grad for x in inputs)) if x is not None])
    return [_relative(mine, exact) for exact, mine in zip(*found, strict=True)]


def _relative(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def _check_sampling(part: Part, generator: torch.Generator) -> None:
    """A captured step against the same step run eagerly, and the sampler of a batch against the CPU's."""
    from smolforge.generation.runners import cuda

    config = build_config("smollm2-135m", list(SMALL)).model
    with torch.no_grad():
        runner = cuda.CudaRunner(build_model(config, seed=0, device=part.device), "bf16")
        runner._add_slots(8)
        inputs = runner._idle_inputs(8)
        inputs[cuda.TOKEN], inputs[cuda.POSITION] = torch.arange(8.0), torch.arange(8.0) * 9
        inputs[cuda.TEMPERATURE], inputs[cuda.TOP_P] = 0.8, 0.9
        inputs[cuda.UNIFORM] = torch.rand(8, generator=generator)
        inputs[cuda.REPETITION] = 1.0
        eager = runner._step(128, False, inputs.to(part.device)).cpu()
        for _ in range(3):  # the third is a graph
            graph = runner._decode(128, False, inputs).cpu()
        part.check("CUDA graph of a decoding step: tokens that differ", float((eager != graph).sum()), 0)
        logits, seen = torch.randn(8, 512, generator=generator) * 3, torch.zeros(8, 512, dtype=torch.bool)
        drawn = [
            cuda.sample_batch(logits.to(place), inputs.to(place), seen.to(place), seen.int().to(place)).cpu()
            for place in (torch.device("cpu"), part.device)
        ]
        part.check("sampling of a batch: tokens that differ", float((drawn[0] != drawn[1]).sum()), 0)


def _config(part: Part, micro: int, *overrides: str) -> Any:
    length = 64 if part.rehearsal else 2048
    size = SMALL if part.rehearsal else ()
    given = [
        f"data.sequence_length={length}",
        f"training.tokens_per_step={micro * length}",
        f"training.micro_batch={micro}",
    ]
    return build_config("smollm2-135m", [*given, *size, "training.compile=off", "training.steps=1000", *overrides])


def _time_step(part: Part, config: Any, *, graph: bool = True) -> dict[str, Any]:
    """Tokens/s, MFU and peak memory of one training step, as a CUDA graph where the plan has one and `graph` is set."""
    plan = make_plan(config, part.device, 1)
    apply_plan(plan)
    model = build_model(config.model, **plan.model_options)
    optimizer = build_optimizer(model, config.optimizer, update=plan.update)
    passes = RecordedPasses(model) if plan.graph and graph else None
    length, scaler = (
        config.data.sequence_length,
        torch.amp.GradScaler(part.device.type) if plan.precision.scaler else None,
    )
    tokens = torch.randint(config.model.vocab_size, (plan.sequences, length + 1), device=part.device)
    documents = (torch.arange(length + 1) // 300).expand(plan.sequences, -1) if config.data.mask_documents else None
    if part.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(part.device)

    def step() -> None:
        train_step(
            model, optimizer, plan, config, tokens, documents,
            lr=1e-4, ranks=DistributedContext(), scaler=scaler, passes=passes,
        )  # fmt: skip

    began = time.perf_counter()
    step()
    part.wait()
    first = time.perf_counter() - began
    seconds = part.seconds(step)
    speed = plan.sequences * length / seconds
    flops, peak = flops_per_token(config.model, length)["training"], known_peak_flops(part.device)
    held = torch.cuda.max_memory_allocated(part.device) if part.device.type == "cuda" else None
    planned = planned_memory(config, plan)
    planned_gb = (planned.total - planned.process) / 1e9
    return {
        "precision": plan.precision.name, "attention": plan.attention, "tokens/s": speed,
        "MFU %": 100 * speed * flops / peak if peak else None, "first step s": first,
        "graph": None if passes is None else "fails" if passes.calls.fails else "yes",
        "peak GB": held and held / 1e9, "planned GB": planned_gb,
    }  # fmt: skip


def speed(part: Part) -> None:
    """Training: micro-batches, precisions, compiled block and whole model; then attention and loss by themselves."""
    for micro, graph in itertools.product((2,) if part.rehearsal else (1, 4, 16, 32), (False, True)):
        with part.row(what=f"{'graph' if graph else 'eager'}, {micro} sequences") as row:
            row |= _time_step(part, _config(part, micro), graph=graph)
    _time_kernels(part)
    compiled, best = "training.compile=on", 2 if part.rehearsal else 16
    variants = {
        "adamw": ["optimizer.name=adamw"], "packed documents": ["data.mask_documents=true"], "compiled": [compiled],
        "fp32-high": ["training.precision=fp32-high"],
        "compiled, packed documents": ["data.mask_documents=true", compiled],
        "bf16-pure, compiled": ["optimizer.name=adamw", "training.precision=bf16-pure", compiled],
    }  # fmt: skip
    for name, overrides in variants.items():
        if not (part.rehearsal and compiled in overrides):
            with part.row(what=f"{name}, {best} sequences") as row:
                row |= _time_step(part, _config(part, best, *overrides))
    if not part.rehearsal:
        with part.row(what="compiled, 4 sequences") as row:
            row |= _time_step(part, _config(part, 4, compiled))
    part.notes.append(
        "MFU counts attention over all positions, the masked half too (PaLM), against the dense peak in 16 bits."
    )


def _cudnn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return attention.sdpa(q, k, v, mask)


def _time_kernels(part: Part) -> None:
    batch, length, rows, words = (2, 64, 256, 512) if part.rehearsal else (16, 2048, 32_768, 49_152)
    half, device = half_precision(part.device), part.device
    q, k, v = (torch.randn(batch, n, length, 64, device=device, dtype=half, requires_grad=True) for n in (9, 3, 3))
    ids = (torch.arange(length) // 300).expand(batch, -1)
    ways = [("sdpa", False), ("expanded", False), ("expanded", True), ("varlen", True)]
    if device.type == "cuda":
        ways.append(("cudnn", False))
    for way, masked in ways:
        mask = document_mask(way, ids, device, half) if masked else None
        with part.row(what=f"attention {way}{', packed documents' if masked else ''}, forward and backward") as row:
            attend = attention.ATTENTION.get(way, _cudnn)
            seconds = part.seconds(lambda attend=attend, mask=mask: attend(q, k, v, mask).sum().backward())
            row["ms"], row["TFLOP/s"] = 1e3 * seconds, 7 * batch * 9 * length**2 * 64 / seconds / 1e12  # causal half
    hidden = torch.randn(rows, 576, device=device, dtype=half, requires_grad=True)
    weight = torch.randn(words, 576, device=device, requires_grad=True)
    targets = torch.randint(words, (rows,), device=device)
    for chunk in (64,) if part.rehearsal else (1024, 4096, 8192, 16_384):
        with part.row(what=f"loss in chunks of {chunk}") as row:
            job = lambda chunk=chunk: chunked_loss(hidden, weight, targets, scale=1.0, chunk=chunk)[0].backward()  # noqa: E731
            row["ms"] = 1e3 * (seconds := part.seconds(job))
            row["TFLOP/s"] = 6 * rows * words * 576 / seconds / 1e12


def _train(part: Part, name: str, *overrides: str, device: str, kill_at: int | None = None) -> Run:
    """A run in this process; where `kill_at` is given in one of its own, killed without warning after that step."""
    folder = part.target.parent / "runs"
    folder.mkdir(exist_ok=True)
    base, text = folder / "run.yaml", folder / "text.jsonl"
    base.write_text(RUN)
    words = ["the", "river", "lamp", "stone", "bird", "walks", "sings", "over", "green", "seven", "quiet", "then"]
    chance = random.Random(0)
    documents = [" ".join(chance.choices(words, k=chance.randrange(20, 200))) for _ in range(2000)]
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    small = ["training.tokens_per_step=512", "training.micro_batch=2"] if part.rehearsal else []
    overrides = (*small, f'data.sources={{"{text}": 1.0}}', *overrides)
    run = Run(folder / name)
    os.environ["SMOLFORGE_DEVICE"] = device
    if kill_at is None:
        run_training(TrainRequest(str(base), overrides, out=run.path))
        return run
    settings = [word for override in overrides for word in ("--set", override)]
    command = [sys.executable, "-m", "smolforge", "train", str(base), "--out", str(run.path), *settings]
    process = subprocess.Popen(command, env=_environment())
    while process.poll() is None:
        if run.metrics_path.exists() and any(row["step"] >= kill_at for row in read_metrics(run)):
            process.kill()
        time.sleep(0.02)
    return run


def _environment() -> dict[str, str]:
    """This process's, with the package of this checkout before what else it finds."""
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _losses(run: Run) -> list[float]:
    return [row["loss"] for row in read_metrics(run) if "loss" in row]


def losses(part: Part) -> None:
    """The same run in each precision on the device, against fp32 on the CPU."""
    steps = 6 if part.rehearsal else 30
    names = ["fp32-high"] if part.rehearsal else ["fp32", "fp32-high"]
    if part.device.type == "cuda":
        names += ["fp16", "bf16", "bf16-pure"] if half_precision(part.device) == torch.bfloat16 else ["fp16"]
    exact = _losses(_train(part, "cpu", f"training.steps={steps}", "training.precision=fp32", device="cpu"))
    for name in names:
        with part.row(precision=name, device=str(part.device)) as row:
            options = (f"training.steps={steps}", f"training.precision={name}")
            found = _losses(_train(part, name, *options, device=str(part.device)))
            row["last loss"], row["on the CPU"] = found[-1], exact[-1]
            row["largest difference"] = max(abs(a - b) for a, b in zip(found, exact, strict=True))
            row["passed"] = "yes" if row["largest difference"] < (0.01 if name == "fp32" else 0.1) else "NO"
            part.failed |= row["passed"] == "NO"


def resume(part: Part) -> None:
    """A run that is killed and resumed, against one that is not: bitwise, or as near as two equal runs are."""
    steps, kill_at = (8, 5) if part.rehearsal else (40, 22)
    options = (f"training.steps={steps}", f"checkpoint.every={2 if part.rehearsal else 10}")
    device = str(part.device)
    weights = []
    for name in ("once", "again", "killed"):
        if name == "killed":
            _train(part, name, *options, device=device, kill_at=kill_at)
        run = _train(part, name, *options, device=device)
        weights.append((run.checkpoints_path / "last" / "model.safetensors").read_bytes())
    # Kernels that add in another order each time, as flash's backward pass may, differ between equal runs as well.
    part.rows.append({"what": "two equal runs", "bitwise": str(weights[0] == weights[1])})
    part.rows.append({"what": f"killed after step {kill_at} and resumed", "bitwise": str(weights[0] == weights[2])})
    part.failed = weights[0] == weights[1] != weights[2]


def memory(part: Part) -> None:
    """The plan's memory against what the device held."""
    cases = [
        ["training.micro_batch=8"],
        ["training.micro_batch=8", "data.mask_documents=true"],
        ["training.memory=8GB"],
    ]
    if part.rehearsal:
        cases = [["training.micro_batch=2"], ["training.memory=2GB", "training.micro_batch=auto"]]
    for overrides in cases:
        with part.row(what=" ".join(overrides)) as row:
            row |= _time_step(part, _config(part, 8 if not part.rehearsal else 2, *overrides))
            if row["peak GB"]:
                row["peak / planned"] = row["peak GB"] / row["planned GB"]
                row["passed"] = "yes" if 0.8 < row["peak / planned"] < 1.2 else "NO"
                part.failed |= row["passed"] == "NO"


def decoding(part: Part) -> None:
    """Decoding with 1 and 64 sequences, beside the read bandwidth."""
    from smolforge.generation import bench

    config = build_config("smollm2-135m", list(SMALL) if part.rehearsal else []).model
    os.environ["SMOLFORGE_DEVICE"] = str(part.device)
    batches, tokens = ((1, 4), 4) if part.rehearsal else ((1, 64), 64)
    module = build_model(config, seed=0)
    found = bench.measure(module, precisions=["bf16"], batches=batches, tokens=tokens, prompt=tokens, rounds=1)
    read = found["read_bytes_per_second"]
    cell = (
        2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    )  # bytes of a token in the cache
    weights = 2 * sum(p.numel() for p in module.parameters())
    for batch, rate in found["precisions"]["bf16"]["tokens_per_second"].items():
        bound = read / (weights / int(batch) + cell * (bench.PROMPT + tokens / 2))
        share = {"what its bandwidth allows": bound, "share": rate / bound}
        part.rows.append(
            {"sequences": batch, "tokens/s": rate, **share, "runner": found["precisions"]["bf16"]["runner"]}
        )
    part.notes.append(
        f"Read bandwidth {read / 1e9:,.0f} GB/s; a step reads the weights once, and each sequence its cache."
    )


class Floor(nn.Module):
    """A plain GPT of torch alone (the size of nanoGPT's 124M): what compiled code without a framework reaches."""

    def __init__(self, words: int, width: int, layers: int) -> None:
        super().__init__()
        self.embed, self.heads = nn.Embedding(words, width), width // 64
        self.layers = nn.ModuleList(
            nn.ModuleDict({
                "norm": nn.LayerNorm(width), "qkv": nn.Linear(width, 3 * width), "out": nn.Linear(width, width),
                "norm2": nn.LayerNorm(width), "up": nn.Linear(width, 4 * width), "down": nn.Linear(4 * width, width),
            }) for _ in range(layers)
        )  # fmt: skip
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            parts: Any = layer
            q, k, v = (
                t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in parts["qkv"](parts["norm"](x)).chunk(3, 2)
            )
            x = x + parts["out"](F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
            x = x + parts["down"](F.gelu(parts["up"](parts["norm2"](x))))
        return F.cross_entropy((self.norm(x) @ self.embed.weight.T).flatten(0, 1).float(), targets.flatten())


def peers(part: Part) -> None:
    """A compiled GPT of torch alone as a floor; transformers where it is installed, training and decoding."""
    words, width, layers, batch, length = (512, 64, 2, 2, 64) if part.rehearsal else (50_304, 768, 12, 8, 2048)
    half, peak = half_precision(part.device), known_peak_flops(part.device)
    ids = torch.randint(words, (batch, length + 1), device=part.device)

    def timed(forward: Callable[[], Tensor], model: nn.Module, flops: float) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def step() -> None:
            with torch.autocast(part.device.type, half):
                loss = forward()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        rate = batch * length / part.seconds(step)
        return {"tokens/s": rate, "MFU %": 100 * rate * flops / peak if peak else None}

    floor = Floor(words, width, layers).to(part.device)
    flops = 6 * sum(p.numel() for p in floor.parameters()) + 12 * layers * width * length
    for name, model in {
        "plain GPT-2 124M": floor,
        **({} if part.rehearsal else {"the same, compiled": torch.compile(floor)}),
    }.items():
        with part.row(what=name) as row:
            row |= timed(lambda model=model: model(ids[:, :-1], ids[:, 1:]), floor, flops)
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        part.notes.append("transformers is not installed.")
        return
    config = _config(part, batch).model
    shape = {key: getattr(config, key) for key in LlamaConfig().to_dict() if key in type(config).model_fields}
    theirs: Any = LlamaForCausalLM(LlamaConfig(**{**shape, "use_cache": False})).to(part.device)
    ids = ids.clamp(max=config.vocab_size - 1)
    with part.row(what="transformers, the model of `speed`") as row:
        row |= timed(lambda: theirs(ids, labels=ids).loss, theirs, flops_per_token(config, length)["training"])
    if part.device.type == "cuda":
        _decoding_peers(part)


def _decoding_peers(part: Part) -> None:
    import decoding as beside

    sys.path.insert(0, str(ROOT / "benchmarks" / "generation"))
    from compare import make_model

    workspace = part.target.parent / "compare"
    make_model(workspace, None)
    found = beside.measure(
        workspace / "hf", list(beside.NAMES[:2]), [1, 64], 2, "cuda", build_config("smollm2-135m").model.vocab_size
    )
    for name, row in found["peers"].items():
        rates = {f"tokens/s, {batch} sequences": rate for batch, rate in row["tokens_per_second"].items()}
        part.rows.append({"what": f"decoding, {name}", **rates})


def tests(part: Part) -> None:
    """The tests that concern the GPU, where pytest is installed."""
    files = [
        "tests/test_devices.py", "tests/gpu/test_graph.py", "tests/generation/test_cuda.py",
        "tests/generation/test_fused_decoding.py", "tests/model/test_attention.py", "tests/training/test_muon.py",
        "tests/model/test_loss.py",
    ]  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-v", "--durations=10", "-p", "no:cacheprovider"]
    command += files[:1] if part.rehearsal else files
    with (part.target.parent / "tests.txt").open("w+") as said:  # stays where the part is cut
        done = subprocess.run(command, cwd=ROOT, env=_environment(), stdout=said, stderr=said, check=False)
        said.seek(0)
        lines = said.read().strip().splitlines()
    part.rows = [{"what": line} for line in lines if line.startswith(("FAILED", "ERROR"))]
    part.rows.append({"what": lines[-1] if lines else f"exit code {done.returncode}"})
    missing = re.search(r"No module named '?(pytest|hypothesis|transformers)\b", "\n".join(lines))
    if missing:  # one of those that a machine need not have
        part.notes.append(f"Not run: {missing[1]} is not installed.")
    part.failed = bool(done.returncode) and not missing


PARTS = {
    "machine": machine, "kernels": kernels, "speed": speed, "losses": losses, "resume": resume, "memory": memory,
    "decoding": decoding, "peers": peers, "tests": tests,
}  # fmt: skip


def main() -> int:
    """Run one part; 1 where something in it failed."""
    name, target, device = sys.argv[1], Path(sys.argv[2]), choose_device(sys.argv[3])
    function = PARTS[name]
    part = Part((function.__doc__ or name).strip().rstrip("."), target.resolve(), device, "--rehearse" in sys.argv)
    try:
        function(part)
    finally:
        part.save()
    return int(part.failed)


if __name__ == "__main__":
    sys.exit(main())
