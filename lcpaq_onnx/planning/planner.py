"""Plans for a prepared model and its measurements: for any target and budget, without running the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lcpaq_onnx.allocation.allocate import (
    OBJECTIVE_COLUMNS,
    Allocation,
    Objective,
    allocate,
    choose,
    effort_for,
    priced,
)
from lcpaq_onnx.allocation.carry import carried
from lcpaq_onnx.allocation.exchange import exchange, predicted_loss
from lcpaq_onnx.allocation.pareto import pareto
from lcpaq_onnx.allocation.problem import AllocationProblem, Column
from lcpaq_onnx.allocation.programme import Programme, build_programme
from lcpaq_onnx.budget import Budget, Dimension
from lcpaq_onnx.formats import LayerFormat
from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.numeric.interactions import Interactions
from lcpaq_onnx.planning.choices import Allowed
from lcpaq_onnx.planning.formulate import Formulation
from lcpaq_onnx.planning.plan import Plan
from lcpaq_onnx.planning.plan_writer import PlanRequest, write_plan
from lcpaq_onnx.planning.variants import Variant, Variants
from lcpaq_onnx.tables import Compensable, Measurements, Sensitivity
from lcpaq_onnx.targets.target import Target

__all__ = ["NEGLIGIBLE_RELATIVE_ERROR", "Planner", "tolerated_error"]

TOLERATED = 1.1
"""Errors up to this factor of the least count as equal: predictions are no better."""
NEGLIGIBLE_RELATIVE_ERROR = 0.01
"""Root mean square error of the output over its range that counts as none."""
_TIME_LIMIT_S = 60.0
# Of the predicted loss: less is not worth emitting and measuring a second file.
_LEAST_EXCHANGE = 0.02


def tolerated_error(least: float) -> Budget:
    """The error up to which a plan is as good as one with the relative error ``least``."""
    return Budget("error", 100 * max(NEGLIGIBLE_RELATIVE_ERROR, TOLERATED * least), "percent")


def _used(allocation: Allocation, dimension: Dimension) -> float:
    """What an allocation takes of ``dimension``, in the base unit of its budget."""
    totals = allocation.totals
    column = {
        "size": totals.size_bytes,
        "latency": totals.latency_us,
        "bops": totals.bops,
        "bits": totals.stored_bits,
    }
    # A hair more, so that rounding of sums in another order cannot make the point infeasible.
    return (1 + 1e-9) * float(column.get(dimension, totals.peak_memory_bytes))


@dataclass(frozen=True, eq=False)
class _Stated:
    """The allocation problem of one variant."""

    variant: Variant
    formulation: Formulation
    programme: Programme

    @property
    def problem(self) -> AllocationProblem:
        """What there is to choose."""
        return self.programme.problem


class Planner:
    """Allocation over the formats that ``allowed`` and the target leave. ``graph``: prepared, not changed."""

    def __init__(
        self,
        graph: Graph,
        measurements: Measurements,
        target: Target,
        allowed: Allowed,
        *,
        variants: Variants | None = None,
        interactions: Interactions | None = None,
    ) -> None:
        """``variants``: of a planner for the same model, target and formats. ``interactions``: cross terms of
        decisions; with them predicted losses are those of all decisions together. Raises TargetError when the target
        does not take the model's opset.
        """
        self._graph = graph
        self._measurements = measurements
        self._target = target
        self._allowed = allowed
        self._variants = variants or Variants(graph, measurements.tensors, target, allowed)
        self._interactions = interactions
        self._stated: dict[int, _Stated] = {}
        self._answers: dict[tuple[tuple[Budget, ...], tuple[Objective, ...]], tuple[_Stated, Allocation]] = {}

    def remeasured(self, measurements: Measurements, interactions: Interactions | None = None) -> Planner:
        """A planner for other errors of the same model; its costs are not worked out again."""
        return Planner(
            self._graph,
            measurements,
            self._target,
            self._allowed,
            variants=self._variants,
            interactions=interactions,
        )

    @property
    def sensitivity(self) -> Sensitivity | None:
        """How the errors were found; None where there are none."""
        return self._measurements.sensitivity

    @property
    def compensable(self) -> Compensable | None:
        """What compensated rounding is possible for."""
        return self._measurements.compensable

    def plan(self, budgets: Sequence[Budget], objective: tuple[Objective, ...]) -> Plan:
        """The best plan, in a file of the lowest opset that expresses it. Raises BudgetError when none fits."""
        stated, allocation = self._allocated(budgets, objective)
        return self._write(stated, allocation, budgets, objective)

    def exchanged(self, budgets: Sequence[Budget], objective: tuple[Objective, ...]) -> Plan | None:
        """``plan`` with widths exchanged between layers as cross terms tell; None where that promises too little. What
        is better than the loss among the objectives is kept.
        """
        stated, allocation = self._allocated(budgets, objective)
        known = self._interactions
        if known is None:
            return None
        caps = self._caps(stated.problem, budgets)
        for name in objective[: objective.index("error")] if "error" in objective else objective:
            column = OBJECTIVE_COLUMNS[name]
            caps[column] = min(caps.get(column, float("inf")), float(getattr(allocation.totals, column)))
        found = exchange(stated.problem, allocation.assignment, known, caps)
        if found.loss_after > (1 - _LEAST_EXCHANGE) * found.loss_before:
            return None
        totals = stated.problem.evaluate(found.assignment)
        plan = self._write(stated, replace(allocation, assignment=found.assignment, totals=totals), budgets, objective)
        return plan.model_copy(update={"proof": plan.proof.model_copy(update={"exchanged": found.moves})})

    def weight_bits(self, budgets: Sequence[Budget], objective: tuple[Objective, ...]) -> list[tuple[str, int]]:
        """Layers with the stored width of the best plan; float ones are left out. Raises BudgetError when none fits."""
        stated = self._widest()
        assignment = self._optimum(stated, budgets, objective).assignment
        formats = {layer.name: LayerFormat.parse(assignment[layer.name]) for layer in stated.variant.structure.layers}
        return [(name, f.weight_bits) for name, f in formats.items() if f.weight_bits is not None]

    def least_error(self, budgets: Sequence[Budget]) -> float:
        """Least relative error within ``budgets``. Raises BudgetError when no plan fits."""
        return self._optimum(self._widest(), budgets, ("error",)).totals.relative_error

    def frontier(self, dimension: Dimension, budgets: Sequence[Budget], points: int) -> tuple[Plan, ...]:
        """Plans of least error from the least ``dimension`` upwards; of those as good, the fastest (``TOLERATED``)."""
        stated = self._widest()
        others = tuple(budget for budget in budgets if budget.dimension not in (dimension, "error"))
        plans: list[Plan] = []
        chosen: list[dict[str, str]] = []
        for point in pareto(stated.problem, dimension, budgets, points):
            limits = (Budget(dimension, _used(point, dimension)), tolerated_error(point.totals.relative_error))
            allocation = allocate(stated.problem, (*others, *limits), ("latency", "error"))
            # Neighbouring points can tolerate the same plan.
            if allocation.assignment not in chosen:
                chosen.append(allocation.assignment)
                plans.append(self._write(stated, allocation, budgets, ("error", "latency")))
        return tuple(plans)

    # ---- solving ----------------------------------------------------------------------------------------------------
    def _allocated(self, budgets: Sequence[Budget], objective: tuple[Objective, ...]) -> tuple[_Stated, Allocation]:
        """Solved once for each question."""
        question = (tuple(budgets), objective)
        if question not in self._answers:
            self._answers[question] = self._solve(budgets, objective)
        return self._answers[question]

    def _solve(self, budgets: Sequence[Budget], objective: tuple[Objective, ...]) -> tuple[_Stated, Allocation]:
        stated = self._widest()
        choice = choose(stated.programme, budgets, objective, effort_for(stated.problem, _TIME_LIMIT_S))
        opset = self._opset_of(choice.allocation, stated)
        if opset < stated.variant.opset:
            # The same formats may stand differently in the older file: solved anew unless they surely do not.
            stated = self._state(self._variants.at(opset))
            goal, caps = OBJECTIVE_COLUMNS[objective[0]], self._caps(stated.problem, budgets)
            choice = carried(choice, stated.programme, goal, caps) or choose(
                stated.programme, budgets, objective, effort_for(stated.problem, _TIME_LIMIT_S)
            )
        return stated, priced(choice, budgets, objective)

    def _optimum(self, stated: _Stated, budgets: Sequence[Budget], objective: tuple[Objective, ...]) -> Allocation:
        """As ``allocate``, without what more budget would buy."""
        return choose(stated.programme, budgets, objective, effort_for(stated.problem, _TIME_LIMIT_S)).allocation

    def _caps(self, problem: AllocationProblem, budgets: Sequence[Budget]) -> dict[Column, float]:
        return dict(problem.cap(budget) for budget in budgets)

    def _write(
        self, stated: _Stated, allocation: Allocation, budgets: Sequence[Budget], objective: Sequence[Objective]
    ) -> Plan:
        request = PlanRequest(
            source_sha256=self._measurements.source_sha256,
            budgets=budgets,
            objective=objective,
            opset=stated.variant.opset,
            ir_version=stated.variant.ir_version,
        )
        known = self._interactions
        loss = predicted_loss(stated.problem, allocation.assignment, known) if known else allocation.totals.loss
        together = replace(allocation, totals=replace(allocation.totals, loss=loss))
        ranges = self._measurements.ranges
        return write_plan(stated.formulation, stated.problem, together, ranges, stated.variant.sizes, request)

    # ---- problems ---------------------------------------------------------------------------------------------------
    def _widest(self) -> _Stated:
        return self._state(self._variants.widest())

    def _state(self, variant: Variant) -> _Stated:
        if variant.opset not in self._stated:
            formulation = Formulation(
                structure=variant.structure,
                tensors=self._measurements.tensors,
                errors=self._measurements.errors,
                costs=variant.costs,
                timeline=variant.timeline,
                target=self._target,
                allowed=self._allowed,
                quantizable=frozenset(self._measurements.ranges),
                float_size_bytes=self._measurements.source_size_bytes,
                explicit=variant.explicit,
            )
            self._stated[variant.opset] = _Stated(variant, formulation, build_programme(formulation.problem()))
        return self._stated[variant.opset]

    def _opset_of(self, allocation: Allocation, stated: _Stated) -> int:
        layers = [LayerFormat.parse(allocation.assignment[layer.name]) for layer in stated.variant.structure.layers]
        return min(self._variants.least_opset(layers, allocation.assignment.values()), stated.variant.opset)
