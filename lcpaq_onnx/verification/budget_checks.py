"""Were the plan's budgets met: as predicted, and where it can be told, as measured."""

from __future__ import annotations

import math
from fractions import Fraction

from lcpaq_onnx.budget import Budget
from lcpaq_onnx.planning.plan import Plan, Predicted
from lcpaq_onnx.verification.report import BitSummary, Check, Totals

__all__ = ["budget_checks"]

# Predicted totals are sums in floating point.
_SLACK = 1e-9


def budget_checks(plan: Plan, measured: Totals, speedup: float | None, bits: BitSummary | None) -> list[Check]:
    """One check for each budget. Size, bits and error must hold as predicted and as measured; a latency budget as
    predicted, since another machine than the target may have measured; bit operations and memory are predicted only.
    """
    return [_check(Budget.parse(text), plan.predicted, measured, speedup, bits) for text in plan.budgets]


def _check(
    budget: Budget, predicted: Predicted, measured: Totals, speedup: float | None, bits: BitSummary | None
) -> Check:
    if budget.dimension == "error":
        return _error(budget, predicted, measured)
    if budget.dimension == "bits":
        return _bits(budget, predicted, bits)
    seen, whole = {
        "size": (float(predicted.size_bytes), float(predicted.float_size_bytes)),
        "latency": (predicted.latency_us, predicted.float_latency_us),
        "bops": (predicted.bops, predicted.float_bops),
        "peak_memory": (float(predicted.peak_memory_bytes), float(predicted.float_peak_memory_bytes)),
    }[budget.dimension]
    limit = _limit(budget, whole)
    met = seen <= limit * (1 + _SLACK)
    detail = f"{budget}: predicted {_amount(budget, seen, whole)}"
    if budget.dimension == "size" and measured.size_bytes is not None:
        met = met and measured.size_bytes <= limit
        detail += f", measured {_amount(budget, measured.size_bytes, whole)}"
    if budget.dimension == "latency" and speedup is not None and measured.latency_us is not None:
        detail += f", measured here {1 / speedup:.2f}x, {measured.latency_us:,.0f} us (for information)"
    return Check(name=f"budget-{budget.dimension}", passed=met, detail=detail)


def _error(budget: Budget, predicted: Predicted, measured: Totals) -> Check:
    is_percent = budget.unit == "percent"
    factor = 100 if is_percent else 1
    predicted_error = predicted.relative_error if is_percent else predicted.loss
    promise = factor * (predicted_error or 0.0)
    met = promise <= budget.limit * (1 + _SLACK)
    unit = "%" if is_percent else ""
    detail = f"{budget}: predicted {promise:.3g}{unit}"
    found = measured.relative_error if is_percent else measured.loss
    if found is not None:
        met = met and factor * found <= budget.limit
        detail += f", measured {factor * found:.3g}{unit}"
    return Check(name="budget-error", passed=met, detail=detail)


def _bits(budget: Budget, predicted: Predicted, found: BitSummary | None) -> Check:
    """``found`` is counted from what stands in the file."""
    met = predicted.stored_bits <= budget.limit * (1 + _SLACK)
    detail = f"{budget}: predicted {predicted.stored_bits:.4g}"
    if found is not None:
        met = met and found.stored <= budget.limit * (1 + _SLACK)
        detail += f", measured {found.stored:.4g}"
    return Check(name="budget-bits", passed=met, detail=detail)


def _limit(budget: Budget, whole: float) -> float:
    """Largest value allowed, in bytes, µs or operations. Whole bytes, in exact decimals as the planner counts them."""
    limit = Fraction(repr(float(budget.limit))) * (Fraction(whole) if budget.unit == "relative" else 1)
    return float(math.floor(limit)) if budget.dimension in ("size", "peak_memory") else float(limit)


def _amount(budget: Budget, value: float, whole: float) -> str:
    if budget.unit == "relative":
        return f"{value / whole:.4g}x" if whole else "nothing to compare with"
    return Budget(budget.dimension, float(f"{value:.5g}")).amount()
