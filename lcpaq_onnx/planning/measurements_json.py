"""Measurements as JSON and back."""

from __future__ import annotations

import json

from pydantic import TypeAdapter

from lcpaq_onnx.tables import Measurements

__all__ = ["measurements_from", "measurements_json"]

_ADAPTER = TypeAdapter(Measurements)


def measurements_json(measurements: Measurements) -> str:
    """JSON of ``measurements``: stable, indented, ends in a newline."""
    return json.dumps(_ADAPTER.dump_python(measurements, mode="json"), indent=1, ensure_ascii=False) + "\n"


def measurements_from(document: object) -> Measurements:
    """Measurements of a parsed JSON document, equal to what was written. Raises pydantic's ValidationError."""
    return _ADAPTER.validate_python(document)
