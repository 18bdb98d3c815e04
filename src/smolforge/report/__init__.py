"""The page of a run, and runs laid over each other.

history.py   what a run has written so far, as columns
facts.py     what it comes down to: the numbers and the one sentence
curves.py    smoothing and thinning      axes.py  ticks       chart.py  one plot as inline SVG
stories.py   the samples through time    words.py numbers as a person reads them
page.py      RUN/report.html             compare.py  several runs, as a table and as a page
"""

from smolforge.report.compare import compare, comparison, write_comparison
from smolforge.report.facts import Facts, facts_of
from smolforge.report.history import History, read_history
from smolforge.report.page import write_report

__all__ = [
    "Facts",
    "History",
    "compare",
    "comparison",
    "facts_of",
    "read_history",
    "write_comparison",
    "write_report",
]
