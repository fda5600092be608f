"""lcpaq: a compiler from FP32 ONNX models to mixed-precision quantized ONNX models.

    import lcpaq_onnx
    quantized = lcpaq_onnx.quantize("model.onnx", "calibration.npz", budget="size<=0.25x")
    quantized.save("model.int.onnx")

Everything in ``__all__`` is public and is imported when first used (PEP 562): ``import lcpaq_onnx`` itself loads
neither onnx nor numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from lcpaq_onnx.provenance import TOOL_VERSION

if TYPE_CHECKING:
    from lcpaq_onnx.artefacts import read_measurements, write_measurements
    from lcpaq_onnx.budget import Budget
    from lcpaq_onnx.compiler import (
        DEFAULT_TARGET,
        Execution,
        Quantized,
        Settings,
        allocate,
        analyze,
        apply,
        frontier,
        prepare,
        quantize,
        verify,
    )
    from lcpaq_onnx.errors import (
        BudgetError,
        CalibrationError,
        CheckError,
        LcpaqError,
        ModelError,
        PassError,
        TargetError,
        UsageError,
    )
    from lcpaq_onnx.graph.graph_io import Graph, load, save
    from lcpaq_onnx.manager.analysis import Progress
    from lcpaq_onnx.planning.plan import Plan
    from lcpaq_onnx.tables import Measurements
    from lcpaq_onnx.targets.loader import load as load_target
    from lcpaq_onnx.targets.target import Target
    from lcpaq_onnx.verification.report import Report

__all__ = [
    "DEFAULT_TARGET",
    "Budget",
    "BudgetError",
    "CalibrationError",
    "CheckError",
    "Execution",
    "Graph",
    "LcpaqError",
    "Measurements",
    "ModelError",
    "PassError",
    "Plan",
    "Progress",
    "Quantized",
    "Report",
    "Settings",
    "Target",
    "TargetError",
    "UsageError",
    "__version__",
    "allocate",
    "analyze",
    "apply",
    "frontier",
    "load",
    "load_target",
    "prepare",
    "quantize",
    "read_measurements",
    "save",
    "verify",
    "write_measurements",
]

__version__ = TOOL_VERSION

_ERRORS = (
    *("BudgetError", "CalibrationError", "CheckError", "LcpaqError"),
    *("ModelError", "PassError", "TargetError", "UsageError"),
)
_STEPS = (
    *("DEFAULT_TARGET", "Execution", "Quantized", "Settings", "allocate", "analyze", "apply", "frontier", "prepare"),
    *("quantize", "verify"),
)
# Public name -> module and name there.
_HOMES: dict[str, tuple[str, str]] = {
    **{name: ("errors", name) for name in _ERRORS},
    **{name: ("compiler", name) for name in _STEPS},
    "Budget": ("budget", "Budget"),
    "Graph": ("graph.graph_io", "Graph"),
    "Measurements": ("tables", "Measurements"),
    "Plan": ("planning.plan", "Plan"),
    "Progress": ("manager.analysis", "Progress"),
    "Report": ("verification.report", "Report"),
    "Target": ("targets.target", "Target"),
    "load": ("graph.graph_io", "load"),
    "load_target": ("targets.loader", "load"),
    "read_measurements": ("artefacts", "read_measurements"),
    "save": ("graph.graph_io", "save"),
    "write_measurements": ("artefacts", "write_measurements"),
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    module, attribute = _HOMES[name]
    value: object = getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
