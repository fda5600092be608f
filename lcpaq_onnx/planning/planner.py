"""Plans for a prepared model and its measurements: for any target and budget, without running the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lcpaq_onnx.allocation.allocate import Allocation, Objective, allocate, effort_for, optimise
from lcpaq_onnx.allocation.pareto import pareto
from lcpaq_onnx.allocation.problem import AllocationProblem
from lcpaq_onnx.allocation.programme import build_programme
from lcpaq_onnx.budget import Budget, Dimension
from lcpaq_onnx.errors import PassError, TargetError
from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.graph.size_model import SizeModel
from lcpaq_onnx.manager.analysis import AnalysisInputs, AnalysisManager
from lcpaq_onnx.manager.pass_base import PassContext
from lcpaq_onnx.manager.pass_manager import run_pipeline
from lcpaq_onnx.passes import (
    CostTables,
    GraphStructure,
    MemoryTimeline,
    RecordedTensors,
    SizeModels,
    explicit_movers,
    raise_to,
)
from lcpaq_onnx.planning.choices import Allowed
from lcpaq_onnx.planning.formulate import Formulation
from lcpaq_onnx.planning.plan import Plan
from lcpaq_onnx.planning.plan_writer import PlanRequest, write_plan
from lcpaq_onnx.tables import Measurements
from lcpaq_onnx.targets.target import Target

__all__ = ["NEGLIGIBLE_RELATIVE_ERROR", "Planner", "tolerated_error"]

TOLERATED = 1.1
"""Errors up to this factor of the least count as equal: predictions are no better."""
NEGLIGIBLE_RELATIVE_ERROR = 0.01
"""Root mean square error of the output over its range that counts as none."""
_TIME_LIMIT_S = 60.0
# Per-channel DequantizeLinear; below it there is no form that all runtimes take.
_LEAST_OPSET = 13


def tolerated_error(least: float) -> Budget:
    """The error up to which a plan is as good as one with the relative error ``least``."""
    return Budget("error", 100 * max(NEGLIGIBLE_RELATIVE_ERROR, TOLERATED * least), "percent")


def _used(allocation: Allocation, dimension: Dimension) -> float:
    """What an allocation takes of ``dimension``, in the base unit of its budget."""
    totals = allocation.totals
    column = {"size": totals.size_bytes, "latency": totals.latency_us, "bops": totals.bops}
    # A hair more, so that rounding of sums in another order cannot make the point infeasible.
    return (1 + 1e-9) * float(column.get(dimension, totals.peak_memory_bytes))


@dataclass(frozen=True, eq=False)
class _Variant:
    """The model at one opset: what can be expressed there, and what it costs."""

    graph: Graph
    formulation: Formulation
    problem: AllocationProblem
    sizes: SizeModel


class Planner:
    """Allocation over the formats that ``allowed`` and the target leave. ``graph``: prepared, not changed."""

    def __init__(self, graph: Graph, measurements: Measurements, target: Target, allowed: Allowed) -> None:
        if graph.opset > target.runtime.opset_max:
            raise TargetError(
                f"the model needs opset {graph.opset}, target '{target.name}' takes at most {target.runtime.opset_max}",
                hint="export the model with a lower opset, or choose another target",
            )
        self._graph = graph
        self._measurements = measurements
        self._target = target
        self._allowed = allowed
        self._variants: dict[int, _Variant] = {}

    def plan(self, budgets: Sequence[Budget], objective: tuple[Objective, ...]) -> Plan:
        """The best plan, in a file of the lowest opset that expresses it. Raises BudgetError when none fits."""
        variant = self._widest_variant()
        allocation = allocate(variant.problem, budgets, objective)
        needed = self._opset_of(allocation, variant)
        if needed < variant.graph.opset:
            # The same formats may stand differently in the older file, so they are allocated anew.
            variant = self._variant(needed)
            allocation = allocate(variant.problem, budgets, objective)
        return self._write(variant, allocation, budgets, objective)

    def least_error(self, budgets: Sequence[Budget]) -> float:
        """Least relative error within ``budgets``. Raises BudgetError when no plan fits."""
        problem = self._widest_variant().problem
        caps = dict(problem.cap(budget) for budget in budgets)
        found = optimise(build_programme(problem), ("loss",), caps, effort_for(problem, _TIME_LIMIT_S))
        # Without a solution, allocate says why.
        return found[0].totals.relative_error if found else allocate(problem, budgets).totals.relative_error

    def frontier(self, dimension: Dimension, budgets: Sequence[Budget], points: int) -> tuple[Plan, ...]:
        """Plans of least error from the least ``dimension`` upwards; of those as good, the fastest (``TOLERATED``)."""
        variant = self._widest_variant()
        others = tuple(budget for budget in budgets if budget.dimension not in (dimension, "error"))
        plans: list[Plan] = []
        chosen: list[dict[str, str]] = []
        for point in pareto(variant.problem, dimension, budgets, points):
            limits = (Budget(dimension, _used(point, dimension)), tolerated_error(point.totals.relative_error))
            allocation = allocate(variant.problem, (*others, *limits), ("latency", "error"))
            # Neighbouring points can tolerate the same plan.
            if allocation.assignment not in chosen:
                chosen.append(allocation.assignment)
                plans.append(self._write(variant, allocation, budgets, ("error", "latency")))
        return tuple(plans)

    def _write(
        self,
        variant: _Variant,
        allocation: Allocation,
        budgets: Sequence[Budget],
        objective: Sequence[Objective],
    ) -> Plan:
        request = PlanRequest(
            source_sha256=self._measurements.source_sha256,
            budgets=budgets,
            objective=objective,
            opset=variant.graph.opset,
            ir_version=variant.graph.header.ir_version,
        )
        ranges = self._measurements.ranges
        return write_plan(variant.formulation, variant.problem, allocation, ranges, variant.sizes, request)

    # ---- opsets -----------------------------------------------------------------------------------------------------
    def _widest_variant(self) -> _Variant:
        """The lowest opset at which every allowed width has the storage that the target prefers; lower ones where the
        model cannot be raised that far.
        """
        wanted = {self._storage_opset(bits) for bits in self._widths()} | {_LEAST_OPSET}
        wanted |= {21} if any(bits > 8 for bits in self._activation_widths()) else set()
        reasons = []
        for opset in sorted(wanted, reverse=True):
            try:
                return self._variant(opset)
            except PassError as error:
                reasons.append(error)
        if self._graph.opset >= _LEAST_OPSET:
            return self._variant(self._graph.opset)
        raise reasons[-1]

    def _opset_of(self, allocation: Allocation, variant: _Variant) -> int:
        """The least opset that expresses an allocation."""
        formulation = variant.formulation
        needed = {_LEAST_OPSET, self._graph.opset}
        for layer in formulation.structure.layers:
            text = allocation.assignment[layer.name]
            if text != "f32":
                needed.add(self._storage_opset(int(text[1:].split("a")[0])))
        needed |= {21 for name, text in allocation.assignment.items() if text == "a16"}
        return min(max(needed), variant.graph.opset)

    def _storage_opset(self, bits: int) -> int:
        return self._target.storage_for(bits).min_opset

    def _widths(self) -> tuple[int, ...]:
        stored = self._target.weights.stored_bits
        allowed = self._allowed.weight_bits
        return tuple(bits for bits in stored if allowed is None or bits in allowed)

    def _allowed_activations(self) -> tuple[int, ...] | None:
        allowed = self._allowed.activation_bits
        return None if allowed is None else tuple(sorted(allowed))

    def _activation_widths(self) -> tuple[int, ...]:
        allowed = self._allowed.activation_bits
        return tuple(bits for bits in self._target.activations if allowed is None or bits in allowed)

    def _variant(self, opset: int) -> _Variant:
        opset = max(opset, self._graph.opset)
        if opset not in self._variants:
            graph = run_pipeline(raise_to(opset), PassContext.of(self._graph)).graph
            analyses = AnalysisManager(graph, AnalysisInputs(target=self._target))
            analyses.put(RecordedTensors(), self._measurements.tensors)
            formulation = self._formulation(analyses)
            self._variants[opset] = _Variant(graph, formulation, formulation.problem(), analyses.get(SizeModels))
        return self._variants[opset]

    def _formulation(self, analyses: AnalysisManager) -> Formulation:
        return Formulation(
            structure=analyses.get(GraphStructure),
            tensors=self._measurements.tensors,
            errors=self._measurements.errors,
            costs=analyses.get(CostTables(self._widths(), self._allowed_activations())),
            timeline=analyses.get(MemoryTimeline),
            target=self._target,
            allowed=self._allowed,
            quantizable=frozenset(self._measurements.ranges),
            float_size_bytes=self._measurements.source_size_bytes,
            explicit=explicit_movers(analyses.get(GraphStructure), self._target),
        )
