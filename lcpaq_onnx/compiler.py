"""The embedding API: ``quantize``, and its steps ``analyze``, ``allocate`` (the plan), ``apply`` and ``verify``.

Models are given as paths or protos and never changed. Every step takes and returns plain values, so each can run in
another process and its result be saved between.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lcpaq_onnx.allocation.allocate import Objective
from lcpaq_onnx.errors import UsageError
from lcpaq_onnx.graph import graph_io
from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.manager.analysis import AnalysisInputs, Progress, SilentProgress
from lcpaq_onnx.manager.pass_base import PassContext
from lcpaq_onnx.manager.pass_manager import run_pipeline
from lcpaq_onnx.numeric.columns import MOST_MOMENT_SAMPLES
from lcpaq_onnx.passes import QUANTIZE, raise_to
from lcpaq_onnx.planning.bench import Bench, Settings
from lcpaq_onnx.planning.goal import Goal
from lcpaq_onnx.planning.opening import open_bench, open_data
from lcpaq_onnx.planning.plan import Plan
from lcpaq_onnx.planning.refinement import full_analysis
from lcpaq_onnx.planning.replanning import (
    DEFAULT_TARGET,
    Model,
    allocate,
    allowed_formats,
    budgets_of,
    check_source,
    check_widths,
    frontier,
    prepare,
    target_of,
)
from lcpaq_onnx.planning.rewrites import rewritten, rewritten_if_better
from lcpaq_onnx.planning.stored_analysis import analysis_key, remembered
from lcpaq_onnx.planning.strategy import Outcome, search_plan
from lcpaq_onnx.runtime.calibration import Source, open_calibration
from lcpaq_onnx.runtime.declared import declared_inputs
from lcpaq_onnx.runtime.resources import Execution
from lcpaq_onnx.tables import Measurements
from lcpaq_onnx.targets.loader import load as load_target
from lcpaq_onnx.targets.target import Target
from lcpaq_onnx.verification.model_run import Known, VerifyOptions
from lcpaq_onnx.verification.report import Report
from lcpaq_onnx.verification.verify import verify as verify_file

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = [
    "DEFAULT_TARGET",
    "Execution",
    "Model",
    "Quantized",
    "Settings",
    "allocate",
    "allowed_formats",
    "analyze",
    "apply",
    "frontier",
    "prepare",
    "quantize",
    "verify",
]

# A first look, kept short beside the rest of the job; ``verify`` times ten times as long.
_TIMING_S = 0.1


@dataclass(frozen=True, eq=False)
class Quantized:
    """What ``quantize`` returns: the model, the plan that made it, the report that proves it."""

    graph: Graph
    plan: Plan
    report: Report

    @property
    def model(self) -> ModelProto:
        """A proto to run or to serialize; models with external data are better written with ``save``."""
        return graph_io.to_proto(self.graph)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model atomically."""
        graph_io.save(self.graph, path)


def quantize(
    model: Model,
    calibration: Source,
    *,
    target: str | Target = DEFAULT_TARGET,
    budget: str | Sequence[str] = (),
    objective: Objective | None = None,
    weights: Sequence[int] | None = None,
    activations: Sequence[int] | None = None,
    samples: int | None = None,
    settings: Settings = Settings(),  # noqa: B008 - a frozen value
    execution: Execution = Execution(),  # noqa: B008 - a frozen value
    progress: Progress | None = None,
) -> Quantized:
    """Quantize ``model`` for ``target`` within ``budget``.

    ``calibration``: a path (``.npz``, folder, image spec) or any iterable of feeds. ``budget``: texts such as
    ``size<=0.16x``. ``weights``, ``activations``: widths the planner may use. ``samples``: how many of the data.
    ``execution``: workers, memory and the store of measured results; it does not change the answer.

    Without a budget: the fastest plan whose error, measured on the calibration data, stays within 1 % of the output's
    scale with 99 % of the decisions kept. With an error budget: the fastest, then smallest plan within it. With other
    budgets: the plan of least error, or a faster one whose error is as good (``goal.plan_for``).

    Raises BudgetError when no plan fits, and LcpaqError for a bad model, data or target.
    """
    loaded = target_of(target)
    source = graph_io.load(model)
    goal = Goal(budgets_of(budget), objective, allowed_formats(weights, activations))
    check_widths(goal.allowed, loaded)
    with execution.resources(_name(model, source)) as resources:
        bench = open_bench(source, calibration, samples, settings, progress, resources)
        outcome, report = _search(model, bench, loaded, goal)
    return Quantized(outcome.graph, outcome.plan, report)


def _search(model: Model, bench: Bench, target: Target, goal: Goal) -> tuple[Outcome, Report]:
    outcome = _best(bench, target, goal)
    report = _prove(model, outcome, bench, target)
    if not goal.is_default or goal.allowed.activation_bits is not None or not _is_slower(report):
        return outcome, report
    allowed = replace(goal.allowed, activation_bits=frozenset({32}))
    outcome = _best(bench, target, replace(goal, allowed=allowed))
    slower = f"integer execution measured {1 / _speedup(report):.2f}x the float time; weights are stored small instead"
    report = _prove(model, outcome, bench, target)
    return outcome, report.model_copy(update={"warnings": (*report.warnings, slower)})


def _best(bench: Bench, target: Target, goal: Goal) -> Outcome:
    emit = partial(_emit, inputs=bench.inputs)
    return rewritten_if_better(search_plan(bench.graph, bench, target, goal, emit), bench, target, goal, emit)


def analyze(
    model: Model,
    calibration: Source,
    *,
    samples: int | None = None,
    settings: Settings = Settings(),  # noqa: B008 - a frozen value
    execution: Execution = Execution(),  # noqa: B008 - a frozen value
    progress: Progress | None = None,
) -> Measurements:
    """Measure ranges, Hessian diagonals and the error table: all that ``allocate`` needs, for any target and budget.

    With a cache folder in ``execution``, what was analysed once is taken from there, without running the model: for the
    same model, data, settings, providers and code. Raises LcpaqError for a bad model or data.
    """
    source = graph_io.load(model)
    with execution.resources(_name(model, source)) as resources:

        def measured(data: Source, samples: int | None) -> Measurements:
            return full_analysis(open_bench(source, data, samples, settings, progress, resources))

        if execution.cache is None:
            return measured(calibration, samples)
        data = open_calibration(calibration, declared_inputs(source), samples=samples)
        key = analysis_key(graph_io.content_sha256(source), data, settings, resources)
        if key is None:
            return measured(data, None)
        return remembered(key, data, resources, progress or SilentProgress(), lambda: measured(data, None))


def apply(
    model: Model,
    plan: Plan,
    calibration: Source | None = None,
    *,
    samples: int | None = None,
    execution: Execution = Execution(),  # noqa: B008 - a frozen value
    progress: Progress | None = None,
) -> Graph:
    """The quantized model that ``plan`` describes; the same bytes every time. Save it with ``graph_io.save``.

    ``calibration``: what the plan was made with; needed where it rounds weights with compensation or moves range from
    activations to weights, and else not read.
    Raises UsageError when the plan was made for another model or from other data.
    """
    source = graph_io.load(model)
    check_source(source, plan.source_sha256, "plan")
    if not plan.calibration_sha256:
        return _emit(rewritten(prepare(source), plan.rewrites, AnalysisInputs()), plan, AnalysisInputs())
    if calibration is None:
        raise UsageError(
            "the plan changes weights by what it sees in calibration data (compensated rounding, moved range)",
            hint="give the data that the plan was made with (--calibration DATA)",
        )
    data = open_data(source, calibration, samples)
    if data.take(MOST_MOMENT_SAMPLES).fingerprint() != plan.calibration_sha256:
        raise UsageError(
            f"the plan was made with other calibration data than {data.description}",
            hint="give the same data, and the same --samples if there were any, or plan again",
        )
    with execution.resources(_name(model, source)) as resources:
        inputs = AnalysisInputs(calibration=data, progress=progress or SilentProgress(), resources=resources)
        return _emit(rewritten(prepare(source), plan.rewrites, inputs), plan, inputs)


def verify(
    model: Model,
    emitted: str | os.PathLike[str],
    calibration: Source,
    plan: Plan,
    *,
    samples: int | None = None,
    settings: Settings = Settings(),  # noqa: B008 - a frozen value
) -> Report:
    """Check an emitted file against its plan and the float model, and time both."""
    source = graph_io.load(model)
    data = open_data(source, calibration, samples)
    return verify_file(
        _original(model), Path(emitted), data, plan=plan, target=load_target(plan.target), loss=settings.loss
    )


def _emit(graph: Graph, plan: Plan, inputs: AnalysisInputs) -> Graph:
    """``graph``: prepared, and rewritten as the plan says."""
    return run_pipeline((*raise_to(plan.opset), *QUANTIZE), PassContext.of(graph, inputs, plan)).graph


def _is_slower(report: Report) -> bool:
    return _speedup(report) < 1


def _speedup(report: Report) -> float:
    return report.latency.speedup if report.latency else 1.0


def _prove(model: Model, outcome: Outcome, bench: Bench, target: Target) -> Report:
    """Verify what ``quantize`` emitted; its error is measured already."""
    known = Known(
        measured=outcome.measured,
        reference=bench.reference,
        loss_name=bench.loss_name,
        sensitivity=outcome.sensitivity,
        loss_without_rewrites=outcome.loss_without_rewrites,
    )
    with tempfile.TemporaryDirectory(prefix="lcpaq-") as folder:
        path = Path(folder) / "model.onnx"
        graph_io.save(outcome.graph, path)
        options = VerifyOptions(timing_s=_TIMING_S)
        report = verify_file(
            _original(model), path, bench.data, plan=outcome.plan, target=target, options=options, known=known
        )
    return report.model_copy(update={"warnings": (*report.warnings, *outcome.warnings)})


def _name(model: Model, source: Graph) -> str:
    """What a person calls the model."""
    return Path(model).name if isinstance(model, (str, os.PathLike)) else source.name or "model"


def _original(model: Model) -> Path | ModelProto:
    return Path(model) if isinstance(model, (str, os.PathLike)) else model
