"""Which plan to make for what the user asked: the loop of planning, emitting and measuring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lcpaq_onnx.allocation.allocate import Objective
from lcpaq_onnx.budget import Budget
from lcpaq_onnx.errors import BudgetError
from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.planning.bench import Bench
from lcpaq_onnx.planning.choices import Allowed
from lcpaq_onnx.planning.plan import Plan
from lcpaq_onnx.planning.planner import NEGLIGIBLE_RELATIVE_ERROR, Planner, tolerated_error
from lcpaq_onnx.planning.refinement import refined
from lcpaq_onnx.tables import Measurements, Sensitivity
from lcpaq_onnx.targets.target import Target
from lcpaq_onnx.verification.measure import MeasuredError

__all__ = ["DEFAULT_AGREEMENT", "DEFAULT_RELATIVE_ERROR", "Goal", "Outcome", "plan_for", "search_plan"]

DEFAULT_RELATIVE_ERROR = NEGLIGIBLE_RELATIVE_ERROR
"""Without a budget, root mean square error of the output over its range on the calibration data."""
DEFAULT_AGREEMENT = 0.99
"""Without a budget, share of decisions that must stay the same, where outputs are class scores."""

# Predicted errors are first order; each round corrects the limit by what was measured.
_ROUNDS = 6
_MARGIN = 0.9
_STEP = 0.7

Emit = Callable[[Graph, Plan], Graph]
_OBJECTIVES: dict[Objective, tuple[Objective, ...]] = {
    "error": ("error", "latency"),
    "latency": ("latency", "error"),
    "size": ("size", "error"),
}
_FASTEST: tuple[Objective, ...] = ("latency", "size", "error")


@dataclass(frozen=True)
class Goal:
    """Budgets, objective (None: what fits the budgets) and the formats the planner may use."""

    budgets: tuple[Budget, ...]
    objective: Objective | None
    allowed: Allowed

    @property
    def is_default(self) -> bool:
        """Neither budget nor objective: the fastest plan within the default error, never slower than float."""
        return not self.budgets and self.objective is None

    @property
    def error_budget(self) -> Budget | None:
        """The budget on error, if there is one."""
        return next((budget for budget in self.budgets if budget.dimension == "error"), None)

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """What to minimise, first things first."""
        if self.objective is not None:
            return _OBJECTIVES[self.objective]
        return _FASTEST if self.error_budget else _OBJECTIVES["error"]


@dataclass(frozen=True, eq=False)
class Outcome:
    """The emitted graph, its plan, and its error on all calibration data. ``sensitivity``: how the plan's errors were
    found; None where it rests on none.
    """

    graph: Graph
    plan: Plan
    measured: MeasuredError
    sensitivity: Sensitivity | None = None


@dataclass(frozen=True, eq=False)
class _Site:
    """What every attempt needs."""

    graph: Graph
    bench: Bench
    target: Target
    emit: Emit

    def attempt(self, plan: Plan, planner: Planner) -> Outcome:
        emitted = self.emit(self.graph, plan)
        return Outcome(emitted, plan, self.bench.error_of(emitted), planner.sensitivity)

    def refined_planner(self, allowed: Allowed, budgets: Sequence[Budget], objective: tuple[Objective, ...]) -> Planner:
        """A planner whose errors are measured where the best plan within ``budgets`` depends on them."""
        first = self.planner(self.bench.ranges_only(), allowed)
        stored = self.target.weights.stored_bits
        widths = [bits for bits in stored if allowed.weight_bits is None or bits in allowed.weight_bits]
        found = refined(self.bench, widths, lambda measured: first.remeasured(measured).weight_bits(budgets, objective))
        return first.remeasured(found.measurements, self.bench.interactions(found.entries, found.samples))

    def planner(self, measurements: Measurements, allowed: Allowed) -> Planner:
        return Planner(self.graph, measurements, self.target, allowed)


def search_plan(graph: Graph, bench: Bench, target: Target, goal: Goal, emit: Emit) -> Outcome:
    """The plan for ``goal``, emitted and measured. ``emit``: applies a plan to a copy of the prepared graph.

    Raises BudgetError when no plan fits the budgets, or none was found whose measured error fits an error budget.
    """
    site = _Site(graph, bench, target, emit)
    if goal.is_default:
        return _fastest_within_default(site, goal.allowed)
    planner = site.refined_planner(goal.allowed, goal.budgets, goal.objectives)
    if goal.error_budget is not None:
        return _within_error_budget(site, planner, goal, goal.error_budget)
    outcome = site.attempt(plan_for(planner, goal), planner)
    other = exchanged_plan_for(planner, goal)
    if other is None:
        return outcome
    # Cross terms of few samples are noisy: only the measured error tells whether the exchange was one for the better.
    exchanged = site.attempt(other, planner)
    return exchanged if exchanged.measured.is_clearly_below(outcome.measured) else outcome


def plan_for(planner: Planner, goal: Goal) -> Plan:
    """The plan for ``goal`` by predicted error.

    With an objective, just that. With an error budget: fastest, then smallest. Else least error, but speed is not given
    up for error that nobody can see: the fastest plan whose error is within a tenth of the least, or within the
    default. Raises BudgetError when none fits.
    """
    asked = _asked(planner, goal)
    return asked.state(planner.plan(asked.budgets, asked.objectives))


def exchanged_plan_for(planner: Planner, goal: Goal) -> Plan | None:
    """``plan_for`` after an exchange of widths between layers by cross terms; None where that promises nothing."""
    asked = _asked(planner, goal)
    plan = planner.exchanged(asked.budgets, asked.objectives)
    return None if plan is None else asked.state(plan)


@dataclass(frozen=True)
class _Asked:
    """What the planner is asked for, and what the plan says that the user asked for."""

    budgets: tuple[Budget, ...]
    objectives: tuple[Objective, ...]
    stated_budgets: tuple[str, ...]
    stated_objective: tuple[str, ...]

    def state(self, plan: Plan) -> Plan:
        return plan.model_copy(update={"budgets": self.stated_budgets, "objective": self.stated_objective})


def _asked(planner: Planner, goal: Goal) -> _Asked:
    stated = tuple(map(str, goal.budgets))
    if goal.objective is not None or goal.error_budget is not None:
        return _Asked(goal.budgets, goal.objectives, stated, goal.objectives)
    least = planner.least_error(goal.budgets)
    limit = tolerated_error(least)
    objective = (f"latency at error<={limit.limit:.3g}% (the least is {100 * least:.3g}%)", "error")
    return _Asked((*goal.budgets, limit), _OBJECTIVES["latency"], stated, objective)


def _fastest_within_default(site: _Site, allowed: Allowed) -> Outcome:
    """The fastest plan that stays within the default error. Sensitivities are measured only if the first fails."""
    allowed = allowed if allowed.weight_bits else replace(allowed, weight_bits=_widest(site.target))
    first = site.planner(site.bench.ranges_only(), allowed)
    outcome = site.attempt(first.plan((), ("latency", "size")), first)
    if _is_good_enough(outcome.measured):
        return outcome
    limit = DEFAULT_RELATIVE_ERROR
    planner = site.refined_planner(allowed, (Budget("error", 100 * limit, "percent"),), _FASTEST)
    for _ in range(_ROUNDS):
        plan = planner.plan((Budget("error", 100 * limit, "percent"),), _FASTEST)
        # The limit is this loop's, not the user's.
        outcome = site.attempt(plan.model_copy(update={"budgets": ()}), planner)
        if _is_good_enough(outcome.measured):
            return outcome
        predicted = outcome.plan.predicted.relative_error or limit
        correction = _MARGIN * DEFAULT_RELATIVE_ERROR / max(outcome.measured.relative_error, 1e-12)
        limit = min(limit, predicted) * min(correction, _STEP)
    return site.attempt(planner.plan((), ("error", "latency", "size")), planner)


def _widest(target: Target) -> frozenset[int]:
    """The widest stored widths that integer kernels take: narrower ones are no faster."""
    widest = max(target.weights.integer_bits)
    return frozenset({widest, widest - 1} if target.weights.saturating_pairs else {widest})


def _is_good_enough(measured: MeasuredError) -> bool:
    # One changed decision says nothing about the share, however few samples there are.
    lost = 0.0 if measured.agreement is None else (1 - measured.agreement) * measured.samples
    kept = lost < max(1.5, (1 - DEFAULT_AGREEMENT) * measured.samples + 0.5)
    return kept and measured.relative_error <= DEFAULT_RELATIVE_ERROR


def _within_error_budget(site: _Site, planner: Planner, goal: Goal, budget: Budget) -> Outcome:
    """Tighten the predicted limit until the measured error meets the user's."""
    others = tuple(other for other in goal.budgets if other is not budget)
    tightened = budget
    best: Outcome | None = None
    for _ in range(_ROUNDS):
        try:
            plan = planner.plan((*others, tightened), goal.objectives)
        except BudgetError:
            if best is None:
                raise
            break
        # The plan answers to the user's budget, not to the corrected one.
        plan = plan.model_copy(update={"budgets": tuple(map(str, goal.budgets))})
        outcome = site.attempt(plan, planner)
        value = _budgeted(outcome.measured, budget)
        if value <= budget.limit:
            return outcome
        best = outcome if best is None or value < _budgeted(best.measured, budget) else best
        tightened = replace(tightened, limit=tightened.limit * min(_MARGIN * budget.limit / value, _STEP))
    assert best is not None
    raise BudgetError(
        f"{budget}: the least measured error that was reached is {_budgeted(best.measured, budget):.4g}",
        hint="allow more error, wider formats (--weights), or fewer other budgets",
    )


def _budgeted(measured: MeasuredError, budget: Budget) -> float:
    """The measured value in the budget's own unit."""
    return 100 * measured.relative_error if budget.unit == "percent" else measured.loss
