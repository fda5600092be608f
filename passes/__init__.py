"""The built-in passes: kebab-case name -> ``module:Class``, imported only when asked for. Append a line to add one.

The classes and pipelines that the library itself uses can be imported from here by name; that is lazy too.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .analysis.activation_ranges import ActivationRanges, RangeCandidates
    from .analysis.audit import RandomPlans, audit
    from .analysis.batch_size import BatchSize
    from .analysis.calibration_run import CalibrationRun
    from .analysis.cost_table import CostTables, SizeModels, explicit_movers
    from .analysis.error_table import WEIGHT_BITS, ErrorTables
    from .analysis.graph_structure import GraphStructure
    from .analysis.hessian_diagonals import HessianDiagonals
    from .analysis.memory_timeline import MemoryTimeline
    from .analysis.output_changes import OutputChanges
    from .analysis.recorded_tensors import RecordedTensors
    from .analysis.reliability import Reliability
    from .analysis.rounded_weight import CompensableLayers
    from .analysis.rounding_errors import WeightEntry, every_entry
    from .analysis.teacher import teacher_of
    from .pipelines import PREPARE, QUANTIZE, raise_to
    from .rewrite.migrate_outliers import MigrateOutliers
    from .rewrite.scale_inputs import ScaleInputs

__all__ = [
    "BUILTIN_ANALYSES",
    "BUILTIN_PASSES",
    "PREPARE",
    "QUANTIZE",
    "WEIGHT_BITS",
    "ActivationRanges",
    "BatchSize",
    "CalibrationRun",
    "CompensableLayers",
    "CostTables",
    "ErrorTables",
    "GraphStructure",
    "HessianDiagonals",
    "MemoryTimeline",
    "MigrateOutliers",
    "OutputChanges",
    "RandomPlans",
    "RangeCandidates",
    "RecordedTensors",
    "Reliability",
    "ScaleInputs",
    "SizeModels",
    "WeightEntry",
    "audit",
    "every_entry",
    "explicit_movers",
    "raise_to",
    "teacher_of",
]

BUILTIN_PASSES: dict[str, str] = {
    "canonical-names": "lcpaq_onnx.passes.rewrite.canonical_names:CanonicalNames",
    "equalize-layers": "lcpaq_onnx.passes.rewrite.equalize_layers:EqualizeLayers",
    "fold-batch-norm": "lcpaq_onnx.passes.rewrite.fold_batch_norm:FoldBatchNorm",
    "fold-constants": "lcpaq_onnx.passes.rewrite.fold_constants:FoldConstants",
    "inline-if": "lcpaq_onnx.passes.rewrite.inline_if:InlineIf",
    "insert-qdq": "lcpaq_onnx.passes.rewrite.insert_qdq:InsertQdq",
    "migrate-outliers": "lcpaq_onnx.passes.rewrite.migrate_outliers:MigrateOutliers",
    "look-up-integers": "lcpaq_onnx.passes.rewrite.look_up_integers:LookUpIntegers",
    "pack-weights": "lcpaq_onnx.passes.rewrite.pack_weights:PackWeights",
    "plain-products": "lcpaq_onnx.passes.rewrite.plain_products:PlainProducts",
    "quantize-biases": "lcpaq_onnx.passes.rewrite.quantize_biases:QuantizeBiases",
    "raise-opset": "lcpaq_onnx.passes.rewrite.raise_opset:RaiseOpset",
    "remove-unused": "lcpaq_onnx.passes.rewrite.remove_unused:RemoveUnused",
    "round-compensated": "lcpaq_onnx.passes.rewrite.round_compensated:RoundCompensated",
    "round-nearest": "lcpaq_onnx.passes.rewrite.round_nearest:RoundNearest",
    "scale-inputs": "lcpaq_onnx.passes.rewrite.scale_inputs:ScaleInputs",
    "separate-shared-biases": "lcpaq_onnx.passes.rewrite.separate_shared_biases:SeparateSharedBiases",
    "stamp-plan": "lcpaq_onnx.passes.rewrite.stamp_plan:StampPlan",
}

BUILTIN_ANALYSES: dict[str, str] = {
    "activation-errors": "lcpaq_onnx.passes.analysis.activation_errors:ActivationErrors",
    "activation-ranges": "lcpaq_onnx.passes.analysis.activation_ranges:ActivationRanges",
    "batch-size": "lcpaq_onnx.passes.analysis.batch_size:BatchSize",
    "block-shares": "lcpaq_onnx.passes.analysis.error_table:BlockShares",
    "calibration-run": "lcpaq_onnx.passes.analysis.calibration_run:CalibrationRun",
    "channel-ranges": "lcpaq_onnx.passes.analysis.channel_ranges:ChannelRanges",
    "compensable-layers": "lcpaq_onnx.passes.analysis.rounded_weight:CompensableLayers",
    "cost-table": "lcpaq_onnx.passes.analysis.cost_table:CostTables",
    "error-tables": "lcpaq_onnx.passes.analysis.error_table:ErrorTables",
    "graph-structure": "lcpaq_onnx.passes.analysis.graph_structure:GraphStructure",
    "hessian-diagonals": "lcpaq_onnx.passes.analysis.hessian_diagonals:HessianDiagonals",
    "layer-matrices": "lcpaq_onnx.passes.analysis.input_moments:LayerMatrices",
    "memory-timeline": "lcpaq_onnx.passes.analysis.memory_timeline:MemoryTimeline",
    "recorded-tensors": "lcpaq_onnx.passes.analysis.recorded_tensors:RecordedTensors",
    "output-changes": "lcpaq_onnx.passes.analysis.output_changes:OutputChanges",
    "range-candidates": "lcpaq_onnx.passes.analysis.activation_ranges:RangeCandidates",
    "random-plans": "lcpaq_onnx.passes.analysis.audit:RandomPlans",
    "reliability": "lcpaq_onnx.passes.analysis.reliability:Reliability",
    "input-moments": "lcpaq_onnx.passes.analysis.input_moments:InputMoments",
    "rounding-errors": "lcpaq_onnx.passes.analysis.rounding_errors:RoundingErrors",
    "moment-samples": "lcpaq_onnx.passes.analysis.input_moments:MomentSamples",
    "rounded-weight": "lcpaq_onnx.passes.analysis.rounded_weight:RoundedWeight",
    "rounding-power": "lcpaq_onnx.passes.analysis.error_table:RoundingPower",
    "size-model": "lcpaq_onnx.passes.analysis.cost_table:SizeModels",
}

_ELSEWHERE = {
    "WEIGHT_BITS": ".analysis.error_table",
    "audit": ".analysis.audit",
    "every_entry": ".analysis.rounding_errors",
    "WeightEntry": ".analysis.rounding_errors",
    "explicit_movers": ".analysis.cost_table",
    "PREPARE": ".pipelines",
    "QUANTIZE": ".pipelines",
    "raise_to": ".pipelines",
    "teacher_of": ".analysis.teacher",
}


def __getattr__(name: str) -> object:
    modules = {class_name: module for module, _, class_name in (r.partition(":") for r in _references())} | _ELSEWHERE
    if name not in modules:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(modules[name], __name__), name)
    return value


def _references() -> list[str]:
    return [*BUILTIN_PASSES.values(), *BUILTIN_ANALYSES.values()]
