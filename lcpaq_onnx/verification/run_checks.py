"""Checks of the emitted model as it runs: numerics with and without fusion, and which kernels the runtime chose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lcpaq_onnx.graph.layer_macs import layer_macs, shape_probe
from lcpaq_onnx.graph.ops import facts_of
from lcpaq_onnx.graph.written import WrittenModel, WrittenNode
from lcpaq_onnx.numeric.losses import OutputScaleStream, agreement, relative_squared_error
from lcpaq_onnx.planning.plan import LayerPlan, Plan
from lcpaq_onnx.runtime.calibration import Feed
from lcpaq_onnx.runtime.kernels import Kernel, Realisation
from lcpaq_onnx.runtime.session import Session, SessionOptions
from lcpaq_onnx.verification.file_checks import has_exact_bias
from lcpaq_onnx.verification.report import Check

__all__ = ["FUSION_TOLERANCE", "fusion_check", "kernel_checks", "macs_of", "why_float"]

# Layers named in a check's detail; the report's table has them all.
_NAMED = 3

FUSION_TOLERANCE = 0.01
"""Root mean square difference over the output's range. Each integer kernel may round its last bit otherwise than the
float nodes it replaces (0 or 1 step of 8 bits, in at most 0.05 % of elements); over whole int8 networks 0.6 % at most
was measured (ONNX Runtime 1.32)."""
_FUSION_SHARE = 0.25

Outputs = Mapping[str, np.ndarray]


def fusion_check(expected: Outputs, fused: Outputs, unfused: Outputs, *, decides: bool) -> Check:
    """Outputs of one file with all optimisations and with none, on the same feed as the float model's ``expected``.

    Fusion may also move outputs by a quarter of what quantization moves them: that adds 3 % to the error at most.
    """
    stream = OutputScaleStream()
    stream.update(expected)
    scale = stream.result()
    difference, quantization = (
        float(np.sqrt(relative_squared_error(reference, unfused, scale).mean())) for reference in (fused, expected)
    )
    limit = max(FUSION_TOLERANCE, _FUSION_SHARE * quantization)
    kept = f", {agreement(unfused, fused):.0%} of decisions equal" if decides else ""
    detail = f"rms difference {difference:.3%} of the output's range{kept} (limit {limit:.2%}: "
    detail += "one step of 8 bits per kernel)" if limit == FUSION_TOLERANCE else "a quarter of what quantization moves)"
    return Check(name="fused-equals-unfused", passed=bool(difference <= limit), detail=detail)


def kernel_checks(plan: Plan, realisation: Realisation, emitted: WrittenModel, macs: Mapping[str, int]) -> list[Check]:
    """Do layers planned in integer run in integer kernels, and layers planned in float in float ones?"""
    planned = [layer for layer in plan.layers if _is_planned_integer(layer)]
    missed = [layer for layer in planned if not realisation.is_integer(layer.name)]
    silent = [layer for layer in plan.layers if layer not in planned and realisation.is_integer(layer.name)]
    total = sum(macs.values())
    done = sum(macs.get(layer.name, 0) for layer in plan.layers if realisation.is_integer(layer.name))
    share = f"integer MACs {done / total:.1%}" if total else "no multiply-accumulates"
    reasons = [f"{layer.name}: {why_float(layer, realisation, emitted)}" for layer in missed]
    ops = [f"{layer.name}: planned {layer.format}, runs as {realisation.kernels[layer.name].op}" for layer in silent]
    return [
        Check(name="integer-kernels", passed=not missed, detail="; ".join([share, *_few(reasons)])),
        Check(
            name="no-silent-requantization",
            passed=not silent,
            detail="; ".join(_few(ops)) or f"{len(plan.layers) - len(planned)} layers planned in float stay there",
        ),
    ]


def why_float(layer: LayerPlan, realisation: Realisation, emitted: WrittenModel) -> str:
    """Why a layer does not run in an integer kernel; empty when it does."""
    if realisation.is_integer(layer.name):
        return ""
    kernel = realisation.kernels.get(layer.name)
    if _is_planned_integer(layer):
        seen = "not found in the optimised graph" if kernel is None else f"runs as {_in_words(kernel)}"
        return f"planned {layer.executed}, but {seen}: {_obstacle(layer, emitted)}"
    slow = ", weights dequantized at every run" if kernel is not None and kernel.dequantizes_weight else ""
    return f"planned in float{slow}" + (f": {layer.reason}" if layer.reason else "")


def macs_of(path: Path, model: WrittenModel, plan: Plan, feed: Feed) -> dict[str, int]:
    """Multiply-accumulates of each layer on ``feed``, by running the emitted file once with its layers' outputs."""
    layers = {layer.name: layer.weight for layer in plan.layers}
    session = Session(shape_probe(path, model, layers), SessionOptions("none"), base_dir=path.parent)
    names = [spec.name for spec in session.outputs if spec.is_tensor]
    values = feed | session.run(feed, names)
    return layer_macs(model, layers, {name: tuple(value.shape) for name, value in values.items()})


def _is_planned_integer(layer: LayerPlan) -> bool:
    """Whether its kernel is to multiply integers; one for n-bit blocks makes them of its float input itself."""
    return layer.executed.startswith(("int", "nbits"))


def _in_words(kernel: Kernel) -> str:
    return f"float {kernel.op}" + (" behind DequantizeLinear" if kernel.dequantizes_weight else "")


def _obstacle(layer: LayerPlan, emitted: WrittenModel) -> str:
    """The first known reason why this runtime does not fuse a layer."""
    node = emitted.by_name.get(layer.name)
    if node is None:
        return "the file has no such node"
    if layer.layer_format.block is not None:
        return _block_obstacle(emitted, node)
    if (writer := emitted.producers.get(node.inputs[0])) is None or writer.op != "DequantizeLinear":
        return "its input is not quantized"
    if len(writer.inputs) < 3:
        return "the zero point of its input is not written out"
    if not has_exact_bias(emitted, node):
        return "the scale of its bias is not float32(input scale × weight scale)"
    if not _is_quantized(emitted, node.outputs[0]):
        return "its output is not quantized"
    return "this version of ONNX Runtime has no kernel for it"


def _block_obstacle(emitted: WrittenModel, node: WrittenNode) -> str:
    writer = emitted.producers.get(node.inputs[0])
    if writer is not None and writer.op == "DequantizeLinear":
        return "its input is quantized"
    if _is_quantized(emitted, node.outputs[0]):
        return "its output is quantized"
    return "this version of ONNX Runtime has no kernel for it"


def _is_quantized(emitted: WrittenModel, tensor: str) -> bool:
    """Whether ``tensor`` goes to a QuantizeLinear, directly or through one activation function."""
    for reader in emitted.readers.get(tensor, ()):
        behind = emitted.readers.get(reader.outputs[0], ()) if facts_of(reader.op, reader.domain).activation else ()
        if any(node.op == "QuantizeLinear" for node in (reader, *behind)):
            return True
    return False


def _few(texts: Sequence[str]) -> list[str]:
    """The first of them, and how many more there are."""
    rest = len(texts) - _NAMED
    return [*texts[:_NAMED], *([f"and {rest} more"] if rest > 0 else [])]
