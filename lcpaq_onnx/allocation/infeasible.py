"""Why no plan meets the budgets: the ones in conflict, the least value of each that works, and what holds it up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from fractions import Fraction

from lcpaq_onnx.allocation.optimum import Caps, Effort, is_feasible, minimise
from lcpaq_onnx.allocation.problem import AllocationProblem, Column, MemoryStep, live_bytes
from lcpaq_onnx.allocation.programme import Programme
from lcpaq_onnx.budget import Budget
from lcpaq_onnx.errors import BudgetError

__all__ = ["InfeasibleError", "LeastBudget", "explain_infeasible"]

_NAMED = 5
_DIGITS = 4


@dataclass(frozen=True)
class LeastBudget:
    """The least ``budget`` (rounded up to four digits) that works beside the rest of the conflict.

    ``value`` is the exact least in the unit of ``column``; ``binding`` names the decisions with the largest parts of it
    that have no smaller format (at most five).
    """

    budget: Budget
    column: Column
    value: float
    binding: tuple[str, ...]


class InfeasibleError(BudgetError):
    """No legal plan meets the budgets. ``conflict`` cannot be met together; without any one of them the rest can."""

    def __init__(self, conflict: tuple[Budget, ...], least: tuple[LeastBudget, ...]) -> None:
        self.conflict = conflict
        self.least = least
        names = " and ".join(map(str, conflict))
        together = " together, though all but any one can" if len(conflict) > 1 else ""
        lines = [f"no plan meets {names}{together}"]
        for entry in least:
            others = [str(budget) for budget in conflict if budget.dimension != entry.budget.dimension]
            beside = f" with {' and '.join(others)}" if others else ""
            held = f"; held up by {', '.join(entry.binding)}" if entry.binding else ""
            lines.append(f"  the least {entry.budget.dimension} that works{beside} is {_exact(entry)}{held}")
        super().__init__("\n".join(lines), hint=" or ".join(str(entry.budget) for entry in least))


def explain_infeasible(programme: Programme, budgets: Sequence[Budget], effort: Effort) -> BudgetError:
    """The error to raise for ``budgets`` that no plan meets.

    The conflict is found by a deletion filter, so it is minimal; other conflicts may exist beside it.
    """
    problem = programme.problem
    if not is_feasible(programme, {}, effort):
        return BudgetError(
            "no assignment keeps the target's rules, whatever the budget",
            hint="allow more formats: the rules contradict each other for those allowed now",
        )
    conflict = tuple(budgets)
    for budget in budgets:
        rest = tuple(other for other in conflict if other != budget)
        if not is_feasible(programme, _caps(problem, rest), effort):
            conflict = rest
    return InfeasibleError(conflict, tuple(_least(programme, budget, conflict, effort) for budget in conflict))


def _least(programme: Programme, budget: Budget, conflict: Sequence[Budget], effort: Effort) -> LeastBudget:
    problem = programme.problem
    column = problem.cap(budget)[0]
    caps = _caps(problem, [other for other in conflict if other != budget])
    found = minimise(programme, column, caps, effort)
    assert found is not None, "the deletion filter left a conflict that is not minimal"
    works = _rounded_up(problem, budget, found.value)
    return LeastBudget(works, column, found.value, _binding(problem, column, found.assignment))


def _caps(problem: AllocationProblem, budgets: Sequence[Budget]) -> Caps:
    return dict(problem.cap(budget) for budget in budgets)


def _rounded_up(problem: AllocationProblem, budget: Budget, value: float) -> Budget:
    """``budget`` with the least limit of four digits whose cap is at least ``value``."""
    if budget.unit == "percent":
        limit = Decimal(repr(100 * math.sqrt(value)))
    elif budget.unit == "relative":
        whole = Fraction(problem.reference_of(budget.dimension))
        ratio = Fraction(value) / whole
        limit = Decimal(ratio.numerator) / Decimal(ratio.denominator)
    else:
        limit = Decimal(repr(value))
    if not limit:
        return Budget(budget.dimension, 0.0, budget.unit)
    step = Decimal(1).scaleb(limit.adjusted() - _DIGITS + 1)
    rounded = limit.quantize(step, rounding=ROUND_CEILING)
    # The decimal above may itself be rounded down in its last place.
    while problem.cap(Budget(budget.dimension, float(rounded), budget.unit))[1] < value:
        rounded += step
    return Budget(budget.dimension, float(rounded), budget.unit)


def _binding(problem: AllocationProblem, column: Column, assignment: dict[str, str]) -> tuple[str, ...]:
    shares = _shares(problem, column, assignment)
    fixed = {name: own for name, (own, least) in shares.items() if own > 0 and own <= least}
    ranked = sorted(fixed, key=lambda name: (-fixed[name], name))
    return tuple(f"{name} ({assignment[name]})" for name in ranked[:_NAMED])


def _shares(problem: AllocationProblem, column: Column, assignment: dict[str, str]) -> dict[str, tuple[float, float]]:
    """By decision: its part of ``column``, and the least part any of its options would have."""
    if column == "peak_memory_bytes":
        highest: MemoryStep = max(problem.memory_steps, key=lambda step: live_bytes(step, assignment))
        live = {name: dict(sizes) for name, sizes in highest.live}
        return {
            name: (
                sizes.get(assignment[name], 0),
                min(sizes.get(o.format, 0) for o in problem.decision_of[name].options),
            )
            for name, sizes in live.items()
        }
    return {
        decision.name: (
            float(getattr(problem.option_of[decision.name, assignment[decision.name]], column)),
            min(float(getattr(option, column)) for option in decision.options),
        )
        for decision in problem.decisions
    }


def _exact(entry: LeastBudget) -> str:
    if entry.column.endswith("bytes"):
        return f"{entry.budget.amount()} ({int(entry.value):,} bytes)"
    return entry.budget.amount()
