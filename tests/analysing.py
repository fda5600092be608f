"""Analyses of a model in memory on samples in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import numpy_helper, parser

from lcpaq_onnx.errors import ModelError
from lcpaq_onnx.formats import QFormat
from lcpaq_onnx.graph import graph_io
from lcpaq_onnx.manager.analysis import AnalysisInputs, AnalysisManager
from lcpaq_onnx.numeric.losses import LossName
from lcpaq_onnx.numeric.rounding import round_nearest
from lcpaq_onnx.runtime.calibration import open_calibration
from lcpaq_onnx.runtime.session import Session
from lcpaq_onnx.targets.loader import load as load_target

__all__ = ["Feed", "analyses_of", "model_of", "refusing_loss", "rounding_error", "singles"]

Feed = dict[str, np.ndarray]


def model_of(text: str, constants: Mapping[str, np.ndarray], *, opset: int = 21) -> onnx.ModelProto:
    """A model in the syntax of ``onnx.parser`` with these initializers."""
    model = parser.parse_model(f'<ir_version: {10 if opset < 25 else 13}, opset_import: ["": {opset}]> {text}')
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    return model


def singles(name: str, values: np.ndarray) -> list[Feed]:
    """One feed for each sample of ``values``."""
    return [{name: values[index : index + 1]} for index in range(len(values))]


def refusing_loss(teacher: Feed, changed: Feed) -> np.ndarray:
    """A loss that does not like any outputs. Here, where a process that only runs it need not import a test."""
    raise ModelError("these outputs make no sense", hint="give others")


def analyses_of(
    model: onnx.ModelProto,
    samples: Sequence[Feed],
    *,
    loss: LossName = "auto",
    seed: int = 0,
    target: str | None = "onnxruntime-cpu-x86_64-vnni",
) -> AnalysisManager:
    """A manager for ``model`` as it is, with ``samples`` as calibration data."""
    inputs = AnalysisInputs(
        calibration=open_calibration(list(samples), Session(model).inputs),
        target=None if target is None else load_target(target),
        loss=loss,
        seed=seed,
    )
    return AnalysisManager(graph_io.load(model), inputs)


def rounding_error(weight: np.ndarray, bits: int, axis: int | None) -> np.ndarray:
    """By which nearest rounding moves ``weight``; ``axis``: of its output channels."""
    return round_nearest(weight, QFormat(bits=bits, axis=axis)).dequantized() - weight
