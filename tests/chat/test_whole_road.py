"""From nothing to a model that answers: docs/finetuning.md's commands, with a shorter pretraining."""

from __future__ import annotations

from pathlib import Path

import pytest

from smolforge import tales
from smolforge.cli import run as smolforge
from smolforge.generation.engine import Engine
from smolforge.generation.sampling_params import SamplingParams
from smolforge.metrics_log import read_metrics
from smolforge.run import Run


@pytest.mark.slow
def test_a_pocket_model_learns_to_answer_and_to_stop(tmp_path: Path) -> None:
    base, data, tuned = tmp_path / "pocket", tmp_path / "dialogues.jsonl", tmp_path / "pocket-chat"
    quiet = ["--set", "logging.trackers=[]"]
    assert (
        smolforge(
            [
                "train",
                "pocket",
                "--out",
                str(base),
                "--steps",
                "240",
                "--set",
                "evaluation.every=240",
                "--set",
                "samples.every=240",
                *quiet,
            ]
        )
        == 0
    )
    assert smolforge(["data", "write", str(data), "--documents", "400", "--chat"]) == 0
    assert smolforge(["finetune", str(base), "--data", str(data), "--out", str(tuned), "--lr", "2e-3", *quiet]) == 0
    scores = [row["validation"]["loss"] for row in read_metrics(Run(tuned)) if "validation" in row]
    assert scores[-1] < scores[0] - 0.3
    engine = Engine.from_pretrained(tuned)
    stories = [document for i in range(5000, 5060) if (document := tales.document(i)).seed_data == "tales_stories"]
    kinds = set()
    for document in stories[:12]:
        asked = engine.tokenizer.encode_chat([{"role": "user", "content": document.prompt}])
        outputs = list(engine.stream([asked], SamplingParams(max_tokens=150, temperature=0.0)))
        answer = "".join(output.text for output in outputs)
        assert answer.strip() and outputs[-1].finish_reason == "stop", answer
        # It is the kind of story that was asked for; that it tells of the hero by name takes a longer pretraining.
        kinds.add("galaxy" in document.prompt)
        assert ("galaxy" in answer) == ("galaxy" in document.prompt), (document.prompt, answer)
    assert kinds == {True, False}
