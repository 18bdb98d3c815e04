"""Numbers as a person reads them: 1.2M, 2 min 41 s, 1.3 GiB; and hostile text made fit for a page.

A missing value (None or not finite) is "–" everywhere.
"""

from __future__ import annotations

import math
import re
from typing import Any

MISSING = "–"
_SUFFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
# Control characters have no place on a page, and lone surrogates (which JSON can spell) cannot be encoded.
_UNFIT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def clean(text: Any, limit: int | None = None) -> str:
    """`text` without what no page can show; longer than `limit` characters, its middle is left out."""
    shown = text if isinstance(text, str) else str(text)
    if limit is not None and len(shown) > limit:
        half = limit // 2
        shown = f"{shown[:half]} […{len(shown) - 2 * half:,} characters…] {shown[-half:]}"
    return _UNFIT.sub("\ufffd", shown.replace("\r\n", "\n"))


def known(value: float | None) -> bool:
    """Whether there is a finite number."""
    return value is not None and math.isfinite(value)


def number(value: float | None, digits: int = 4) -> str:
    """`digits` significant digits, plain where that is readable: 0.0030, 12.35, 1.2e-05."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    power = math.floor(math.log10(abs(value)))
    if -4 <= power < 6:
        return f"{value:,.{max(0, digits - 1 - power)}f}"
    return f"{value:.{max(0, digits - 2)}e}"


def count(value: float | None, digits: int = 3) -> str:
    """1234567 → 1.23M; numbers below a thousand stay as they are."""
    if value is None or not math.isfinite(value):
        return MISSING
    for index, (unit, suffix) in enumerate(_SUFFIXES):
        if abs(value) < unit:
            continue
        text = number(value / unit, digits)
        if text == "1,000" and index:  # 999,999 is 1M, not 1,000k
            unit, suffix = _SUFFIXES[index - 1]
            text = number(value / unit, digits)
        return (text.rstrip("0").rstrip(".") if "." in text else text) + suffix
    return f"{value:.0f}" if float(value).is_integer() else number(value, digits)


def whole(value: float | None) -> str:
    """1234567 → 1,234,567."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:,.0f}"


def duration(seconds: float | None) -> str:
    """The two largest units: 45 s, 2 min 41 s, 3 h 05 min, 2 d 4 h."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 10:
        return f"{seconds:.1f} s"
    total = round(seconds)
    days, hours, minutes, rest = total // 86400, total // 3600 % 24, total // 60 % 60, total % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    if minutes:
        return f"{minutes} min {rest:02d} s"
    return f"{rest} s"


def size(value: float | None) -> str:
    """Bytes in binary units: 512 MiB, 1.25 GiB."""
    if value is None or not math.isfinite(value):
        return MISSING
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if abs(value) >= 1024**power:
            return f"{number(value / 1024**power, 3)} {unit}"
    return f"{value:.0f} B"


def percent(share: float | None, digits: int = 1) -> str:
    """0.183 → 18.3%."""
    return MISSING if share is None or not math.isfinite(share) else f"{100 * share:.{digits}f}%"
