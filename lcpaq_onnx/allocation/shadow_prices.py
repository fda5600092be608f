"""What a little more of each budget would buy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lcpaq_onnx.allocation.optimum import Caps, Effort, Optimum, minimise, relaxation
from lcpaq_onnx.allocation.problem import Column
from lcpaq_onnx.allocation.programme import Programme
from lcpaq_onnx.budget import Budget
from lcpaq_onnx.errors import BudgetError

__all__ = ["ShadowPrice", "shadow_prices"]

# Relaxing by a twentieth is small beside the budget and large beside the steps between plans.
_RELAXED_BY = 0.05
# The second solve ends at either; what it has found by then is a plan, so the price is never overstated.
_GAP = 5e-3
_NODES = 50
# A budget used to less than this, and without a price in the linear relaxation, is not worth a second solve.
_USED = 0.95
# Column of the budget → unit of ``per_unit``, in the column's unit.
_PER: dict[Column, tuple[str, float]] = {
    "size_bytes": ("MB", 1e6),
    "peak_memory_bytes": ("MB", 1e6),
    "latency_us": ("ms", 1e3),
    "bops": ("Gop", 1e9),
    "stored_bits": ("bit", 1.0),
    "squared_error": ("%", 1.0),
    "loss": ("loss", 1.0),
}
_OBJECTIVE: dict[Column, tuple[str, str]] = {
    "loss": ("error", "loss"),
    "latency_us": ("latency", "us"),
    "size_bytes": ("size", "bytes"),
    "bops": ("bops", "ops"),
    "stored_bits": ("bits", "bits"),
    "peak_memory_bytes": ("peak memory", "bytes"),
    "squared_error": ("error", "squared error"),
}


@dataclass(frozen=True)
class ShadowPrice:
    """Price of one budget.

    ``per_unit`` is the first objective's fall per unit of budget in the linear relaxation, in ``unit`` (``loss/MB``).
    ``text`` says what a definite increase buys, from solving again: ``+100KB size buys −8.1 % error``. Above 100
    decisions it is the relaxation that is solved again: ``about −8.1 %``.
    """

    budget: Budget
    per_unit: float
    unit: str
    text: str


def shadow_prices(
    programme: Programme, budgets: Sequence[Budget], goal: Column, found: Optimum, effort: Effort
) -> tuple[ShadowPrice, ...]:
    """One price per budget for the optimum ``found`` of ``goal`` under all of them."""
    return tuple(_price(programme, budget, budgets, goal, found, effort) for budget in budgets)


def _price(
    programme: Programme, budget: Budget, budgets: Sequence[Budget], goal: Column, found: Optimum, effort: Effort
) -> ShadowPrice:
    problem = programme.problem
    column, cap = problem.cap(budget)
    per_name, per_factor = _PER[column]
    slope = 0.0 if found.relaxed is None else max(0.0, -found.relaxed.slopes.get(column, 0.0) * per_factor)
    if budget.unit == "percent":
        slope = slope * 2 * budget.limit / 1e4  # d(p/100)²/dp
    step, more_cap = _increased(budget, column, cap)
    objective_name, objective_unit = _OBJECTIVE[goal]
    unit = f"{objective_unit}/{per_name}"
    more = f"+{step.amount()} {budget.dimension.replace('_', ' ')} buys"
    if slope == 0 and float(getattr(found.totals, column)) < _USED * cap:
        return ShadowPrice(budget, 0.0, unit, f"{more} nothing: the budget is not used up")
    caps = dict(problem.cap(other) for other in budgets) | {column: more_cap}
    if effort.relative_gap > 0:  # so many decisions that the relaxation is as near, and another solve takes seconds
        about, gained = "about ", _relaxed_gain(programme, goal, caps, found, effort)
    else:
        about, gained = "", _gain(programme, goal, caps, found, effort)
    if gained < 0.05:
        return ShadowPrice(budget, slope, unit, f"{more} nothing")
    return ShadowPrice(budget, slope, unit, f"{more} {about}−{gained:.{0 if gained >= 10 else 1}f} % {objective_name}")


def _gain(programme: Programme, goal: Column, caps: Caps, found: Optimum, effort: Effort) -> float:
    """Percent by which the plan under ``caps`` is better."""
    try:
        better = minimise(programme, goal, caps, replace(effort, relative_gap=_GAP, nodes=_NODES), start=found)
    except BudgetError:  # out of time; the price in the linear relaxation stands
        return 0.0
    return 0.0 if better is None or not found.value else 100 * (found.value - better.value) / found.value


def _relaxed_gain(programme: Programme, goal: Column, caps: Caps, found: Optimum, effort: Effort) -> float:
    better = relaxation(programme, goal, caps, effort)
    if better is None or found.relaxed is None or not found.relaxed.value:
        return 0.0
    return 100 * (found.relaxed.value - better.value) / found.relaxed.value


def _increased(budget: Budget, column: Column, cap: float) -> tuple[Budget, float]:
    """A twentieth of the limit rounded to one digit, as a budget of its own, and the cap with it added."""
    if budget.unit == "percent":
        step = float(f"{budget.limit * _RELAXED_BY:.0e}")
        return Budget(budget.dimension, step, "percent"), ((budget.limit + step) / 100) ** 2
    step = float(f"{cap * _RELAXED_BY:.0e}")
    if column.endswith("bytes"):
        step = max(round(step), 1)
    return Budget(budget.dimension, step), cap + step
