"""Parse and format large numbers with units: 300B tokens, 80 GB, 3.1 days."""

from __future__ import annotations

import math
import re

from mygpt.errors import InputError

_COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
_BYTES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_NUMBER = r"(\d[\d_,]*(?:\.\d+)?(?:[eE]\+?\d+)?)"
_MOST = 10**18


def parse_count(name: str, text: str) -> int:
    """Parse a number such as 10M, 2.5B, 1T, 3e11 or 300_000.

    Raises:
        InputError: naming the option, where `text` is not a number or is below 1.
    """
    found = re.fullmatch(_NUMBER + r"\s*([KMBGT]?)", text.strip(), re.IGNORECASE)
    if found is None:
        raise InputError(f"{name}={text!r} must be a number such as 300000, 10M, 2.5B or 1T")
    return _checked(name, text, _number(found[1]) * _COUNTS[found[2].upper()])


def parse_bytes(name: str, text: str) -> int:
    """Parse a size such as 80GB (10^9 each), 80GiB (2^30 each) or a number of bytes.

    Raises:
        InputError: naming the option, where `text` is not a size or is below 1.
    """
    found = re.fullmatch(_NUMBER + r"\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if found is None or (found[3] and not found[2]):
        raise InputError(f"{name}={text!r} must be a size such as 80GB, 80GiB or 512MB")
    units = _BINARY if found[3] else _BYTES
    return _checked(name, text, _number(found[1]) * units[found[2].upper()])


def _number(text: str) -> float:
    return float(text.replace("_", "").replace(",", ""))


def _checked(name: str, text: str, value: float) -> int:
    if not 1 <= value <= _MOST:
        raise InputError(f"{name}={text!r} must be at least 1 and at most {_MOST:.0e}")
    return round(value)


def count_text(value: float) -> str:
    """Format a number with three digits: 124M, 2.5B, 1.4T."""
    return _scaled(value, ("", "K", "M", "B", "T"), "")


def bytes_text(value: float) -> str:
    """Format bytes with three digits and decimal units: 498 MB, 2.09 TB."""
    return _scaled(value, ("B", "KB", "MB", "GB", "TB", "PB"), " ")


def _scaled(value: float, units: tuple[str, ...], gap: str) -> str:
    at = 0
    while abs(value) >= 999.5 and at < len(units) - 1:
        value, at = value / 1000, at + 1
    digits = 0 if at == 0 or abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    shown = f"{value:,.{digits}f}"
    if not gap and "." in shown:
        shown = shown.rstrip("0").rstrip(".")
    return f"{shown}{gap}{units[at]}"


def flops_text(value: float) -> str:
    """Format a number of operations: 3.14e23."""
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def rate_text(flops_per_s: float) -> str:
    """Format operations per second: 69.6 GFLOP/s, 125 TFLOP/s."""
    return _scaled(flops_per_s, ("FLOP/s", "kFLOP/s", "MFLOP/s", "GFLOP/s", "TFLOP/s"), " ")


def duration_text(seconds: float) -> str:
    """Format a duration in a unit of its size: 41 s, 12 minutes, 5.2 hours, 34 days, 310 years."""
    if not math.isfinite(seconds):
        return "for ever"
    for unit, size in (("years", 31_557_600), ("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            count = seconds / size
            return f"{count:,.0f} {unit}" if count >= 99.5 else f"{count:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
