"""What an emitted model says of its making, in ``metadata_props``."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["TOOL_VERSION", "model_metadata"]

TOOL_VERSION = "0.1.0"


def model_metadata(target: str, plan_sha256: str) -> Mapping[str, str]:
    """Entries of the emitted model; all values have the same length for every plan of one target."""
    return {"lcpaq.version": TOOL_VERSION, "lcpaq.target": target, "lcpaq.plan": plan_sha256}
