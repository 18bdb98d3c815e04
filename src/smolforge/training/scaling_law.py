"""What a run is expected to learn, from the model's size and the tokens it reads.

The form is that of Hoffmann et al. 2022 (arXiv:2203.15556): E + A / N^alpha + B / D^beta. Its constants are fitted by
`benchmarks/learning/scaling.py` to runs of ours and to SmolLM2-135M itself (docs/recipes.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Fit:
    """Constants of E + A / N^alpha + B / D^beta in bits per byte."""

    alpha: float
    beta: float
    e: float
    a: float
    b: float

    def bits(self, parameters: float, tokens: float) -> float:
        """Held-out bits per byte after so many tokens; `parameters` without embeddings."""
        return self.e + self.a / parameters**self.alpha + self.b / tokens**self.beta


FIT = Fit(0.34, 0.21, 1.1218, 11.449, 14.571)
ERROR = 0.042  # largest miss of a run that the fit did not see, relative to its bits per byte
REPEATED = 15.39  # epochs after the first whose worth is 1 - 1/e of their number (Muennighoff et al. 2023)


def worth(tokens: float, epochs: float) -> float:
    """New tokens that teach as much as `tokens` of a text that is read `epochs` times (arXiv:2305.16264, eq. 5)."""
    once = tokens / max(epochs, 1)
    return once * (1 + REPEATED * (1 - math.exp(-(max(epochs, 1) - 1) / REPEATED)))


def expected_bits(parameters: float, tokens: float) -> tuple[float, float]:
    """Held-out bits per byte of English prose, and its error; after so many tokens of new text, as `Fit.bits`."""
    bits = FIT.bits(parameters, tokens)
    return bits, ERROR * bits
