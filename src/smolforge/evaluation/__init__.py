"""Evaluate a model: its loss on text of any source, and its scores on lm-eval's tasks.

loss.py     loss, perplexity and bits per byte on a tokenized evaluation set, or on sources of text
tasks.py    tasks of lm-eval; needs the extra `eval`, so it is imported only when used
"""

from smolforge.evaluation.loss import EvalSlice, Score, evaluate, evaluate_runner, score_sources, tokenize_eval_set

__all__ = ["EvalSlice", "Score", "evaluate", "evaluate_runner", "score_sources", "tokenize_eval_set"]
