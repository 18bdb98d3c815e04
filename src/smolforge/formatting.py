"""Format numbers and settings for people (1.23M, 2 min 41 s, 1.3 GiB), and clean untrusted text.

A missing value (None, NaN or infinite) is shown as "–" everywhere.
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any, TypeGuard

MISSING = "–"
_SUFFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
# Control characters cannot be shown, and lone surrogates (which JSON can spell) cannot be encoded.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def clean(text: Any, limit: int | None = None) -> str:
    """`text` with unprintable characters replaced by U+FFFD; beyond `limit` characters its middle is left out."""
    shown = text if isinstance(text, str) else str(text)
    if limit is not None and len(shown) > limit:
        half = limit // 2
        shown = f"{shown[:half]} […{len(shown) - 2 * half:,} characters…] {shown[-half:]}"
    return _UNPRINTABLE.sub("\ufffd", shown.replace("\r\n", "\n"))


def for_stdout(text: str) -> str:
    """Text that a model wrote: as it is, but cleaned for a terminal, which would obey its control characters."""
    return clean(text) if sys.stdout.isatty() else text


def or_stdin(text: str) -> str:
    """A text that was typed, or that of stdin for "-", without the line end that it closes with."""
    return replace_lone_surrogates(sys.stdin.read().removesuffix("\n") if text == "-" else text)


def replace_lone_surrogates(text: str) -> str:
    """`text` with each lone surrogate, which JSON can spell and UTF-8 cannot encode, replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def is_known(value: float | None) -> TypeGuard[float]:
    """Whether `value` is a finite number."""
    return value is not None and math.isfinite(value)


def number(value: float | None, digits: int = 4) -> str:
    """`digits` significant digits: 0.003000, 12.35, 1.20e-05."""
    if not is_known(value):
        return MISSING
    if value == 0:
        return "0"
    power = math.floor(math.log10(abs(value)))
    if -4 <= power < 6:
        return f"{value:,.{max(0, digits - 1 - power)}f}"
    return f"{value:.{max(0, digits - 2)}e}"


def count(value: float | None, digits: int = 3) -> str:
    """1234567 → 1.23M; numbers below a thousand are not shortened."""
    if not is_known(value):
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
    return f"{value:,.0f}" if is_known(value) else MISSING


def typed(path: str | Path) -> str:
    """A path as typed from the current directory, where it lies below it; another name as it is."""
    return str(Path(path).relative_to(Path.cwd()) if Path(path).is_relative_to(Path.cwd()) else path)


def plural(count: int, noun: str, ending: str = "s") -> str:
    """1 file, 2 files, 3 processes."""
    return f"{count:,} {noun}{ending if count != 1 else ''}"


def duration(seconds: float | None) -> str:
    """The two largest units: 45 s, 2 min 41 s, 3 h 05 min, 2 d 4 h."""
    if not is_known(seconds):
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
    """Bytes in powers of 1024: 512 MiB, 1.25 GiB."""
    if not is_known(value):
        return MISSING
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if abs(value) >= 1024**power:
            return f"{number(value / 1024**power, 3)} {unit}"
    return f"{value:.0f} B"


def percent(share: float | None, digits: int = 1) -> str:
    """0.183 → 18.3%."""
    return f"{100 * share:.{digits}f}%" if is_known(share) else MISSING


def flatten(tree: dict[str, Any], limit: int = 400) -> dict[str, str]:
    """`{"section": {"key": value}}` as `{"section.key": "value"}`; what lies deeper is one value."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= {clean(f"{key}.{inner}", 200): setting(item) for inner, item in value.items()}
        else:
            flat[clean(key, 200)] = setting(value)
    return dict(list(flat.items())[:limit])


def setting(value: Any) -> str:
    """A value of a configuration: yes, 0.003, "a, b", "key: value, key: value"."""
    if value is None or value in ({}, []):
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int):
        return str(value) if abs(value) < 10**18 else "…"
    scalar = (str, int, float)
    if isinstance(value, (list, tuple)) and all(isinstance(item, scalar) for item in value):
        return clean(", ".join(map(setting, value[:50])), 600)
    if isinstance(value, dict) and all(isinstance(item, scalar) for item in value.values()):
        return clean(", ".join(f"{key}: {setting(item)}" for key, item in list(value.items())[:50]), 600)
    return clean(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)[:2000], 600)
