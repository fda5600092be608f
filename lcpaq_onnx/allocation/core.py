"""The core of a large programme: the few options that a good plan may take, by the linear relaxation's reduced costs.

Among hundreds of decisions nearly all are settled by the relaxation. What is left is solved in a tenth of the time,
with all goals at once, and the relaxation proves how far the answer can be from the best (after Balas and Zemel, 1980).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lcpaq_onnx.allocation.milp import SCALE, Milp, relax, solve
from lcpaq_onnx.allocation.optimum import (
    Caps,
    Effort,
    Optimum,
    Relaxed,
    capped_by,
    meets,
    milp_of,
    relaxed_under,
    valued,
)
from lcpaq_onnx.allocation.problem import Column
from lcpaq_onnx.allocation.programme import Programme

__all__ = ["core_optimum"]

# Of the relaxation's value: options that surely cost more than this are left out. Twice as many take ten times as long.
_CORE = 5e-3
# Answers proven this well are taken. Tables of errors and times are known to a tenth at best.
_ACCEPTED_GAP = 0.03
# Of the goal before: a goal counts so little beside it that it decides between plans that are as good as equal.
_NEXT_GOAL = 1e-3
# Closed this far where it can be, so that later goals are settled too: to a thousandth, in units of their own.
_FINE_GAP = 1e-6
_FINE_DECISIONS = 1000
# Of the largest cost: less is the solver's rounding of nothing.
_NOTHING = 1e-9


def core_optimum(programme: Programme, goals: Sequence[Column], caps: Caps, effort: Effort) -> Optimum | None:
    """The best plan of the core, whose value of the first goal is proven within 3 %; later goals decide where the first
    differs by less than a thousandth. None where the core has no such plan: then the whole programme must be solved.
    """
    capped = capped_by(programme, caps)
    if capped is None or "peak_memory_bytes" in goals:
        return None
    first = goals[0]
    relaxed = relaxed_under(programme, first, capped, effort)
    if relaxed is None or relaxed.value <= _NOTHING * programme.costs[first].max(initial=0.0):
        return None
    whole = _with_later_goals(
        milp_of(programme, first, capped, SCALE / relaxed.value, np.inf), programme, goals[1:], relaxed
    )
    reduced_costs = relaxed.reduced_costs * (SCALE / relaxed.value)
    if len(goals) > 1:
        combined = relax(whole, effort.limits().seconds)
        if combined is None:
            return None
        reduced_costs = combined.reduced_costs
    upper = np.where(reduced_costs > _CORE * SCALE, 0.0, whole.upper)
    gap = _FINE_GAP if len(programme.problem.decisions) <= _FINE_DECISIONS else effort.relative_gap
    limits = effort.limits()
    # Half of the time: the rest is for the whole programme.
    outcome = solve(replace(whole, upper=upper), replace(limits, relative_gap=gap, seconds=limits.seconds / 2))
    if outcome.x is None or outcome.status != "optimal":
        return None
    found = valued(programme, first, programme.assignment(outcome.x))
    # A plan outside of the core is worse than its rim.
    within = min(outcome.bound / SCALE, 1 + _CORE) if len(goals) == 1 else 1.0
    bound = min(within * relaxed.value, found.value)
    if not meets(found.totals, caps) or found.value > (1 + _ACCEPTED_GAP) * bound:
        return None
    return replace(found, bound=bound, proved=True, relaxed=relaxed)


def _with_later_goals(milp: Milp, programme: Programme, goals: Sequence[Column], relaxed: Relaxed) -> Milp:
    """Minimise ``goals`` too, each in units of its value in the relaxation, a thousandth as much as the one before."""
    objective = milp.objective.copy()
    for position, goal in enumerate(goals, start=1):
        costs = programme.costs[goal]
        unit = float(costs @ relaxed.x) + programme.fixed[goal] or float(costs.max(initial=0.0)) or 1.0
        objective += costs * (SCALE * _NEXT_GOAL**position / unit)
    return replace(milp, objective=np.minimum(objective, SCALE * 1e6))
