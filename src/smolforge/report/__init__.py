"""The page of a run, and runs laid over each other.

history.py   what a run has written so far, as columns
summary.py   what it comes down to: the numbers and the one sentence
curves.py    smoothing and thinning      axes.py  ticks       chart.py  one plot as inline SVG
samples.py   the samples through time    formatting.py numbers as a person reads them
page.py      RUN/report.html             compare.py  several runs, as a table and as a page
"""

from smolforge.report.compare import compare, comparison, write_comparison
from smolforge.report.history import History, read_history
from smolforge.report.page import write_report
from smolforge.report.summary import RunSummary, summarize

__all__ = [
    "History",
    "RunSummary",
    "compare",
    "comparison",
    "read_history",
    "summarize",
    "write_comparison",
    "write_report",
]
