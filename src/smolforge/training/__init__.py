"""Training: from a request to a run on disk.

One step takes the next batch of the stream, runs its micro-batches through the model with the loss scaled by the tokens
of the global batch, sums the gradients over all ranks, clips them, and updates the weights. A loss or gradient that is
not finite skips the update. The learning rate is a function of the step alone, the batch of step N a function of data
and seed; so a run that was stopped, killed or moved to another number of ranks continues as if nothing had happened.

Everything that depends on the machine is decided before the first step, with a reason, in the plan. The plan goes to
the constructors of model and optimizer; nothing is changed afterwards.

In the order to read them:

    train.py           open, step, save, evaluate
    step.py            one step: micro-batches and the update
    recorded.py        its passes as CUDA graphs
    setup.py           from a request to configuration, data, tokenizer, model and optimizer
    prepare.py         what is decided and opened before there is a model
    dry_run.py         `smolforge train --dry-run`
    run_data.py        where the data of a run lies, and what happens where it moved or changed
    auto.py            size and length of a run that names no preset
    data_size.py       how much text there is, and how often the run reads it
    small_corpus.py    defaults where the text is read more than once
    finetuning.py      chat data: length in epochs, what is learned, held-out answers, ChatML for a base model
    run_model.py       the model of a run: new weights, those of `init`, an adapter beside them
    preferences.py     which of two answers is better: the reference, the loss, the held-out margin
    recipe.py          optimizer, peak, batch and decay of new weights, from their number and the tokens of the run
    precision.py       the numbers that a run computes in
    plan.py            device, precision, batch, memory and kernels, each with its reason
    parallel.py        copies (DDP) or shards (FSDP2) on several ranks, and whole tensors of shards
    forecast.py        a run before it begins: the plan, time, storage, cost and expected loss
    scaling_law.py     the expected loss from size and tokens, and what repeated text is worth
    launch.py          `--nproc`: several processes on this machine
    ranks.py           what the processes of a run must have in common
    apply_plan.py      threads and allocator of the process, the first compiled step
    optim/             optimizers, parameter groups, learning-rate schedules
    averaging.py       an exponential average of the weights
    checkpointing.py   the state in a checkpoint, restoring it, which checkpoints stay
    metrics.py         metrics of steps, validations, samples, outcome
    progress.py        tokens per second, the progress bar, a trace of a few steps
    sweep_file.py      what the file of `smolforge sweep` says
    trials.py          the trials of a sweep, each in a process of its own
    sweep.py           the rounds of a sweep, its table and its winner
    trackers.py        TensorBoard, wandb, trackio
    shutdown.py        signals and the time limit
    bench.py           `smolforge bench train`, and how long a step takes here
    api.py             `smolforge.train` for Python
"""
