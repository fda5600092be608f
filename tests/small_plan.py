"""A small convolutional network with a plan made by hand, emitted through the real passes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info

from lcpaq_onnx.formats import LayerFormat, QFormat
from lcpaq_onnx.graph import graph_io
from lcpaq_onnx.graph.query import Layer, structure_of
from lcpaq_onnx.graph.subgraph import with_outputs
from lcpaq_onnx.manager.pass_base import PassContext
from lcpaq_onnx.manager.pass_manager import run_pipeline
from lcpaq_onnx.numeric.rounding import activation_parameters
from lcpaq_onnx.passes.rewrite.insert_qdq import InsertQdq
from lcpaq_onnx.passes.rewrite.pack_weights import PackWeights
from lcpaq_onnx.passes.rewrite.quantize_biases import QuantizeBiases
from lcpaq_onnx.passes.rewrite.round_nearest import RoundNearest
from lcpaq_onnx.passes.rewrite.stamp_plan import StampPlan
from lcpaq_onnx.planning.plan import ActivationPlan, LayerPlan, Plan, Predicted, Proof
from lcpaq_onnx.provenance import TOOL_VERSION
from lcpaq_onnx.runtime.calibration import CalibrationData, open_calibration
from lcpaq_onnx.runtime.session import Session

__all__ = ["Emitted", "emit", "float_model", "images", "make_plan"]

_PASSES = (RoundNearest(), QuantizeBiases(), InsertQdq(), PackWeights(), StampPlan())
_ACTIVATION = QFormat(bits=8, signed=False, symmetric=False)
_STORAGE = {8: "plain", 4: "cast", 2: "cast"}
# Multiply-accumulates of float_model on one 16 x 16 image.
MACS = {
    "stem": 8 * 3 * 9 * 256,
    "depthwise": 8 * 9 * 256,
    "middle": 8 * 8 * 9 * 256,
    "head/project": 16 * 8 * 256,
    "classify": 16 * 5,
}


@dataclass(frozen=True, eq=False)
class Emitted:
    """A plan, its file, and what verification compares it with."""

    original: Path
    path: Path
    plan: Plan
    data: CalibrationData


def float_model(opset: int = 21) -> onnx.ModelProto:
    """Conv, Relu, depthwise Conv, Conv, Relu, 1x1 Conv, pooling, Gemm: class scores of 5 classes for 16 x 16 images."""
    rng = np.random.default_rng(0)
    constants: list[onnx.TensorProto] = []

    def weight(name: str, *shape: int) -> list[str]:
        values = rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))
        constants.append(numpy_helper.from_array(values.astype(np.float32), f"{name}.weight"))
        constants.append(numpy_helper.from_array((0.1 * rng.normal(size=shape[0])).astype(np.float32), f"{name}.bias"))
        return [f"{name}.weight", f"{name}.bias"]

    pads = [1, 1, 1, 1]
    nodes = [
        make_node("Conv", ["image", *weight("stem", 8, 3, 3, 3)], ["stem_out"], "stem", pads=pads),
        make_node("Relu", ["stem_out"], ["stem_relu"], "stem_relu"),
        make_node("Conv", ["stem_relu", *weight("dw", 8, 1, 3, 3)], ["dw_out"], "depthwise", pads=pads, group=8),
        make_node("Conv", ["dw_out", *weight("mid", 8, 8, 3, 3)], ["mid_out"], "middle", pads=pads),
        make_node("Relu", ["mid_out"], ["mid_relu"], "mid_relu"),
        make_node("Conv", ["mid_relu", *weight("project", 16, 8, 1, 1)], ["project_out"], "head/project"),
        make_node("GlobalAveragePool", ["project_out"], ["pooled"], "pool"),
        make_node("Flatten", ["pooled"], ["features"], "flatten"),
        make_node("Gemm", ["features", *weight("fc", 5, 16)], ["scores"], "classify", transB=1),
    ]
    graph = make_graph(
        nodes,
        "small",
        [make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 16, 16])],
        [make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 5])],
        constants,
    )
    return make_model(graph, opset_imports=[make_opsetid("", opset)], ir_version=10 if opset < 25 else 13)


def images(count: int = 12) -> list[dict[str, np.ndarray]]:
    """Samples of unlike contrast, so that decisions differ."""
    rng = np.random.default_rng(1)
    return [{"image": (rng.normal(size=(1, 3, 16, 16)) * (0.5 + i % 3)).astype(np.float32)} for i in range(count)]


def make_plan(formats: dict[str, str], *, isolate: bool = True, **changes: object) -> Plan:
    """A plan for ``float_model``: the named layers in these formats, all others and all activations in 8 bits."""
    model = float_model()
    graph = graph_io.load(model)
    written = [name for node in model.graph.node for name in node.output]
    values = Session(with_outputs(model, written)).run({"image": np.concatenate([s["image"] for s in images()])})
    values["image"] = np.concatenate([s["image"] for s in images()])
    structure = structure_of(graph, {name: np.dtype(np.float32) for name in values})
    activations = []
    for group in structure.groups:
        low, high = float(values[group.name].min()), float(values[group.name].max())
        scale, zero_point = activation_parameters(low, high, _ACTIVATION)
        activations.append(
            ActivationPlan(
                name=group.name,
                tensors=group.tensors,
                format=str(_ACTIVATION),
                scale=float(scale),
                zero_point=zero_point,
                range=(low, high),
                loss=1e-5 * (1 + len(activations)),
                reason="read or written by an integer kernel",
            )
        )
    layers = tuple(_layer_plan(layer, formats.get(layer.name, "w8a8"), isolate, values) for layer in structure.layers)
    fields = {
        "tool_version": TOOL_VERSION,
        "source_sha256": "0" * 64,
        "target": "onnxruntime-cpu-x86_64-vnni",
        "budgets": (),
        "objective": ("error",),
        "opset": 21,
        "ir_version": 10,
        "layers": layers,
        "activations": tuple(activations),
        "predicted": Predicted(
            loss=1e-3,
            relative_error=0.02,
            size_bytes=0,
            latency_us=40.0,
            bops=64.0 * sum(MACS.values()),
            stored_bits=8.0,
            peak_memory_bytes=9000,
            float_size_bytes=model.ByteSize(),
            float_latency_us=90.0,
            float_bops=1024.0 * sum(MACS.values()),
            float_peak_memory_bytes=36000,
        ),
        "proof": Proof(optimal=True, gap=0.0, solver="by hand", shadow_prices=("+100 B of size buys -3 % loss",)),
    }
    return Plan.model_validate({**fields, **changes})


def emit(folder: Path, plan: Plan, *, samples: int = 12) -> Emitted:
    """Write original and emitted file; the plan's predicted size is set to what its file takes."""
    original = folder / "small.onnx"
    onnx.save(float_model(plan.opset), original)
    graph = graph_io.load(original)
    path = folder / "small.lcpaq.onnx"
    for _ in range(2):  # the stamp does not change length with the plan, so the second size is the first
        graph_io.save(run_pipeline(_PASSES, PassContext.of(graph, plan=plan)).graph, path)
        predicted = plan.predicted.model_copy(update={"size_bytes": path.stat().st_size})
        plan = plan.model_copy(update={"predicted": predicted})
    data = open_calibration(images(samples), Session(original).inputs)
    return Emitted(original, path, plan, data)


def _layer_plan(layer: Layer, text: str, isolate: bool, values: dict[str, np.ndarray]) -> LayerPlan:
    format = LayerFormat.parse(text)
    is_integer = format.activation_bits == 8
    bits = format.weight_bits
    isolated = isolate and not is_integer
    return LayerPlan(
        name=layer.name,
        op=layer.op,
        format=text,
        executed="int8" if is_integer else "f32",
        input=layer.input,
        input_channels=values[layer.input].shape[1] if isolated else 0,
        weight=layer.weight,
        weight_format="f32" if bits is None else str(QFormat(bits=bits, axis=layer.channel_axis)),
        storage="float" if bits is None else _STORAGE.get(bits, "packed-bytes"),
        bias=layer.bias,
        bias_format="int32" if is_integer else "f32",
        isolate_input=isolated,
        reason=f"{text} by hand",
        loss=1e-4,
        loss_stderr=1e-5,
        size_bytes=100,
    )
