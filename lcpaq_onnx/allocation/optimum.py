"""Minimise one column of an allocation under caps on others, exactly: scaling, the solver, the check of its answer.

The solver's tolerances never decide a budget: byte columns are capped half a byte above the limit, the chosen
assignment is evaluated in plain arithmetic, and one that the tolerances let through is excluded and the programme
solved again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from lcpaq_onnx.allocation.milp import SCALE, FloatArray, Milp, Outcome, Rows, SearchLimits, relax, solve
from lcpaq_onnx.allocation.problem import Column, Totals
from lcpaq_onnx.allocation.programme import Programme
from lcpaq_onnx.errors import BudgetError

__all__ = [
    "LIMIT_SLACK",
    "Capped",
    "Caps",
    "Effort",
    "Goal",
    "Optimum",
    "Relaxed",
    "capped_by",
    "is_feasible",
    "meets",
    "milp_of",
    "minimise",
    "relaxation",
    "relaxed_under",
    "valued",
]

Caps = Mapping[Column, float]
"""Largest allowed value by column."""
Goal = Literal[Column, "rank", "nothing"]
"""What to minimise: a column of the totals, the preference among equal plans, or nothing (any feasible plan)."""
LIMIT_SLACK = 1e-9
"""Caps on columns that are not whole bytes hold up to this relative rounding."""
_ROUNDS = 20
# What the solver's tolerances may add to a bound: of a known value, and beside SCALE (1e-7 for each decision).
_BOUND_SLACK = 1e-6
_DUAL_SLACK = 1e-3


@dataclass(frozen=True)
class Effort:
    """When a search may stop: relative gap, the moment of ``time.perf_counter`` in seconds, branch-and-bound nodes."""

    relative_gap: float
    deadline: float
    nodes: int | None = None

    def limits(self) -> SearchLimits:
        return SearchLimits(self.relative_gap, max(self.deadline - time.perf_counter(), 0.1), self.nodes)


@dataclass(frozen=True, eq=False)
class Relaxed:
    """Optimum of the linear relaxation in the goal's unit, its slope d(value)/d(cap) by capped column (<= 0), what a
    variable of the programme surely adds to it (reduced costs), and the variables themselves.
    """

    value: float
    slopes: dict[Column, float]
    reduced_costs: FloatArray
    x: FloatArray

    def worse_than(self, value: float) -> npt.NDArray[np.bool_]:
        """Variables that no plan of this or a lower value takes."""
        return self.value + self.reduced_costs > value * (1 + _BOUND_SLACK)


@dataclass(frozen=True)
class Optimum:
    """A plan, its value in the goal's unit, the proven lower bound, and what the linear relaxation says.

    ``proved``: the solver finished its proof, so that no plan is better than ``bound``. ``relaxed``: the relaxation,
    None where a known plan made it needless.
    """

    assignment: dict[str, str]
    totals: Totals
    value: float
    bound: float
    proved: bool
    relaxed: Relaxed | None


def meets(totals: Totals, caps: Caps) -> bool:
    """Whether ``totals`` keep every cap: to the byte, other columns within ``LIMIT_SLACK``."""
    return all(float(getattr(totals, column)) <= _roof(column, cap) for column, cap in caps.items())


def is_feasible(programme: Programme, caps: Caps, effort: Effort) -> bool:
    """Whether any legal assignment keeps ``caps``. Raises BudgetError when time runs out first."""
    return minimise(programme, "nothing", caps, effort) is not None


def minimise(
    programme: Programme,
    goal: Goal,
    caps: Caps,
    effort: Effort,
    start: Optimum | None = None,
    closed: npt.NDArray[np.bool_] | None = None,
) -> Optimum | None:
    """Least ``goal`` of any legal assignment that keeps ``caps``; None when there is none.

    ``start`` is a plan known to be feasible, ``closed`` marks variables that no plan within ``caps`` takes: they save
    time and never change the optimum. Raises BudgetError when no
    plan was found in time and none was disproved.
    """
    capped = capped_by(programme, caps)
    if capped is None:
        return None
    if closed is not None:
        capped = replace(capped, upper=np.where(closed, 0.0, capped.upper))
    best = None if start is None else valued(programme, goal, start.assignment)
    scale = SCALE / _largest(programme, goal)
    relaxed = relaxed_under(programme, goal, capped, effort) if best is None else None
    near = best or relaxed
    if near is not None:
        scale = _rescaled(scale, near.value)

    hint = None if best is None else programme.vector(best.assignment)
    for _ in range(_ROUNDS):
        outcome = solve(
            milp_of(programme, goal, capped, scale, np.inf if best is None else best.value), effort.limits(), hint
        )
        if outcome.x is None:
            return _without_solution(outcome, best)
        found = valued(programme, goal, programme.assignment(outcome.x))
        if not meets(found.totals, caps):
            capped = capped.excluding(programme.exclusion(found.assignment))
            continue
        bound = min(outcome.bound / scale, found.value)
        proved = outcome.status == "optimal"
        best = Optimum(found.assignment, found.totals, found.value, max(bound, 0.0), proved, relaxed)
        # An optimum far from the scale was found with poor relative tolerances: look again at its own scale.
        if best.value == 0 or 1e-3 <= best.value * scale / SCALE <= 1e3 or not proved:
            return best
        scale = SCALE / best.value
        hint = programme.vector(best.assignment)
    raise AssertionError(f"HiGHS returned {_ROUNDS} assignments beyond their caps {dict(caps)}")


def relaxation(programme: Programme, goal: Goal, caps: Caps, effort: Effort) -> Relaxed | None:
    """The linear relaxation alone; None when it is infeasible or out of time."""
    capped = capped_by(programme, caps)
    return None if capped is None else relaxed_under(programme, goal, capped, effort)


@dataclass(frozen=True)
class Capped:
    """Rules and caps as rows; ``upper`` closes the columns that alone break a cap.

    ``cap_rows`` gives, for each row behind the rules, its column and factor from the column's unit to the row's.
    """

    rows: Rows
    upper: FloatArray
    cap_rows: tuple[tuple[Column, float], ...]

    def excluding(self, row: Rows) -> Capped:
        return Capped(Rows.stacked([self.rows, row]), self.upper, self.cap_rows)


def capped_by(programme: Programme, caps: Caps) -> Capped | None:
    """The rules with ``caps`` as rows; None when the fixed part alone is beyond a cap."""
    upper = np.ones(programme.width)
    rows = [programme.rules]
    cap_rows: list[tuple[Column, float]] = []
    for column, cap in caps.items():
        for values, columns, fixed in _parts(programme, column):
            room = _roof(column, cap) - fixed + (0.5 if column.endswith("bytes") else 0.0)
            if room < 0:
                return None
            closed = values > room
            upper[columns[closed]] = 0
            values, columns = values[~closed], columns[~closed]
            if values.sum() <= room or room == 0:
                continue
            factor = SCALE / room
            rows.append(Rows.below(columns, values * factor, SCALE))
            cap_rows.append((column, factor))
    return Capped(Rows.stacked(rows), upper, tuple(cap_rows))


def milp_of(programme: Programme, goal: Goal, capped: Capped, scale: float, best_value: float) -> Milp:
    """Minimise ``goal`` times ``scale``. Costs are >= 0: a column that alone costs more than a known plan is closed."""
    if goal == "peak_memory_bytes":
        return _peak_milp(programme, capped, scale)
    costs = np.zeros(programme.width) if goal == "nothing" else programme.costs[goal]
    fixed = 0.0 if goal == "nothing" else programme.fixed[goal]
    upper = np.where(costs + fixed > best_value * (1 + LIMIT_SLACK), 0.0, capped.upper)
    # Costs far above the optimum are cut off: they would spoil the solver's accuracy. `minimise` sees if they matter.
    return Milp(np.minimum(costs * scale, SCALE * 1e6), fixed * scale, upper, programme.choices, capped.rows)


def _peak_milp(programme: Programme, capped: Capped, scale: float) -> Milp:
    peak = programme.width
    steps = [
        Rows.below(np.append(columns, peak), np.append(values * scale, -1.0), -fixed * scale)
        for values, columns, fixed in programme.steps
    ]
    objective = np.zeros(peak + 1)
    objective[peak] = 1
    return Milp(objective, 0.0, np.append(capped.upper, np.inf), programme.choices, Rows.stacked([capped.rows, *steps]))


def _parts(programme: Programme, column: Column) -> tuple[tuple[FloatArray, npt.NDArray[np.int64], float], ...]:
    """The sums that a cap on ``column`` limits: values, variables, fixed part. Peak memory has one per step."""
    if column == "peak_memory_bytes":
        return programme.steps
    costly = np.flatnonzero(programme.costs[column]).astype(np.int64)
    return ((programme.costs[column][costly], costly, programme.fixed[column]),)


def relaxed_under(programme: Programme, goal: Goal, capped: Capped, effort: Effort) -> Relaxed | None:
    """The linear relaxation; None when it is infeasible or out of time."""
    scale = SCALE / _largest(programme, goal)
    solved = relax(milp_of(programme, goal, capped, scale, np.inf), effort.limits().seconds)
    if solved is None:
        return None
    slopes: dict[Column, float] = {}
    for (column, factor), dual in zip(
        capped.cap_rows, solved.duals[len(programme.rules.lower) :].tolist(), strict=False
    ):
        slopes[column] = slopes.get(column, 0.0) + dual * factor / scale
    reduced_costs = (solved.reduced_costs[: programme.width] - _DUAL_SLACK) / scale
    return Relaxed(solved.value / scale, slopes, reduced_costs, solved.x[: programme.width])


def valued(programme: Programme, goal: Goal, assignment: dict[str, str]) -> Optimum:
    """A legal assignment with its totals and its value, and nothing proven."""
    totals = programme.problem.evaluate(assignment)
    if goal == "nothing":
        value = 0.0
    elif goal == "rank":
        value = float(programme.costs["rank"][programme.vector(assignment) == 1].sum())
    else:
        value = float(getattr(totals, goal))
    assert not programme.problem.violations(assignment), "the programme's rows differ from the problem's rules"
    return Optimum(assignment, totals, value, 0.0, False, None)


def _without_solution(outcome: Outcome, best: Optimum | None) -> Optimum | None:
    if best is not None:
        return best
    if outcome.status == "infeasible":
        return None
    raise BudgetError(
        "no plan was found in the time given, and none was proven impossible",
        hint="give it more time or relax a budget",
    )


def _largest(programme: Programme, goal: Goal) -> float:
    if goal == "nothing":
        return 1.0
    if goal == "peak_memory_bytes":
        return max((fixed + float(values.sum()) for values, _, fixed in programme.steps), default=1.0) or 1.0
    return max(float(programme.costs[goal].max(initial=0.0)), programme.fixed[goal]) or 1.0


def _rescaled(scale: float, value: float) -> float:
    """The scale that takes ``value`` to SCALE, unless ``value`` is only the solver's rounding."""
    return SCALE / value if value * scale > SCALE * 1e-9 else scale


def _roof(column: Column, cap: float) -> float:
    return float(np.floor(cap)) if column.endswith("bytes") else cap * (1 + LIMIT_SLACK)
