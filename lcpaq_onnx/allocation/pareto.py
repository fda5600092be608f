"""The Pareto frontier: the allocation's programme swept over one dimension."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from lcpaq_onnx.allocation.allocate import OBJECTIVE_COLUMNS, Allocation, Objective, effort_for, optimise
from lcpaq_onnx.allocation.infeasible import explain_infeasible
from lcpaq_onnx.allocation.optimum import minimise
from lcpaq_onnx.allocation.problem import AllocationProblem, Column
from lcpaq_onnx.allocation.programme import build_programme
from lcpaq_onnx.budget import Budget, Dimension, check_distinct
from lcpaq_onnx.errors import UsageError

__all__ = ["pareto"]

_COLUMNS: dict[Dimension, Column] = {
    "size": "size_bytes",
    "latency": "latency_us",
    "bops": "bops",
    "peak_memory": "peak_memory_bytes",
    "bits": "stored_bits",
    "error": "loss",
}


def pareto(
    problem: AllocationProblem,
    dimension: Dimension,
    budgets: Sequence[Budget] = (),
    points: int = 12,
    objective: Objective = "error",
    *,
    time_limit_s: float = 60.0,
) -> tuple[Allocation, ...]:
    """Plans on the frontier of ``dimension`` against ``objective``, by rising ``dimension``; every one is undominated.

    Its ends are solved for: the least of the dimension, and the least of it at which the objective is best. Between
    them at most ``points`` - 2 limits are spaced evenly in ratio (evenly in value from an end at 0). Fewer points come
    back where limits meet the same plan. ``budgets`` hold for all points, one on ``dimension`` itself included.
    ``time_limit_s`` is for each point. Shadow prices are left empty: the neighbours show them.

    Raises as ``allocate`` does; UsageError when dimension and objective are the same or ``points`` < 2.
    """
    check_distinct(budgets)
    column, goal = _COLUMNS[dimension], OBJECTIVE_COLUMNS[objective]
    if column == goal:
        raise UsageError(f"a frontier of {dimension} against itself", hint="choose another objective or dimension")
    if points < 2:
        raise UsageError(f"a frontier of {points} points", hint="ask for 2 or more")
    if column == "peak_memory_bytes" and not problem.memory_steps:
        raise UsageError("this problem has no memory timeline", hint="sweep size, latency or bops")
    programme = build_programme(problem)
    caps = dict(problem.cap(budget) for budget in budgets)
    low = minimise(programme, column, caps, effort_for(problem, time_limit_s))
    high = optimise(programme, (goal, column), caps, effort_for(problem, time_limit_s))
    if low is None or high is None:
        raise explain_infeasible(programme, budgets, effort_for(problem, time_limit_s))
    found = [high[0]]
    for limit in _limits(low.value, _value(high[0], column), points):
        point = optimise(programme, (goal, column), caps | {column: limit}, effort_for(problem, time_limit_s))
        assert point is not None, "a limit above the least of the dimension is feasible"
        found.append(point[0])
    return _undominated(found, column, goal)


def _limits(low: float, high: float, points: int) -> list[float]:
    """``low`` itself and the limits between it and ``high``, whose plan is known."""
    if not low < high:
        return []
    spaced = np.geomspace(low, high, points) if low > 0 else np.linspace(low, high, points)
    return [low, *map(float, spaced[1:-1])]


def _undominated(found: Sequence[Allocation], column: Column, goal: Column) -> tuple[Allocation, ...]:
    frontier: list[Allocation] = []
    for point in sorted(found, key=lambda point: (_value(point, column), _value(point, goal))):
        if not frontier or _value(point, goal) < _value(frontier[-1], goal):
            frontier.append(point)
    assert all(_value(a, column) < _value(b, column) for a, b in pairwise(frontier))
    return tuple(frontier)


def _value(allocation: Allocation, column: Column) -> float:
    return float(getattr(allocation.totals, column))
