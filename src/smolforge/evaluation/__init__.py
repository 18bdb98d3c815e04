"""How good a model is: on text of any source, and on the tasks that others measure by.

loss.py      loss, perplexity and bits per byte on a frozen slice of documents
tasks.py     tasks of lm-eval, scored by our model; imported only where it is asked for, since it needs an extra
"""

from smolforge.evaluation.loss import EvalSlice, Score, evaluate, evaluate_runner, tokenize_eval_set

__all__ = ["EvalSlice", "Score", "evaluate", "evaluate_runner", "tokenize_eval_set"]
