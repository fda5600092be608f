"""A whole analysis in the store: what its key holds, and that declared inputs are those of a session."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from lcpaq_onnx import Execution, Settings, compiler
from lcpaq_onnx.errors import CalibrationError, LcpaqError
from lcpaq_onnx.graph import graph_io
from lcpaq_onnx.manager.analysis import SilentProgress
from lcpaq_onnx.numeric.losses import SquaredError
from lcpaq_onnx.planning.stored_analysis import analysis_key, remembered
from lcpaq_onnx.runtime.calibration import open_calibration
from lcpaq_onnx.runtime.declared import declared_inputs
from lcpaq_onnx.runtime.resources import Resources
from lcpaq_onnx.runtime.session import Session, SessionOptions
from lcpaq_onnx.store import STORE_FILE, MemoryStore
from lcpaq_onnx.tables import ActivationRange, ErrorEntry, ErrorTable, Measurements

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models" / "digits_resnet.onnx"
DATA = ROOT / "models" / "digits_calibration.npz"


def data(samples: int = 4):  # type: ignore[no-untyped-def]  # noqa: ANN201
    return open_calibration(DATA, declared_inputs(graph_io.load(MODEL)), samples=samples)
