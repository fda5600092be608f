"""Rewrites of the float model that make a plan better: which to try, and whether one was worth it, by measurement.

Models with attention have activations with a few channels far wider than the rest, which one scale for all serves
badly. Moving range to the weights helps there. Convolutional models with a scale for each output channel gained nothing
(docs/passes.md), so they are not tried.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from lcpaq_onnx.allocation.allocate import Objective
from lcpaq_onnx.errors import BudgetError
from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.graph.query import Structure
from lcpaq_onnx.manager.analysis import AnalysisInputs
from lcpaq_onnx.manager.pass_base import PassContext, RewritePass
from lcpaq_onnx.manager.pass_manager import PipelineRun, run_pipeline
from lcpaq_onnx.manager.pipeline import Step, parse_pipeline
from lcpaq_onnx.manager.registry import builtin_registry
from lcpaq_onnx.numeric.columns import MOMENT_SAMPLES
from lcpaq_onnx.passes import MigrateOutliers, ScaleInputs
from lcpaq_onnx.planning.bench import Bench
from lcpaq_onnx.planning.goal import FASTEST, Goal
from lcpaq_onnx.planning.plan import Plan
from lcpaq_onnx.planning.strategy import Emit, Outcome, is_good_enough, search_plan
from lcpaq_onnx.targets.target import Target

__all__ = ["candidates_for", "is_better", "is_worth_trying", "rewritten", "rewritten_if_better"]

# Predicted times and sizes closer than this count as the same: nobody sees the difference.
_SAME = 0.01


def rewritten(prepared: Graph, rewrites: Sequence[str], inputs: AnalysisInputs) -> Graph:
    """``prepared`` after the ``rewrites`` of a plan; itself where there are none. Raises PassError for text that names
    no built-in pass.
    """
    registry = builtin_registry()
    steps = [step for text in rewrites for step in parse_pipeline(text, registry)]
    return _run(prepared, steps, inputs).graph if steps else prepared


def rewritten_if_better(outcome: Outcome, bench: Bench, target: Target, goal: Goal, emit: Emit) -> Outcome:
    """``outcome``, which was found on ``bench``, or what the same search finds after a rewrite, if that is better or
    asked for. Where nothing after a rewrite fits the budgets, ``outcome``.
    """
    is_forced = bench.settings.migration == "always"
    if bench.settings.migration == "never" or not (is_forced or is_worth_trying(outcome, target, goal)):
        return outcome
    activation_bits = 8 if _has_8_bit_activations(target, goal) else 32
    steps = candidates_for(bench.structure, bench.weights_of_layers(), outcome.plan, activation_bits)
    if not steps:
        return outcome
    run = _run(bench.graph, steps, bench.inputs)
    # Those that found nothing to do need not be run again when the plan is applied.
    effective = tuple(str(done.step) for done in run.trace if done.modified)
    if not effective:
        return outcome
    other_bench = bench.of_rewritten(run.graph, effective)
    try:
        other = search_plan(other_bench.graph, other_bench, target, goal, emit)
    except BudgetError:
        return outcome
    # Against the answers of the model as the user gave it.
    other = replace(other, measured=bench.error_of(other.graph), loss_without_rewrites=outcome.measured.loss)
    return other if is_forced or is_better(other, outcome, goal) else outcome


def is_worth_trying(outcome: Outcome, target: Target, goal: Goal) -> bool:
    """Whether 8-bit activations are what ``outcome`` suffers from, or may have kept it from being faster."""
    if not _has_8_bit_activations(target, goal):
        return False
    if goal.is_default:
        # Sensitivities are measured only where the fastest plan of all is not good enough.
        return outcome.sensitivity is not None
    formats = (group.qformat for group in outcome.plan.activations)
    has_integers = any(format is not None and format.bits == 8 for format in formats)
    return goal.error_budget is not None or has_integers


def candidates_for(
    structure: Structure, weight_counts: Mapping[str, int], plan: Plan, activation_bits: int
) -> tuple[RewritePass, ...]:
    """Rewrites for what ``plan`` rounds; none for models without attention, a product of two activations.
    ``weight_counts``: number of weights of each layer. ``activation_bits``: to expect, 32 for float.
    """
    if not any(operator.op == "MatMul" and len(operator.inputs) == 2 for operator in structure.operators):
        return ()
    lookups = {layer.name for layer in structure.layers if layer.is_lookup}
    bits = _expected_bits(weight_counts, plan, lookups)
    return (
        MigrateOutliers(weights=bits, activations=activation_bits),
        ScaleInputs(weights=bits, activations=activation_bits),
    )


def is_better(found: Outcome, other: Outcome, goal: Goal) -> bool:
    """Whether ``found`` does better at ``goal`` than ``other``: by what the goal asks for first, then by the next.
    Error is measured, and counts where the difference is clear. Both fit the budgets.
    """
    objectives = goal.objectives
    if goal.is_default:
        is_enough = is_good_enough(found.measured)
        if is_enough != is_good_enough(other.measured):
            return is_enough
        objectives = FASTEST if is_enough else ("error",)
    for objective in objectives:
        if objective == "error":
            return found.measured.is_clearly_below(other.measured)
        costs = _cost(found.plan, objective), _cost(other.plan, objective)
        if not math.isclose(*costs, rel_tol=_SAME):
            return costs[0] < costs[1]
    return False


def _has_8_bit_activations(target: Target, goal: Goal) -> bool:
    return 8 in (goal.allowed.activation_bits or target.activations)


def _run(graph: Graph, steps: Sequence[Step], inputs: AnalysisInputs) -> PipelineRun:
    """On the samples that a plan's ``calibration_sha256`` covers."""
    data = inputs.calibration
    few = inputs if data is None else replace(inputs, calibration=data.take(MOMENT_SAMPLES))
    return run_pipeline(steps, PassContext.of(graph, few))


def _cost(plan: Plan, objective: Objective) -> float:
    return plan.predicted.latency_us if objective == "latency" else float(plan.predicted.size_bytes)


def _expected_bits(weight_counts: Mapping[str, int], plan: Plan, lookups: set[str]) -> int:
    """Mean width of the weights that multiply something; rounding that is compensated comes to one bit more."""
    layers = [layer for layer in plan.layers if layer.weight_format != "f32" and layer.name not in lookups]
    total = sum(weight_counts[layer.name] for layer in layers)
    if not total:
        return 8
    mean = sum(weight_counts[layer.name] * layer.qformat.bits for layer in layers) / total
    is_compensated = any(layer.rounding == "compensated" for layer in layers)
    return min(8, round(mean + is_compensated))
