"""Which plan to make for what the user asked: the loop of planning, emitting and measuring."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from lcpaq_onnx.allocation.allocate import Objective
from lcpaq_onnx.budget import Budget
from lcpaq_onnx.errors import BudgetError, LcpaqError
from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.passes import WeightEntry
from lcpaq_onnx.planning.bench import Bench
from lcpaq_onnx.planning.choices import Allowed
from lcpaq_onnx.planning.goal import FASTEST, Goal, exchanged_plan_for, plan_for
from lcpaq_onnx.planning.plan import Plan
from lcpaq_onnx.planning.planner import NEGLIGIBLE_RELATIVE_ERROR, Planner
from lcpaq_onnx.planning.refinement import refined
from lcpaq_onnx.planning.roundings import compensated
from lcpaq_onnx.tables import Measurements, Sensitivity
from lcpaq_onnx.targets.target import Target
from lcpaq_onnx.verification.measure import MeasuredError

__all__ = ["DEFAULT_AGREEMENT", "DEFAULT_RELATIVE_ERROR", "Outcome", "is_good_enough", "search_plan"]

DEFAULT_RELATIVE_ERROR = NEGLIGIBLE_RELATIVE_ERROR
"""Without a budget, root mean square error of the output over its range on the calibration data."""
DEFAULT_AGREEMENT = 0.99
"""Without a budget, share of decisions that must stay the same, where outputs are class scores."""

# Share of the default error below which a file is not made better still.
_EASILY = 0.5
# Predicted errors are first order; each round corrects the limit by what was measured.
_ROUNDS = 6
_MARGIN = 0.9
_STEP = 0.7

Emit = Callable[[Graph, Plan], Graph]


@dataclass(frozen=True, eq=False)
class Outcome:
    """The emitted graph, its plan, and its error on all calibration data. ``sensitivity``: how the plan's errors were
    found; None where it rests on none. ``loss_without_rewrites``: measured loss of what was found without those of the
    plan; None where it has none.
    """

    graph: Graph
    plan: Plan
    measured: MeasuredError
    sensitivity: Sensitivity | None = None
    loss_without_rewrites: float | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class _Workplace:
    """What every attempt needs."""

    graph: Graph
    bench: Bench
    target: Target
    emit: Emit

    def attempt(self, plan: Plan, planner: Planner) -> Outcome:
        """``plan``, emitted; compensated where that is asked for, or measured clearly better."""
        other = compensated(plan, planner.compensable)
        if other is not None and self.bench.settings.rounding == "compensated":
            return self.emitted(other, planner)
        return self.improved(self.emitted(plan, planner), planner)

    def improved(self, nearest: Outcome, planner: Planner) -> Outcome:
        """``nearest``, or its plan with compensated rounding where that is measured clearly better."""
        other = compensated(nearest.plan, planner.compensable)
        if other is None:
            return nearest
        try:
            outcome = self.emitted(other, planner)
        except LcpaqError as error:
            # An improvement that cannot be had must not cost the file that there is.
            return replace(nearest, warnings=(*nearest.warnings, f"weights are rounded to nearest: {error.message}"))
        # On samples that rounding has not seen, as far as there are some.
        unseen = outcome.plan.rounding_samples
        return outcome if outcome.measured.is_clearly_below(nearest.measured, unseen) else nearest

    def quick_attempt(self, plan: Plan, planner: Planner) -> Outcome:
        """As ``attempt``, but nearest integers, which take no time, will do where they are easily good enough."""
        if self.bench.settings.rounding == "compensated":
            return self.attempt(plan, planner)
        outcome = self.emitted(plan, planner)
        is_easy = outcome.measured.relative_error <= _EASILY * DEFAULT_RELATIVE_ERROR
        return outcome if is_easy and is_good_enough(outcome.measured) else self.improved(outcome, planner)

    def emitted(self, plan: Plan, planner: Planner) -> Outcome:
        """``plan`` as it is, with the rewrites that led to this graph."""
        if self.bench.rewrites:
            update = {"rewrites": self.bench.rewrites, "calibration_sha256": self.bench.decisive_sha256}
            plan = plan.model_copy(update=update)
        graph = self.emit(self.graph, plan)
        return Outcome(graph, plan, self.bench.error_of(graph), planner.sensitivity)

    def refined_planner(self, allowed: Allowed, budgets: Sequence[Budget], objective: tuple[Objective, ...]) -> Planner:
        """A planner whose errors are measured where the best plan within ``budgets`` depends on them."""
        first = self.planner(self.bench.ranges_only(), allowed)
        stored = self.target.weights.stored_bits
        widths = [bits for bits in stored if allowed.weight_bits is None or bits in allowed.weight_bits]
        # Of plans of one error any will do: what else they are good for does not change which errors matter.
        goal: tuple[Objective, ...] = ("error",) if objective[0] == "error" else objective
        others = tuple(budget for budget in budgets if budget.dimension != "error")

        def chosen(measured: Measurements) -> Collection[WeightEntry]:
            planner = first.remeasured(measured)
            try:
                return planner.weight_bits(budgets, goal)
            except BudgetError:
                # By a first table that may be wrong: the least error that the other budgets allow tells more.
                return planner.weight_bits(others, ("error",))

        found = refined(self.bench, widths, chosen)
        return first.remeasured(found.measurements, self.bench.interactions(found.entries, found.samples))

    def planner(self, measurements: Measurements, allowed: Allowed) -> Planner:
        return Planner(self.graph, measurements, self.target, allowed)


def search_plan(graph: Graph, bench: Bench, target: Target, goal: Goal, emit: Emit) -> Outcome:
    """The plan for ``goal``, emitted and measured. ``emit``: applies a plan to a copy of the prepared graph.

    Raises BudgetError when no plan fits the budgets, or none was found whose measured error fits an error budget.
    """
    site = _Workplace(graph, bench, target, emit)
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


def _fastest_within_default(site: _Workplace, allowed: Allowed) -> Outcome:
    """The fastest plan that stays within the default error. Sensitivities are measured only if the first fails."""
    allowed = allowed if allowed.weight_bits else replace(allowed, weight_bits=_widest(site.target))
    first = site.planner(site.bench.ranges_only(), allowed)
    plan = first.plan((), ("latency", "size"))
    outcome = site.quick_attempt(plan, first)
    if is_good_enough(outcome.measured):
        return outcome
    limit = DEFAULT_RELATIVE_ERROR
    planner = site.refined_planner(allowed, (Budget("error", 100 * limit, "percent"),), FASTEST)
    for _ in range(_ROUNDS):
        try:
            plan = planner.plan((Budget("error", 100 * limit, "percent"),), FASTEST)
        except BudgetError:
            break  # the formats allowed leave more error than that
        # The limit is this loop's, not the user's.
        outcome = site.attempt(plan.model_copy(update={"budgets": ()}), planner)
        if is_good_enough(outcome.measured):
            return outcome
        predicted = outcome.plan.predicted.relative_error or limit
        correction = _MARGIN * DEFAULT_RELATIVE_ERROR / max(outcome.measured.relative_error, 1e-12)
        limit = min(limit, predicted) * min(correction, _STEP)
    return site.attempt(planner.plan((), ("error", "latency", "size")), planner)


def _widest(target: Target) -> frozenset[int]:
    """The widest stored widths that integer kernels take: narrower ones are no faster."""
    widest = max(target.weights.integer_bits)
    return frozenset({widest, widest - 1} if target.weights.saturating_pairs else {widest})


def is_good_enough(measured: MeasuredError) -> bool:
    """Whether it is within the default error."""
    # One changed decision says nothing about the share, however few samples there are.
    lost = 0.0 if measured.agreement is None else (1 - measured.agreement) * measured.samples
    kept = lost < max(1.5, (1 - DEFAULT_AGREEMENT) * measured.samples + 0.5)
    return kept and measured.relative_error <= DEFAULT_RELATIVE_ERROR


def _within_error_budget(site: _Workplace, planner: Planner, goal: Goal, budget: Budget) -> Outcome:
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
