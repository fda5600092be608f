"""A whole analysis in the store: the same question about the same model and data is not measured again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from lcpaq_onnx.manager.analysis import Progress
from lcpaq_onnx.planning.bench import Settings
from lcpaq_onnx.planning.measurements_json import measurements_from, measurements_json
from lcpaq_onnx.runtime.calibration import CalibrationData
from lcpaq_onnx.runtime.resources import Resources
from lcpaq_onnx.store import code_version, key_of
from lcpaq_onnx.tables import Measurements

__all__ = ["analysis_key", "remembered"]

# Beside the code that measures: which entries are measured and how they become a table.
_CHOOSING = ("manager", "allocation", "planning", "verification")


def analysis_key(source_sha256: str, data: CalibrationData, settings: Settings, resources: Resources) -> str | None:
    """Hash of all that decides an analysis; reads all data once. None for a loss of the user's own: what a function
    does cannot be hashed.
    """
    if callable(settings.loss):
        return None
    code = code_version(*_CHOOSING)
    return key_of("analysis", code, source_sha256, data.fingerprint(), repr(settings), ",".join(resources.providers))


def remembered(
    key: str, data: CalibrationData, resources: Resources, progress: Progress, analysis: Callable[[], Measurements]
) -> Measurements:
    """What the store has for ``key``, else ``analysis()``, which it has from then on. The data's name is the one that
    they have now.
    """
    found = resources.store.get(key)
    if found is not None:
        with progress.track("analysis from the store", 1) as advance:
            measurements = measurements_from(json.loads(found["json"].tobytes()))
            advance(1)
        return replace(measurements, calibration=data.description)
    measurements = analysis()
    content = np.frombuffer(measurements_json(measurements).encode(), np.uint8)
    resources.store.put(key, {"json": content}, subject=resources.subject, what="analysis")
    return measurements
