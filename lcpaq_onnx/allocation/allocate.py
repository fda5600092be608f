"""Allocation: choose a format for every decision at once, by one integer linear programme, and prove the choice.

Pure: values in, values out. The programme is ``programme.py``, its exact optimum ``optimum.py``, the account of an
infeasible budget ``infeasible.py``, what a little more budget would buy ``shadow_prices.py``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from lcpaq_onnx.allocation.core import core_optimum
from lcpaq_onnx.allocation.infeasible import explain_infeasible
from lcpaq_onnx.allocation.optimum import Caps, Effort, Goal, Optimum, minimise
from lcpaq_onnx.allocation.problem import AllocationProblem, Column, Totals
from lcpaq_onnx.allocation.programme import Programme, build_programme
from lcpaq_onnx.allocation.shadow_prices import ShadowPrice, shadow_prices
from lcpaq_onnx.budget import Budget, check_distinct
from lcpaq_onnx.errors import BudgetError, UsageError

__all__ = [
    "OBJECTIVE_COLUMNS",
    "Allocation",
    "Choice",
    "Objective",
    "allocate",
    "choose",
    "effort_for",
    "optimise",
    "priced",
]

Objective = Literal["error", "latency", "size"]
OBJECTIVE_COLUMNS: dict[Objective, Column] = {"error": "loss", "latency": "latency_us", "size": "size_bytes"}

# Up to here the proof is exact and takes a tenth of a second; above, seconds, for figures known to a tenth at best.
_EXACT_DECISIONS = 100
_LARGE_GAP = 1e-4
# Counted in nodes, not seconds: the choice among equal plans must not depend on the machine's speed.
_TIE_BREAK_NODES = 200


@dataclass(frozen=True)
class Allocation:
    """The chosen format of every decision, what it costs, and how far it is proven.

    ``objective_value`` is the first objective's value in its column's unit; no legal plan within the budgets is better
    than it by more than the relative ``gap`` (0: exactly optimal). ``proved_optimal`` is False when time ran out first.
    """

    assignment: dict[str, str]
    totals: Totals
    objective_value: float
    gap: float
    proved_optimal: bool
    shadow_prices: tuple[ShadowPrice, ...]
    solver_seconds: float


@dataclass(frozen=True, eq=False)
class Choice:
    """An allocation without prices, its programme, the optimum of its first goal, and what is left of the effort."""

    programme: Programme
    allocation: Allocation
    first: Optimum
    effort: Effort


def allocate(
    problem: AllocationProblem,
    budgets: Sequence[Budget] = (),
    objective: tuple[Objective, ...] = ("error",),
    *,
    time_limit_s: float = 60.0,
) -> Allocation:
    """The best legal plan within all ``budgets``.

    Objectives are lexicographic: the first is minimised, then fixed (within 1e-9 of its value) while the next is, and
    so on; among plans still equal, the one with the options nearest the front of their decisions' lists. Above 100
    decisions the plan is that of ``core_optimum``, where it is good enough: the gap, stated, is at most 3 %, and equal
    plans are chosen between by the solver. ``error`` minimises ``loss``. Deterministic unless the time limit is met.

    Raises ``InfeasibleError`` (a BudgetError) with the conflicting budgets and the least ones that work; BudgetError
    when nothing was found in time; UsageError on two budgets for one dimension, a budget the problem cannot measure,
    or an unknown or repeated objective.
    """
    effort = effort_for(problem, time_limit_s)
    return priced(choose(build_programme(problem), budgets, objective, effort), budgets, objective)


def choose(programme: Programme, budgets: Sequence[Budget], objective: tuple[Objective, ...], effort: Effort) -> Choice:
    """``allocate`` up to the prices; raises as it does."""
    started = time.perf_counter()
    check_distinct(budgets)
    if not objective or len(set(objective)) < len(objective) or not set(objective) <= set(get_args(Objective)):
        known = ", ".join(get_args(Objective))
        raise UsageError(f"objective {', '.join(objective) or '(none)'}", hint=f"name each of {known} at most once")
    problem = programme.problem
    caps = dict(problem.cap(budget) for budget in budgets)
    goals = tuple(OBJECTIVE_COLUMNS[name] for name in objective)
    found = optimise(programme, goals, caps, effort)
    if found is None:
        allowed_s = effort.deadline - started
        raise explain_infeasible(programme, budgets, replace(effort, deadline=time.perf_counter() + allowed_s))
    return Choice(programme, *found, effort)


def priced(choice: Choice, budgets: Sequence[Budget], objective: tuple[Objective, ...]) -> Allocation:
    """The allocation of ``choice`` with what a little more of each budget would buy."""
    started = time.perf_counter()
    prices = shadow_prices(choice.programme, budgets, OBJECTIVE_COLUMNS[objective[0]], choice.first, choice.effort)
    seconds = choice.allocation.solver_seconds + time.perf_counter() - started
    return replace(choice.allocation, shadow_prices=prices, solver_seconds=seconds)


def effort_for(problem: AllocationProblem, seconds: float) -> Effort:
    """Exact for up to 100 decisions, else to a stated gap; at most ``seconds`` from now."""
    gap = 0.0 if len(problem.decisions) <= _EXACT_DECISIONS else _LARGE_GAP
    return Effort(gap, time.perf_counter() + seconds)


def optimise(
    programme: Programme, goals: Sequence[Column], caps: Caps, effort: Effort
) -> tuple[Allocation, Optimum] | None:
    """Lexicographic optimum without shadow prices, and the first goal's optimum; None when ``caps`` are infeasible."""
    started = time.perf_counter()
    if effort.relative_gap > 0:
        near = core_optimum(programme, goals, caps, effort)
        if near is not None:
            return _allocation(near, near, goals[0], time.perf_counter() - started), near
    first = minimise(programme, goals[0], caps, effort)
    if first is None:
        return None
    best, proved, fixed = first, first.proved, dict(caps)
    # From here on only plans as good as the first are of interest.
    closed = np.zeros(programme.width, bool) if first.relaxed is None else first.relaxed.worse_than(first.value)
    closed &= programme.vector(first.assignment) != 1  # whatever the solver's tolerances say: it is as good as itself
    for column, goal in pairwise(goals):
        fixed[column] = min(fixed.get(column, best.value), best.value)
        best = _again(programme, goal, fixed, effort, best, closed)
        proved = proved and best.proved
    if len(programme.problem.decisions) <= _EXACT_DECISIONS:
        fixed[goals[-1]] = min(fixed.get(goals[-1], best.value), best.value)
        best = _again(programme, "rank", fixed, replace(effort, nodes=_TIE_BREAK_NODES), best, closed)
    best = replace(best, proved=proved)
    return _allocation(first, best, goals[0], time.perf_counter() - started), first


def _allocation(first: Optimum, best: Optimum, goal: Column, seconds: float) -> Allocation:
    """``best``, whose first ``goal`` is proven by ``first``."""
    gap = (first.value - first.bound) / first.value if first.value else 0.0
    return Allocation(
        assignment=best.assignment,
        totals=best.totals,
        objective_value=float(getattr(best.totals, goal)),
        gap=0.0 if gap < 1e-9 else gap,  # below that is the solver's arithmetic
        proved_optimal=best.proved,
        shadow_prices=(),
        solver_seconds=seconds,
    )


def _again(
    programme: Programme,
    goal: Goal,
    caps: Caps,
    effort: Effort,
    start: Optimum,
    closed: npt.NDArray[np.bool_],
) -> Optimum:
    """Minimise the next goal from a plan that keeps ``caps``."""
    found = minimise(programme, goal, caps, effort, start, closed)
    if found is None:
        raise BudgetError("the solver lost a plan it had found", hint="relax the tightest budget a little")
    return found
