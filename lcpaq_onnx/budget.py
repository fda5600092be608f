"""Budgets: one limit each on what a plan may cost. Text form ``size<=2.5MB``, ``latency<=0.6x``, ``error<=1%``.

Units are decimal (KB = 1000 bytes, MB, GB), as file managers and flash data sheets count; KiB, MiB and GiB are the
powers of 1024. ``x`` is relative to the FP32 model. ``bits<=4`` limits the mean width that the weights are stored in; a
float one counts 32, scales are not counted. The error budget has two forms: ``1%`` limits the root mean square error
as a part of the output's scale, a plain number limits the teacher loss (KL in nats, or normalised squared error).
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal, get_args

from lcpaq_onnx.errors import UsageError

__all__ = ["Budget", "BudgetUnit", "Dimension", "check_distinct", "parse_budgets"]

Dimension = Literal["size", "latency", "bops", "peak_memory", "bits", "error"]
BudgetUnit = Literal["absolute", "relative", "percent"]

_TEXT = re.compile(
    r"\s*(?P<dimension>[^<>=\s]+)\s*<=\s*(?P<number>(\d+\.?\d*|\.\d+)(e[+-]?\d+)?)\s*(?P<unit>\S*)\s*", re.I
)
# Other dimensions: absolute and relative.
_ALLOWED: dict[str, tuple[BudgetUnit, ...]] = {"bits": ("absolute",), "error": ("absolute", "percent")}
_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
# Absolute units by dimension, in capitals: a unit is read without regard to case. Base units: bytes, µs, operations.
_UNITS: dict[str, dict[str, int]] = {
    "size": _BYTES,
    "latency": {"US": 1, "µS".upper(): 1, "MS": 10**3, "S": 10**6},
    "bops": {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12},
    "peak_memory": _BYTES,
    "bits": {"": 1},
    "error": {"": 1},
}
# What `str` prints: the largest of these that is not above the limit.
_PRINTED: dict[str, tuple[tuple[str, int], ...]] = {
    "size": (("GB", 10**9), ("MB", 10**6), ("KB", 10**3), ("B", 1)),
    "latency": (("s", 10**6), ("ms", 10**3), ("us", 1)),
    "bops": (("T", 10**12), ("G", 10**9), ("M", 10**6), ("K", 10**3), ("", 1)),
    "peak_memory": (("GB", 10**9), ("MB", 10**6), ("KB", 10**3), ("B", 1)),
    "bits": (("", 1),),
    "error": (("", 1),),
}
_FORMS: dict[str, str] = {
    "size": "size<=2.5MB, size<=640KiB or size<=0.25x",
    "latency": "latency<=3.2ms, latency<=450us or latency<=0.6x",
    "bops": "bops<=1.2G, bops<=800M or bops<=0.1x",
    "peak_memory": "peak_memory<=512KB or peak_memory<=0.5x",
    "bits": "bits<=4 (mean stored width of the weights, float counts 32)",
    "error": "error<=1% (of the output's scale) or error<=0.05 (teacher loss)",
}


@dataclass(frozen=True)
class Budget:
    """One limit, inclusive.

    ``limit`` counts bytes (size, peak_memory), µs (latency), bit operations (bops), bits of a weight (bits) or teacher
    loss (error) when ``unit`` is ``absolute``; FP32 models when ``relative``; hundredths of the output's scale when
    ``percent``.
    Raises UsageError on a limit that is not a finite number >= 0, or a unit the dimension does not have.
    """

    dimension: Dimension
    limit: float
    unit: BudgetUnit = "absolute"

    def __post_init__(self) -> None:
        if self.dimension not in _UNITS:
            raise _unknown_dimension(self.dimension)
        if not (math.isfinite(self.limit) and self.limit >= 0):
            raise UsageError(
                f"{self.dimension} budget of {self.limit}", hint=f"use a finite number: {_FORMS[self.dimension]}"
            )
        if self.unit not in _ALLOWED.get(self.dimension, ("absolute", "relative")):
            raise UsageError(f"a {self.dimension} budget cannot be {self.unit}", hint=f"write {_FORMS[self.dimension]}")

    def __str__(self) -> str:
        return f"{self.dimension}<={self.amount()}"

    def amount(self) -> str:
        """The limit alone, with its unit: ``2.5MB``, ``0.25x``, ``1%``."""
        exact = Decimal(repr(float(self.limit)))
        if self.unit != "absolute":
            return _plain(exact) + {"relative": "x", "percent": "%"}[self.unit]
        printed = _PRINTED[self.dimension]
        name, factor = next(((n, f) for n, f in printed if self.limit >= f), printed[-1])
        return _plain(exact / factor) + name

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Inverse of ``str``; blanks around the parts and other units are accepted too. Raises UsageError otherwise."""
        match = _TEXT.fullmatch(text)
        if match is None:
            raise _malformed(text)
        dimension = _dimension(match["dimension"])
        unit = match["unit"]
        number = Decimal(match["number"])
        if unit in ("x", "X", "×"):
            return cls(dimension, float(number), "relative")
        if unit == "%":
            return cls(dimension, float(number), "percent")
        factor = _UNITS[dimension].get(unit.upper())
        if factor is None:
            what = f"has the unknown unit '{unit}'" if unit else "has no unit"
            raise UsageError(f"budget '{text.strip()}' {what}", hint=f"write {_FORMS[dimension]}")
        return cls(dimension, float(number * factor))


def parse_budgets(texts: Iterable[str]) -> tuple[Budget, ...]:
    """Parse each; raises UsageError on a malformed one or when two limit the same dimension."""
    budgets = tuple(Budget.parse(text) for text in texts)
    check_distinct(budgets)
    return budgets


def check_distinct(budgets: Iterable[Budget]) -> None:
    """Raise UsageError when two budgets limit the same dimension."""
    seen: dict[str, Budget] = {}
    for budget in budgets:
        if budget.dimension in seen:
            raise UsageError(
                f"two budgets for {budget.dimension}: {seen[budget.dimension]} and {budget}",
                hint="keep the tighter one",
            )
        seen[budget.dimension] = budget


def _dimension(text: str) -> Dimension:
    for dimension in get_args(Dimension):
        if text.lower() == dimension:
            known: Dimension = dimension
            return known
    raise _unknown_dimension(text)


def _unknown_dimension(text: str) -> UsageError:
    near = difflib.get_close_matches(text.lower().replace("-", "_"), list(_UNITS), n=1, cutoff=0.5)
    hint = f"did you mean {_FORMS[near[0]]}?" if near else f"budgets are {'; '.join(_FORMS.values())}"
    return UsageError(f"'{text}' is not a budget's dimension", hint=hint)


def _malformed(text: str) -> UsageError:
    word = re.match(r"\s*([A-Za-z_-]+)", text)
    if word is not None and word[1].lower() not in _UNITS:
        return _unknown_dimension(word[1])
    forms = _FORMS[word[1].lower()] if word is not None else "; ".join(_FORMS.values())
    return UsageError(f"'{text.strip()}' is not a budget", hint=f"write {forms}")


def _plain(number: Decimal) -> str:
    """Shortest text without an exponent for everyday magnitudes (``str(Decimal('1E+2'))`` would be ``1E+2``)."""
    number = number.normalize()
    return f"{number:f}" if -12 <= number.adjusted() <= 15 else str(number)
