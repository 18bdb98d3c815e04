"""The page of a run, the comparison of runs, and the table and page of a sweep.

A run writes rows to metrics.jsonl; this package reads them at any moment of the run, and writes one HTML file that
opens without a network. The numbers travel in the page as one JSON object, thinned to what a screen can show, and
uPlot (unmodified, in static/) draws them. Everything that a run wrote is untrusted: it is escaped, cut and cleaned.

Read in this order:

    history.py   read what a run has logged, as columns, and summarize it
    charts.py    the data of charts: smoothing, thinning, ranges, one JSON object
    page.py      RUN/report.html
    compare.py   several runs as a table and as a page
    sweep.py     the candidates of a sweep as a table and as a page

templates/charts.js gives the data to uPlot; templates/*.html are the pages.
"""

from smolforge.report.compare import compare, comparison, write_comparison
from smolforge.report.history import read_history, summarize
from smolforge.report.page import write_report

__all__ = ["compare", "comparison", "read_history", "summarize", "write_comparison", "write_report"]
