"""Patterns for the decimal texts of numbers between limits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from decimal import Decimal

__all__ = ["DIGITS", "integers", "reals", "tighter"]

DIGITS = 20
"""Digits of an integer that has no limits."""


def tighter(
    closed: float | None, opened: float | None, tighter: Callable[[Iterable[float]], float]
) -> tuple[float | None, bool]:
    """The limit that counts, and whether it is itself left out."""
    both = [one for one in (closed, opened) if one is not None]
    if not both:
        return None, False
    limit = tighter(both)
    return limit, opened is not None and limit == opened


def integers(low: int, high: int) -> list[str]:
    """Patterns for the decimal texts of 0 <= low..high."""
    parts: list[str] = []
    while low <= high:
        # The largest block of the form dddXXX (X: any digit) that begins at low.
        power = 0
        while (
            low % 10 ** (power + 1) == 0
            and low + 10 ** (power + 1) - 1 <= high
            and low >= 10 ** (power + 1)
        ):
            power += 1
        head, unit = low // 10**power, 10**power
        last = min(head // 10 * 10 + 9, (high + 1) // unit - 1)
        stem, first = str(head)[:-1], head % 10
        digit = f"[{first}-{last % 10}]" if last > head else str(first)
        rest = f"[0-9]{{{power}}}" if power else ""
        parts.append(stem + digit + rest)
        low = (last + 1) * unit
    return parts


def reals(low: Decimal, low_open: bool, high: Decimal | None, high_open: bool) -> list[str]:
    """Patterns for decimal fractions from ``low`` >= 0 to ``high``."""
    most = Decimal(10**DIGITS - 1) if high is None else high
    # What is rounded to a limit is not beyond it, so where that is left out digits are few.
    digits = (
        25 if not (low_open or high_open) else max(1, 15 - len(str(int(most if high else low))))
    )
    first, last = int(low), int(most)
    parts = []
    for whole in sorted({first, last}):
        least = _digits_after(low) if whole == first else None
        greatest = _digits_after(most) if whole == last and high is not None else None
        bare, more = _fraction(least, greatest, low_open, high_open, digits)
        if bare or more:
            some = rf"(\.({more})){'?' if bare else ''}" if more else ""
            parts.append(f"{whole}{some}")
    if last - first > 1:
        between = "|".join(integers(first + 1, last - 1))
        parts.append(rf"({between})(\.[0-9]{{1,{digits}}})?")
    return parts


def _digits_after(number: Decimal) -> str:
    """The digits after the point, without zeros at the end."""
    return f"{number:f}".partition(".")[2].rstrip("0")


def _fraction(
    low: str | None, high: str | None, low_open: bool, high_open: bool, left: int
) -> tuple[bool, str]:
    """Digits after a point, or after some of them, from ``low`` to ``high``: whether there may be
    none, and a pattern for one to ``left`` of them. None: no limit; "": so far they are equal."""
    if low == "" and not low_open:
        low = None
    if high == "":
        if high_open or low is not None:
            return False, ""
        return True, f"0{{1,{left}}}"
    if low is None and high is None:
        return True, f"[0-9]{{1,{left}}}"
    if low == "" and high is None:
        return False, f"0{{0,{left}}}[1-9][0-9]{{0,{left}}}"
    parts = []
    least, most = int((low or "0")[0]), int((high or "9")[0])
    for digit in range(least, most + 1):
        bare, more = _fraction(
            (low[1:] if digit == least else None) if low is not None else None,
            (high[1:] if digit == most else None) if high is not None else None,
            low_open, high_open, max(1, left - 1),
        )  # fmt: skip
        if more or bare:
            parts.append(f"{digit}" + (f"({more}){'?' if bare else ''}" if more else ""))
    return low is None, "|".join(parts)
