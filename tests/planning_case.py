"""Measurements of the shipped residual network, made once for all tests of planning."""

from __future__ import annotations

import functools
from pathlib import Path

from lcpaq_onnx import compiler
from lcpaq_onnx.allocation.problem import AllocationProblem
from lcpaq_onnx.graph import graph_io
from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.manager.analysis import AnalysisInputs, AnalysisManager
from lcpaq_onnx.passes import CostTables, GraphStructure, MemoryTimeline, RecordedTensors
from lcpaq_onnx.passes.analysis.cost_table import explicit_movers
from lcpaq_onnx.planning.bench import Settings
from lcpaq_onnx.planning.choices import Allowed
from lcpaq_onnx.planning.formulate import Formulation
from lcpaq_onnx.planning.planner import Planner
from lcpaq_onnx.tables import Measurements
from lcpaq_onnx.targets.loader import load as load_target

__all__ = [
    "CALIBRATION",
    "EVALUATION",
    "MODELS",
    "VNNI",
    "formulation",
    "measurements",
    "planner",
    "prepared",
    "widest_assignment",
]

FOLDER = Path(__file__).parents[1] / "models"
MODELS = {path.stem: path for path in sorted(FOLDER.glob("*.onnx"))}
CALIBRATION = FOLDER / "digits_calibration.npz"
EVALUATION = FOLDER / "digits_evaluation.npz"
VNNI = "onnxruntime-cpu-x86_64-vnni"
SETTINGS = Settings(sensitivity_samples=32)


@functools.cache
def measurements(name: str = "digits_resnet") -> Measurements:
    return compiler.analyze(MODELS[name], CALIBRATION, samples=32, settings=SETTINGS)


@functools.cache
def prepared(name: str = "digits_resnet") -> Graph:
    return compiler.prepare(graph_io.load(MODELS[name]))


def planner(target: str = VNNI, allowed: Allowed = Allowed(), name: str = "digits_resnet") -> Planner:  # noqa: B008
    return Planner(prepared(name), measurements(name), load_target(target), allowed)


def formulation(
    target: str = VNNI,
    allowed: Allowed = Allowed(),  # noqa: B008 - a frozen value
    name: str = "digits_resnet",
) -> Formulation:
    """The formulation at the model's own opset."""
    measured, loaded = measurements(name), load_target(target)
    analyses = AnalysisManager(prepared(name), AnalysisInputs(target=loaded))
    analyses.put(RecordedTensors(), measured.tensors)
    structure = analyses.get(GraphStructure)
    return Formulation(
        structure=structure,
        tensors=measured.tensors,
        errors=measured.errors,
        costs=analyses.get(CostTables),
        timeline=analyses.get(MemoryTimeline),
        target=loaded,
        allowed=allowed,
        quantizable=frozenset(measured.ranges),
        float_size_bytes=measured.source_size_bytes,
        explicit=explicit_movers(structure, loaded),
    )


def widest_assignment(problem: AllocationProblem) -> dict[str, str]:
    """Every decision in float, nothing stored."""
    return {d.name: "absent" if d.kind == "storage" else "f32" for d in problem.decisions}
