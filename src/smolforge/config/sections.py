"""The tree of a run's configuration: every key with its type, its default, its meaning, and what must fit together."""

from __future__ import annotations

import math
import re
from typing import Any, Literal

import yaml
from pydantic import ByteSize, Field, model_validator

from smolforge.config.values import Count, Section


class RopeScaling(Section):
    """Llama 3's scaling of the rotary frequencies, under Hugging Face's names: low ones are divided by `factor`."""

    rope_type: Literal["llama3"] = "llama3"
    factor: float = Field(gt=0)
    low_freq_factor: float = Field(gt=0)
    high_freq_factor: float = Field(gt=0)
    original_max_position_embeddings: Count = Field(ge=1)


class ModelConfig(Section):
    """The shape of the model, under Hugging Face's names. Defaults are SmolLM2-135M as released.

    Here is checked what holds for every architecture; what one of them needs besides, its record in
    `smolforge.model` checks when the model is built.
    """

    architecture: str = "llama"
    """`llama`, `qwen2`, `qwen3` and `smollm3` are transformers' models; `recreation` is the seed's own variant."""
    vocab_size: Count = Field(default=49152, ge=1)
    """Rows of the embedding; at least the tokenizer's vocabulary."""
    hidden_size: int = Field(default=576, ge=1)
    """Width of the residual stream."""
    intermediate_size: int = Field(default=1536, ge=1)
    """Width inside the MLP."""
    num_hidden_layers: int = Field(default=30, ge=1)
    """Blocks."""
    num_attention_heads: int = Field(default=9, ge=1)
    """Query heads."""
    num_key_value_heads: int = Field(default=3, ge=1)
    """Key and value heads; divides the query heads."""
    head_dim: int = Field(default_factory=lambda d: max(d["hidden_size"] // d["num_attention_heads"], 2), ge=2)
    """Width of one head; hidden_size / num_attention_heads unless given."""
    max_position_embeddings: Count = Field(default=8192, ge=1)
    """Longest context in tokens."""
    rope_theta: float = Field(default=100_000.0, gt=0)
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Llama 3's scaling of these frequencies: its keys in a config.json."""
    no_rope_layer_interval: int = Field(default=0, ge=0)
    """Layers whose number (from 1) it divides have no rotation (`smollm3`); 0 for none."""
    attention_bias: bool = False
    """Whether the projections of attention have biases."""
    mlp_bias: bool = False
    """Whether the projections of the MLP have biases."""
    rms_norm_eps: float = Field(default=1e-5, gt=0)
    """Added to the mean square before its root."""
    tie_word_embeddings: bool = True
    """Whether the head is the embedding itself."""
    initializer_range: float = Field(default_factory=lambda data: 1 / math.sqrt(data["hidden_size"]), gt=0)
    """Standard deviation of new weights; 1 / sqrt(hidden_size), SmolLM2's own, unless given."""

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        derived = ("head_dim", "initializer_range")
        return {key: value for key, value in values.items() if value is not None or key not in derived}

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.num_attention_heads % self.num_key_value_heads:
            shared = f"{self.num_attention_heads} query heads cannot be shared evenly by num_key_value_heads"
            right = "the first must be a multiple of the second"
            raise ValueError(f"num_attention_heads: {shared} {self.num_key_value_heads}; {right}")
        if "head_dim" not in self.model_fields_set and self.hidden_size % self.num_attention_heads:
            problem = f"{self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            raise ValueError(f"hidden_size: {problem}; change one of them or give head_dim")
        return self


class TrainTokenizer(Section):
    """A tokenizer to be trained on the run's own sources."""

    vocab_size: Count = Field(default=4096, ge=273)
    documents: Count = Field(default=4000, ge=1)
    """How many training documents to learn the merges from."""


class TokenizerConfig(Section):
    """`{train: {...}}`, the alternative to naming a directory or a Hub id."""

    train: TrainTokenizer


class DataConfig(Section):
    """Where text comes from and how it is dealt into batches."""

    sources: dict[str, float] = Field(default_factory=lambda: {"tales": 1.0}, min_length=1)
    """SRC: weight. A source is a file, folder, glob, URL, hf://…, OWNER/NAME:CONFIG or `tales`."""
    format: Literal["text", "chat", "preferences"] = "text"
    """Whether rows are texts, conversations, or two answers of which one is better (docs/finetuning.md)."""
    text_column: str = "text"
    """Column of a parquet, jsonl, csv or json source that holds the text."""
    loss_on: Literal["assistant", "all"] = "assistant"
    """chat only: learn what the assistant writes, or every token of a conversation."""
    too_long: Literal["skip", "truncate"] = "skip"
    """chat only: what happens to a conversation that is longer than a window."""
    separator: str | None = "<|endoftext|>"
    """Where a .txt file is split into documents; a file without it is one document."""
    on_error: Literal["fail", "skip"] = "fail"
    """A row that cannot be read: `fail` saves the run and stops, `skip` leaves the row out and counts it."""
    sequence_length: Count = Field(default=2048, ge=2)
    """Tokens that one sequence predicts; the context in training."""
    lanes: int = Field(default=16, ge=1)
    """Independent lanes that the order is dealt to; ranks share lanes where their number does not divide it."""
    holdout: float = Field(default=0.01, ge=0, lt=0.5)
    """Share of documents, chosen by a hash of their text, that training never sees."""
    seed: int = Field(default=0, ge=0)
    """Seed of the order of documents."""
    mask_documents: bool = False
    """Whether attention stops at document borders."""
    workers: int = Field(default=2, ge=0)
    """Background threads that read and tokenize ahead. Not part of the address of a batch."""
    prefetch: int = Field(default=4, ge=1)
    """Steps made ahead of the one that trains."""
    read_ahead: ByteSize = Field(default=ByteSize(256 << 20), ge=10**6)
    """Most bytes of fetched row groups held ahead."""
    cache: ByteSize = Field(default=ByteSize(2 << 30), ge=0)
    """Most bytes of fetched shards kept on disk; 0 turns the cache off."""
    patience: float = Field(default=900.0, ge=0)
    """Seconds that a silent network is tried again before the run saves and stops."""

    @model_validator(mode="after")
    def _weights(self) -> DataConfig:
        bad = {source: weight for source, weight in self.sources.items() if weight <= 0}
        if bad:
            raise ValueError(f"sources: weights must be above 0, but {bad}")
        return self


class LoraConfig(Section):
    """A low-rank adapter, under peft's names. Only tuning on chat data has one."""

    r: int = Field(default=0, ge=0)
    """Rank of the matrices that learn while the model's own stay as they are; 0 lets every weight learn."""
    lora_alpha: float = Field(default_factory=lambda data: 2.0 * data["r"], ge=0)
    """The adapter counts lora_alpha / r times; 2 r unless given."""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers it is put beside, such as [q_proj, v_proj]."""


class PreferenceConfig(Section):
    """How a model learns which of two answers is better (`data.format=preferences`)."""

    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """sigmoid is DPO (arXiv:2305.18290); ipo aims at a fixed margin (arXiv:2310.12036)."""
    beta: float = Field(default=0.1, gt=0)
    """How strongly the model is kept near the one that it starts from."""


class OptimizerConfig(Section):
    name: str = "adamw"
    """adamw, muon or adamw8bit (bitsandbytes and a CUDA device); new weights take muon unless it is given."""
    lr: float = Field(default=3e-3, gt=0)
    """Peak learning rate; unless given, it follows from size and tokens (new weights) or width (an adapter)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the running mean of the gradient, and of its square; follow from steps and batch unless given."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """muon only: decay of the running mean of the gradient of the layers' matrices. Follows from steps unless given."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Applied to matrices; norms are never decayed. Follows from peak, steps and epochs unless given."""
    groups: dict[str, dict[str, float]] = Field(default_factory=dict)
    """Regular expression over names: {lr: factor, weight_decay: value}, the first wins. Norms follow unless given."""

    @model_validator(mode="after")
    def _check(self) -> OptimizerConfig:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: both must lie in [0, 1), not {self.betas}")
        for pattern, values in self.groups.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"groups: {pattern!r} is not a valid regular expression: {error}") from None
            strange = set(values) - {"lr", "weight_decay"}
            if strange:
                raise ValueError(f"groups: {pattern!r} sets {sorted(strange)}; known: lr, weight_decay")
        return self


class ScheduleConfig(Section):
    name: Literal["wsd", "cosine", "onecycle", "constant"] = "wsd"
    """Shape of the learning rate over the run; a pure function of the step."""
    warmup: float = Field(default=0.02, ge=0)
    """Steps, or a share of the run where below 1."""
    decay: float = Field(default=0.2, ge=0)
    """wsd only: steps, or a share of the run where below 1; 0.7 for new weights where the section gives no key."""
    floor: float = Field(default=0.0, ge=0, le=1)
    """Last learning rate as a share of the peak (onecycle: of the first one)."""
    start: float = Field(default=0.04, gt=0, le=1)
    """onecycle only: first learning rate as a share of the peak."""
    anneal: Literal["linear", "cosine"] = "linear"
    """onecycle only: the shape of both flanks."""


PRECISIONS = Literal["auto", "fp32", "fp32-high", "bf16", "bf16-pure", "fp16"]


class TrainingConfig(Section):
    tokens_per_step: Count | None = Field(default=None, ge=1)
    """Global batch in tokens; follows from the length of the run unless given, and is fixed with it."""
    micro_batch: Count | Literal["auto"] = "auto"
    """Sequences in one forward pass of one rank."""
    steps: Count | None = Field(default=None, ge=1)
    """Length of the run in steps."""
    tokens: Count | None = Field(default=None, ge=1)
    """Length of the run in tokens, rounded up to whole steps; give one of the two."""
    epochs: float | None = Field(default=None, gt=0)
    """Length of the run in passes through the data, of text by an estimate; how many steps that is, is kept."""
    precision: PRECISIONS = "auto"
    """Numbers that the run computes in; auto takes bf16, fp16 or fp32 by what the device has."""
    compile: Literal["auto", "on", "off"] | bool = "auto"
    """torch.compile; auto compiles where the run is long enough to earn it back."""
    seed: int = Field(default=0, ge=0)
    """Seed of the new weights and of dropout."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of what attention and MLP add that is dropped in training; 0.1 where text is read many times."""
    ema: float = Field(default=0.0, ge=0)
    """Horizon of an average of the weights: steps, or a share of the run below 1; 0.1 where text is read many times."""
    grad_clip: float = Field(default=1.0, ge=0)
    """Largest global norm of the gradient; 0 turns clipping off."""
    z_loss: float = Field(default=0.0, ge=0)
    """Weight of the squared log normaliser in the loss."""
    parallel: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto"
    """How several processes share a run; auto shards where a copy of the model on each would not fit."""
    memory: ByteSize | Literal["auto"] = "auto"
    """Memory to stay within, 6GB (10**9 bytes each) or 6GiB (2**30); picks micro_batch and activation checkpointing."""
    loss: Literal["auto", "native", "chunked", "linear", "full"] = "auto"
    """How the loss is computed; auto chooses by device."""
    attention: Literal["auto", "native", "blocked", "sdpa", "sdpa-fp32", "flex", "expanded", "varlen"] = "auto"
    """Exact attention to train with; auto chooses by device and length."""
    rollbacks: int = Field(default=3, ge=0)
    """How often a run may go back to its last checkpoint after three non-finite steps in a row."""
    threads: int | None = Field(default=None, ge=1)
    """Threads of the matrix products on a CPU; unless given OMP_NUM_THREADS, or the cores that may be used."""

    @model_validator(mode="after")
    def _length(self) -> TrainingConfig:
        # Epochs stay beside the steps that they came to.
        given = [name for name in ("steps", "epochs") if getattr(self, name) is not None]
        if self.tokens is not None and given:
            raise ValueError(f"{given[0]}: give {given[0]} or tokens, not both")
        return self


class CheckpointConfig(Section):
    every: Count | None = Field(default=None, ge=1)
    """Steps between checkpoints; a tenth of the run unless given. The last step is always saved."""
    keep: int = Field(default=3, ge=1)
    """Newest checkpoints that stay."""
    keep_every: Count | None = Field(default=None, ge=1)
    """Every n-th step's checkpoint stays for good."""
    best: bool = True
    """The checkpoint with the best validation stays."""
    asynchronous: bool = True
    """Whether training goes on while the disk writes."""


class EvaluationConfig(Section):
    every: Count | None = Field(default=None, ge=1)
    """Steps between validations; a tenth of the run unless given."""
    tokens: Count = Field(default=65_536, ge=2)
    """Size of the frozen slice of held-out documents."""
    patience: int | None = Field(default=None, ge=1)
    """Validations without a lower held-out loss after which the run ends; it goes to its end unless given."""


THREE_PROMPTS = ("Once upon a time", "The future of artificial intelligence", "In the distant galaxy")


class SamplesConfig(Section):
    every: Count | None = Field(default=None, ge=1)
    """Steps between samples; a tenth of the run unless given."""
    prompts: list[str] = Field(default_factory=lambda: list(THREE_PROMPTS))
    """Continued at every sampling, always with the same settings."""
    max_tokens: Count = Field(default=100, ge=1)
    """Length of each continuation."""
    temperature: float = Field(default=0.8, ge=0)
    """Of the samples."""
    top_p: float = Field(default=0.9, gt=0, le=1)
    """Of the samples."""


class LoggingConfig(Section):
    every: Count = Field(default=10, ge=1)
    """Steps between rows of metrics.jsonl; the first and the last step always have one."""
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default_factory=lambda: ["tensorboard"])
    """Where else figures go; metrics.jsonl is always written."""
    project: str = "smolforge"
    """Name of the project at wandb and trackio."""


class RunConfig(Section):
    """Everything that decides a run."""

    preset: str | None = None
    """Name of the preset or file that the run began from."""
    model: ModelConfig = ModelConfig()
    tokenizer: str | TokenizerConfig = TokenizerConfig(train=TrainTokenizer())
    """A directory, a Hub id, or {train: {vocab_size: N}} to train one on the sources."""
    init: str | None = None
    """MODEL whose weights the run starts from; new weights unless given."""
    data: DataConfig = DataConfig()
    lora: LoraConfig = LoraConfig()
    preference: PreferenceConfig = PreferenceConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    training: TrainingConfig = TrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    samples: SamplesConfig = SamplesConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _fits(self) -> RunConfig:
        if self.data.sequence_length > self.model.max_position_embeddings:
            positions = f"{self.model.max_position_embeddings} positions (model.max_position_embeddings)"
            problem = f"{self.data.sequence_length} is longer than the model's {positions}"
            raise ValueError(f"data.sequence_length: {problem}")
        if self.lora.r and self.data.format == "text":
            raise ValueError("lora.r: an adapter learns from chat data (smolforge finetune); set it to 0")
        per_step = self.training.tokens_per_step
        if per_step is not None and per_step % self.data.sequence_length:
            problem = f"{per_step} is not a multiple of data.sequence_length {self.data.sequence_length}"
            raise ValueError(f"training.tokens_per_step: {problem}")
        return self

    @property
    def sequences_per_step(self) -> int:
        """Sequences in one global batch."""
        per_step = self.training.tokens_per_step
        return per_step // self.data.sequence_length if per_step else self.data.lanes

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one global batch."""
        return self.sequences_per_step * self.data.sequence_length

    @property
    def total_steps(self) -> int:
        """Length of the run in steps."""
        if self.training.steps is not None:
            return self.training.steps
        if self.training.tokens is not None:
            return max(1, math.ceil(self.training.tokens / self.tokens_per_step))
        return 1000

    def with_keys(self, section: str, **values: Any) -> RunConfig:
        """This configuration with other values of a section's keys, which count as given from then on."""
        return self.model_copy(update={section: getattr(self, section).model_copy(update=values)})

    def to_yaml(self) -> str:
        """The whole resolved configuration; reading it back gives an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)
