"""docs/seed.md: every row has a command, every command runs and shows what its row says, every number is true.

The commands run as they stand in the page, in a directory that has `runs/pocket`, beside a server that is the Hub:
Cosmopedia-v2 and cosmo2's tokenizer are asked for by name, through the real client. Only sizes are added to them.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import import_lightning
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from faults.server import FaultServer, as_hub
from serving_fixtures import serving
from smolforge import cli
from smolforge import config as configuration
from smolforge.checkpoint import locate
from smolforge.metrics_log import read_metrics
from smolforge.model.architecture import build_model
from smolforge.model.recreation import key_value_width
from smolforge.run import Run
from smolforge.tokenizer import Tokenizer
from smolforge.training.optim import schedule_factor as rate

PAGE = (Path(__file__).parents[2] / "docs" / "seed.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("| ").split(" | ")]
    for line in PAGE.partition("## Its recipe and ours")[0].splitlines()
    if line.startswith("| ") and not line.startswith("| the seed says")
]
COMMANDS = list(dict.fromkeys(row[-1].strip("`") for row in ROWS))
STEPS = 4
# A model and a run of a thousandth of the size; nothing of what the rows are about.
SIZES = {
    "model.hidden_size": 48, "model.intermediate_size": 64, "model.num_hidden_layers": 1, "model.vocab_size": 512,
    "model.num_attention_heads": 3, "model.num_key_value_heads": 3, "model.max_position_embeddings": 512,
    "data.sequence_length": 64, "data.lanes": 2, "training.tokens_per_step": 512, "training.steps": STEPS,
    "evaluation.tokens": 500, "samples.max_tokens": 4,
}  # fmt: skip
OWN_TOKENIZER = {"tokenizer.train.vocab_size": 512, "tokenizer.train.documents": 50}
# What a machine without CUDA refuses, by the field it names.
NEEDS_CUDA = {"training.precision=fp16": "training.precision", "optimizer.name=adamw8bit": "optimizer.name"}
SLOW = {"smolforge train smollm2-135m --set training.compile=on"}  # the compiler takes most of a minute


def words_of(command: str) -> list[str]:
    """The command's words, with the sizes set first, so that what it sets itself wins."""
    verb, *rest = shlex.split(command)[1:]
    if verb == "eval":
        return [verb, *rest, "--tokens", "1000"]
    if verb != "train" or any("runs/pocket" in word for word in rest):
        return [verb, *rest]
    sizes = {**SIZES, **(OWN_TOKENIZER if rest[0] == "pocket" else {})}
    return [verb, *(word for key, value in sizes.items() for word in ("--set", f"{key}={value}")), *rest]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, FaultServer]]:
    """A directory with runs/pocket and the seed's checkpoint, and a Hub with the seed's data and tokenizer."""
    folder = tmp_path_factory.mktemp("seed")
    with pytest.MonkeyPatch.context() as here, FaultServer() as hub:
        here.chdir(folder)
        assert cli.run(words_of("smolforge train pocket")) == 0
        tokenizer = folder / "runs" / "pocket" / "tokenizer"
        hub.push("HuggingFaceTB/cosmo2-tokenizer", {path.name: path.read_bytes() for path in tokenizer.iterdir()})
        texts = [f"Text {i} of a corpus that a machine wrote, for machines to learn from." for i in range(400)]
        shard = folder / "train.parquet"
        pq.write_table(pa.table({"prompt": texts, "text": texts}), shard, row_group_size=50)
        card = (
            "configs:\n- config_name: cosmopedia-v2\n  data_files:\n  - split: train\n    path: cosmopedia-v2/train-*\n"
        )
        hub.push(
            "HuggingFaceTB/smollm-corpus",
            {
                "README.md": f"---\n{card}---\n".encode(),
                "cosmopedia-v2/train-00000-of-00104.parquet": shard.read_bytes(),
            },
        )
        smaller = {"num_hidden_layers": 1, "vocab_size": Tokenizer.from_pretrained(tokenizer).vocab_size}
        model = build_model(configuration.build_config("seed-recreation").model.model_copy(update=smaller))
        state = {f"model._orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
        torch.save({"state_dict": state, "global_step": 2500}, folder / "seed.ckpt")
        yield folder, hub


@pytest.fixture
def place(home: tuple[Path, FaultServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the directory to run in; the server is the Hub of this process."""
    shutil.copytree(home[0], tmp_path / "place", symlinks=True)
    monkeypatch.chdir(tmp_path / "place")
    as_hub(home[1], monkeypatch, tmp_path / "hf")
    home[1].reset()
    return tmp_path / "place"


def test_every_row_has_four_cells_and_ends_in_a_command() -> None:
    assert len(ROWS) > 30
    for row in ROWS:
        assert len(row) == 4, row
        assert re.fullmatch(r"`(smolforge|python examples/seed/import_lightning.py) [^`]+`", row[3]), row[3]
        assert row[0] != "–" or row[1] != "–", "a row says something of the seed or of its code"


# What a command shows, by a part of it; every part that is in the command is looked at.
SHOWN: dict[str, Callable[[str, str], bool]] = {
    "summary smollm2-135m": lambda out, _: "134515008" in out.replace(",", ""),
    "summary seed-recipe": lambda out, _: "act_fn" in out or "gate_proj" in out,
    "summary seed-recreation": lambda out, _: "134411328" in out.replace(",", ""),
    "smollm2-135m --json": lambda out, _: (
        json.loads(out)["serving_memory"]["cache_per_token"]["bf16"] == 30 * (3 + 3) * 64 * 2
    ),
    "data which": lambda out, _: "tales" in out,
    "eval": lambda out, _: "bits per byte" in out and "entropy" in out,
    "generate": lambda out, _: all(prompt in out for prompt in configuration.THREE_PROMPTS),
    "verify": lambda out, _: f"step-{STEPS:08d}" in out,
    "to space": lambda out, _: Path("pocket-space/app.py").is_file(),
    "import_lightning.py seed.ckpt": lambda out, _: (
        "recreation at step 2,500" in out and locate.load_model("imported")[0] is not None
    ),
    "--steps +50": lambda out, err: f"resuming runs/pocket from step {STEPS}" in err and last_step() == STEPS + 50,
    "--resume": lambda out, err: "already has" in err and last_step() == STEPS,
    "--profile": lambda out, err: len(list(Path("runs/pocket/profile").glob("*.json.gz"))) == 1,
    "--steps 1": lambda out, err: last_step() == 1,
    "config.yaml": lambda out, err: losses("pocket-2") == losses("pocket") != [],
    "fp32-high": lambda out, err: "precision: fp32-high" in err,
    "compile=on": lambda out, err: "compile: on" in err,
    "length=256": lambda out, err: "sequences of 256" in err,
}


def losses(name: str) -> list[float]:
    return [row["loss"] for row in read_metrics(Run(f"runs/{name}")) if "loss" in row]


def last_step() -> int:
    """Of the run that was trained last."""
    newest = max(Path("runs").iterdir(), key=lambda path: (path / "metrics.jsonl").stat().st_mtime_ns)
    return max(row["step"] for row in read_metrics(Run(newest)) if "loss" in row)


@pytest.mark.parametrize("command", [pytest.param(c, marks=[pytest.mark.slow] * (c in SLOW)) for c in COMMANDS])
def test_the_command_runs(
    command: str, place: Path, home: tuple[Path, FaultServer], capsys: pytest.CaptureFixture[str]
) -> None:
    if " serve " in command:
        with serving(Path("runs/pocket")) as server:  # on a free port
            assert "page/static/main.js" in server.get("/").text
            assert server.stop(signal.SIGTERM) == 0
        return
    if " train pocket" in command:
        shutil.rmtree("runs/pocket")
    code = import_lightning.main(command.split()[2:]) if command.startswith("python ") else cli.run(words_of(command))
    out, err = capsys.readouterr()
    refused = (
        None if torch.cuda.is_available() else next((f for w, f in NEEDS_CUDA.items() if command.endswith(w)), None)
    )
    if refused:
        assert code == 2 and err.count("error: ") == 1 and refused in err
        return
    assert code == 0, err
    for part, shows in SHOWN.items():
        assert part not in command or shows(out, err), (part, out, err)
    if " train s" in command:  # a preset of the Hub
        asked = " ".join(request.path for request in home[1].requests)
        assert "HuggingFaceTB/smollm-corpus" in asked and "HuggingFaceTB/cosmo2-tokenizer" in asked
        assert "cosmopedia-v2/train-00000-of-00104.parquet" in asked and "held-out bits per byte" in err


def test_every_command_is_looked_at() -> None:
    looked = [*SHOWN, *NEEDS_CUDA, " serve ", " train s", " train pocket"]
    assert [command for command in COMMANDS if not any(part in command for part in looked)] == []


def test_numbers_of_the_page() -> None:
    config = configuration.build_config("seed-recreation")
    shape = config.model
    model = build_model(shape, device="meta", seed=None)
    narrow = key_value_width(shape)
    dead = sum(
        shape.num_attention_heads * (shape.head_dim - narrow) * shape.hidden_size * len(("q_proj", "o_proj"))
        for _ in model.decoder.layers
    )
    assert f"{dead:,} parameters, a tenth of the model" in PAGE
    assert 0.095 < dead / sum(p.numel() for p in model.parameters()) < 0.105
    assert f"columns {narrow + 1} to {shape.head_dim} of every query" in PAGE
    assert int(576 * 2.67) - 1 == shape.intermediate_size and shape.vocab_size == 3 * 2**14
    assert f"{rate(config.schedule, 2500, config.total_steps):.0%} of its peak" in PAGE
    assert f"{config.total_steps * config.tokens_per_step / 1e6:.1f}M tokens" in PAGE
    for prompt in configuration.THREE_PROMPTS:
        assert prompt in PAGE
