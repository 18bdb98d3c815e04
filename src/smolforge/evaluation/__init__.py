"""How good a model is: on text of any source, and on the tasks that others measure by.

scores.py    loss, perplexity and bits per byte on a frozen slice of documents
harness.py   tasks of lm-eval, scored by our model; imported only where it is asked for, since it needs an extra
"""

from smolforge.evaluation.scores import Score, Slice, evaluate, evaluate_runner, freeze

__all__ = ["Score", "Slice", "evaluate", "evaluate_runner", "freeze"]
