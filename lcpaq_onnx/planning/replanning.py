"""Plans from saved measurements, for any target and budget: the model is read but not run.

Apart from ``compiler`` so that planning again loads neither ONNX Runtime nor what reads data: that takes longer than
the planning.
"""

from __future__ import annotations

from collections.abc import Sequence

from lcpaq_onnx.allocation.allocate import Objective
from lcpaq_onnx.budget import Budget, Dimension, parse_budgets
from lcpaq_onnx.errors import UsageError
from lcpaq_onnx.graph import graph_io
from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.manager.pass_base import PassContext
from lcpaq_onnx.manager.pass_manager import run_pipeline
from lcpaq_onnx.passes import PREPARE
from lcpaq_onnx.planning.choices import Allowed
from lcpaq_onnx.planning.goal import Goal, plan_for
from lcpaq_onnx.planning.plan import Plan
from lcpaq_onnx.planning.planner import Planner
from lcpaq_onnx.planning.roundings import compensated_below_8_bits
from lcpaq_onnx.tables import Measurements
from lcpaq_onnx.targets.loader import load as load_target
from lcpaq_onnx.targets.target import Target

__all__ = [
    "DEFAULT_TARGET",
    "Model",
    "allocate",
    "allowed_formats",
    "budgets_of",
    "check_source",
    "check_widths",
    "frontier",
    "prepare",
    "target_of",
]

Model = graph_io.Source
DEFAULT_TARGET = "onnxruntime-cpu-x86_64-vnni"


def allocate(
    model: Model,
    measurements: Measurements,
    *,
    target: str | Target = DEFAULT_TARGET,
    budget: str | Sequence[str] = (),
    objective: Objective | None = None,
    weights: Sequence[int] | None = None,
    activations: Sequence[int] | None = None,
) -> Plan:
    """The optimal plan for ``budget`` from saved ``measurements``; the model is read but not run.

    Without an objective: see ``goal.plan_for``. Raises BudgetError when no plan fits, UsageError when the
    measurements are of another model.
    """
    goal = Goal(budgets_of(budget), objective, allowed_formats(weights, activations))
    plan = plan_for(_planner(model, measurements, target, goal.allowed), goal)
    return compensated_below_8_bits(plan, measurements.compensable)


def frontier(
    model: Model,
    measurements: Measurements,
    *,
    dimension: Dimension = "size",
    target: str | Target = DEFAULT_TARGET,
    budget: str | Sequence[str] = (),
    points: int = 12,
    weights: Sequence[int] | None = None,
    activations: Sequence[int] | None = None,
) -> tuple[Plan, ...]:
    """Plans of least error from the least ``dimension`` upwards, none dominated."""
    planner = _planner(model, measurements, target, allowed_formats(weights, activations))
    plans = planner.frontier(dimension, budgets_of(budget), points)
    return tuple(compensated_below_8_bits(plan, measurements.compensable) for plan in plans)


def prepare(source: Graph) -> Graph:
    """A copy of ``source`` in which weights are exposed and batch norms folded; computes the same."""
    return run_pipeline(PREPARE, PassContext.of(source)).graph


def allowed_formats(weights: Sequence[int] | None, activations: Sequence[int] | None) -> Allowed:
    """Formats a user named by width; 32 among ``activations`` stands for float."""
    bits = None if weights is None else frozenset(weights)
    return Allowed(bits, None if activations is None else frozenset(activations))


def check_widths(allowed: Allowed, target: Target) -> None:
    """Refuse widths that the target has not, which would silently leave everything in float."""
    known = {"weights": set(target.weights.stored_bits), "activations": {*target.activations, 32}}
    for what, bits in (("weights", allowed.weight_bits), ("activations", allowed.activation_bits)):
        unknown = sorted((bits or set()) - known[what])
        if unknown:
            have = ", ".join(map(str, sorted(known[what])))
            raise UsageError(f"target '{target.name}' has no {unknown[0]}-bit {what}", hint=f"use some of {have}")


def check_source(source: Graph, sha256: str, what: str) -> None:
    if graph_io.content_sha256(source) != sha256:
        raise UsageError(f"the {what} was made for another model", hint=f"make the {what} again for this one")


def target_of(target: str | Target) -> Target:
    return target if isinstance(target, Target) else load_target(target)


def budgets_of(budget: str | Sequence[str]) -> tuple[Budget, ...]:
    return parse_budgets([budget] if isinstance(budget, str) else budget)


def _planner(model: Model, measurements: Measurements, target: str | Target, allowed: Allowed) -> Planner:
    source = graph_io.load(model)
    check_source(source, measurements.source_sha256, "analysis")
    loaded = target_of(target)
    check_widths(allowed, loaded)
    return Planner(prepare(source), measurements, loaded, allowed)
