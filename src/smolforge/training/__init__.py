"""Training: from a configuration to a run on disk.

    setup.py       everything decided before the first step, each decision with its reason
    loop.py        the steps: batch → loss → gradients → update, and when to log, evaluate, save or go back
    observer.py    what a run says of itself: figures, validations, samples
    state.py       what a checkpoint holds beside the model, and how a run goes on from it
    precision.py   schedules.py   optim.py   guard.py   signals.py   progress.py   trackers.py

One step is: the next batch of the stream, micro-batches through the model with the loss scaled by the tokens of the
whole global batch, gradients summed over ranks, clipped, and an update that a non-finite gradient skips on the
device. The learning rate is a pure function of the step.
"""
