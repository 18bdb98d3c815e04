"""TRL's side of the comparison: tunes a model directory on an Alpaca file, and reports its speed as one JSON line.

    python peer.py full|lora MODEL FAQ EPOCHS

Needs `trl` and `peft`, and not smolforge.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig  # pyright: ignore[reportMissingImports]
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]


class Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *_: object, **__: object) -> None:
        self.times.append(time.perf_counter())


def main() -> None:
    """Tune."""
    kind, model, faq, epochs = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    rows = [json.loads(line) for line in faq.read_text(encoding="utf-8").splitlines()]
    made = [
        {
            "prompt": [{"role": "user", "content": row["instruction"]}],
            "completion": [{"role": "assistant", "content": row["output"]}],
        }
        for row in rows
    ]
    bf16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    clock = Clock()
    with tempfile.TemporaryDirectory() as place:
        config = SFTConfig(
            output_dir=place, num_train_epochs=epochs, per_device_train_batch_size=8, learning_rate=1e-4, use_cpu=True,
            bf16=bf16, report_to=[], save_strategy="no", logging_steps=1000, disable_tqdm=True, max_length=512,
            gradient_checkpointing=False, completion_only_loss=True, dataloader_pin_memory=False,
        )  # fmt: skip
        adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear") if kind == "lora" else None
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), args=config,
            train_dataset=Dataset.from_list(made), processing_class=AutoTokenizer.from_pretrained(model),
            peft_config=adapter, callbacks=[clock],
        )  # fmt: skip
        learned = 0
        for row in trainer.train_dataset:
            learned += sum(label != -100 for label in row["labels"]) if "labels" in row else sum(row["completion_mask"])
        trainer.train()
    steps = len(clock.times)
    seconds = (clock.times[-1] - clock.times[0]) * steps / (steps - 1)
    print(json.dumps({"steps": steps, "tokens_per_second": learned * epochs / seconds, "seconds": seconds}))


if __name__ == "__main__":
    main()
