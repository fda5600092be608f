"""Rows and sums of the report, from the plan and from what was found in the file and in the runtime."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import numpy as np

from lcpaq_onnx.graph.stored import StoredWeight, stored_weight
from lcpaq_onnx.graph.written import WrittenModel
from lcpaq_onnx.planning.plan import LayerPlan, Plan
from lcpaq_onnx.runtime.kernels import Realisation
from lcpaq_onnx.verification.report import (
    FLOAT_BITS,
    ActivationRow,
    BitSummary,
    KernelSummary,
    LayerRow,
    executed_bits,
)
from lcpaq_onnx.verification.run_checks import why_float

__all__ = ["activation_rows", "bit_summary", "kernel_summary", "layer_rows"]


def kernel_summary(plan: Plan, realisation: Realisation | None, macs: Mapping[str, int]) -> KernelSummary | None:
    """None where the model did not run."""
    if realisation is None:
        return None
    integer = [layer.name for layer in plan.layers if realisation.is_integer(layer.name)]
    return KernelSummary(
        macs=sum(macs.values()),
        integer_macs=sum(macs.get(name, 0) for name in integer),
        layers=len(plan.layers),
        integer_layers=len(integer),
        quantize_nodes=realisation.quantize_nodes,
        dequantize_nodes=realisation.dequantize_nodes,
    )


def layer_rows(
    plan: Plan, written: WrittenModel, realisation: Realisation | None, macs: Mapping[str, int]
) -> tuple[LayerRow, ...]:
    """One row for each planned layer, in the plan's order."""
    return tuple(_layer(layer, written, realisation, macs) for layer in plan.layers)


def bit_summary(plan: Plan, rows: tuple[LayerRow, ...]) -> BitSummary | None:
    """None where there are no weights. A weight that layers share counts once; the first of them pays for it."""
    first = {layer.weight: row for layer, row in reversed(list(zip(plan.layers, rows, strict=True)))}
    parameters = sum(row.parameters for row in first.values())
    if not parameters:
        return None
    macs = [row.macs for row in rows]
    return BitSummary(
        stored=sum(row.parameters * row.stored_bits for row in first.values()) / parameters,
        stored_in_all=8 * sum(row.size_bytes for row in rows) / parameters,
        executed=float(np.average([row.executed_bits for row in rows], weights=macs if sum(macs) else None)),
    )


def activation_rows(plan: Plan) -> tuple[ActivationRow, ...]:
    """One row for each planned activation group, in the plan's order."""
    return tuple(
        ActivationRow(
            name=group.name,
            tensors=len(group.tensors),
            format=group.format,
            scale=group.scale,
            zero_point=group.zero_point,
            range=group.range,
            loss=group.loss,
            loss_stderr=group.loss_stderr,
            reason=group.reason,
        )
        for group in plan.activations
    )


def _layer(
    layer: LayerPlan, written: WrittenModel, realisation: Realisation | None, macs: Mapping[str, int]
) -> LayerRow:
    stored = stored_weight(written, layer.weight)
    kernel = None if realisation is None else realisation.kernels.get(layer.name)
    return LayerRow(
        name=layer.name,
        op=layer.op,
        format=layer.format,
        executed=layer.executed,
        kernel="" if kernel is None else kernel.op,
        is_integer=kernel is not None and kernel.is_integer,
        float_reason="not run" if realisation is None else why_float(layer, realisation, written),
        storage=layer.storage,
        stored_bits=_stored_bits(layer, stored),
        executed_bits=executed_bits(
            layer.executed, "" if kernel is None else kernel.op, is_integer=kernel is not None and kernel.is_integer
        ),
        parameters=0 if stored is None else prod(stored.shape),
        size_bytes=layer.size_bytes,
        macs=macs.get(layer.name, 0),
        loss=layer.loss,
        loss_stderr=layer.loss_stderr,
        reason=layer.reason,
    )


def _stored_bits(layer: LayerPlan, stored: StoredWeight | None) -> int:
    """As found in the file; as planned where it is stored in no way that is known."""
    if stored is not None:
        return stored.bits
    return FLOAT_BITS if layer.weight_format == "f32" else layer.qformat.bits
