"""How a plan's weights are rounded: nearest as it is written, compensated where data allow it."""

from __future__ import annotations

from lcpaq_onnx.planning.plan import LayerPlan, Plan
from lcpaq_onnx.tables import Compensable

__all__ = ["compensated", "compensated_below_8_bits"]


def compensated(plan: Plan, compensable: Compensable | None) -> Plan | None:
    """``plan`` with compensated rounding of all layers that can have it; None where none can."""
    able = frozenset(compensable.layers) if compensable is not None else frozenset[str]()
    if compensable is None or not any(_rounds(layer, able) for layer in plan.layers):
        return None
    layers = tuple(
        layer.model_copy(update={"rounding": "compensated"}) if _rounds(layer, able) else layer for layer in plan.layers
    )
    return plan.model_copy(
        update={
            "layers": layers,
            "rounding_samples": compensable.samples,
            "calibration_sha256": compensable.data_sha256,
        }
    )


def compensated_below_8_bits(plan: Plan, compensable: Compensable | None) -> Plan:
    """``plan``, compensated if some layer has less than 8 bits: what to choose where nothing can be measured."""
    is_low = any(layer.weight_format != "f32" and layer.qformat.bits < 8 for layer in plan.layers)
    return (compensated(plan, compensable) if is_low else None) or plan


def _rounds(layer: LayerPlan, able: frozenset[str]) -> bool:
    # 16 bits have nothing to make up for.
    return layer.name in able and layer.weight_format != "f32" and layer.qformat.bits <= 8
