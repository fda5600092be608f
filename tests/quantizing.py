"""Small random networks, random legal plans for them, and what the planned model must compute, worked out apart.

Everything follows from one seed, so a failing case is reproduced by its number.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info

from lcpaq_onnx.formats import LayerFormat, QFormat
from lcpaq_onnx.graph import graph_io
from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.graph.query import Layer, Structure, input_channels, structure_of
from lcpaq_onnx.graph.subgraph import with_outputs
from lcpaq_onnx.manager.pass_base import PassContext
from lcpaq_onnx.manager.pass_manager import run_pipeline
from lcpaq_onnx.numeric.rounding import activation_parameters, fake_quantize, round_nearest
from lcpaq_onnx.passes import QUANTIZE
from lcpaq_onnx.planning.plan import ActivationPlan, LayerPlan, Plan, Predicted, Proof, Storage
from lcpaq_onnx.provenance import TOOL_VERSION
from lcpaq_onnx.runtime.session import Session, SessionOptions
from lcpaq_onnx.tables import RecordedTensor

__all__ = ["Prepared", "Simulated", "emit", "plan_of", "prepare", "random_model", "random_plan", "simulate"]

Feed = dict[str, np.ndarray]
UINT8 = QFormat(bits=8, signed=False, symmetric=False)
INT8 = QFormat(bits=8, symmetric=True)
UINT16 = QFormat(bits=16, signed=False, symmetric=False)
_UNFUSED = SessionOptions("none", threads=1)


# ---- models ---------------------------------------------------------------------------------------------------------
@dataclass
class _Builder:
    rng: np.random.Generator
    long_names: bool
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)

    def name(self, text: str) -> str:
        # Above 127 bytes a length takes two bytes in the file.
        tail = "/part" * int(self.rng.integers(0, 30)) if self.long_names else ""
        return f"{text}{len(self.nodes)}{tail}"

    def constant(self, *shape: int) -> str:
        name = self.name(f"c{len(self.constants)}_")
        fan_in = max(1, int(np.prod(shape[1:])))
        values = (self.rng.normal(size=shape) / np.sqrt(fan_in)).astype(np.float32)
        self.constants.append(numpy_helper.from_array(values, name))
        return name

    def integers(self, *values: int) -> str:
        name = self.name(f"k{len(self.constants)}_")
        self.constants.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def scalar(self, value: float) -> str:
        name = self.name(f"s{len(self.constants)}_")
        self.constants.append(numpy_helper.from_array(np.array(value, np.float32), name))
        return name

    def node(self, op: str, inputs: list[str], **attributes: object) -> str:
        output = self.name("t")
        self.nodes.append(make_node(op, inputs, [output], self.name(f"{op.lower()}_"), **attributes))
        return output


def random_model(seed: int, *, opset: int = 21) -> onnx.ModelProto:
    """Conv (grouped, strided, with or without bias), ConvTranspose, Relu, Clip, Add, Concat, MaxPool, Pad on 6 x 6
    images, then pooling or Flatten, Gemm or MatMul; one or two outputs; now and then a shared weight and long names.
    """
    rng = np.random.default_rng(seed)
    b = _Builder(rng, long_names=bool(rng.integers(0, 2)))
    tensors = [("image", 3, 6)]
    for _ in range(int(rng.integers(2, 6))):
        name, channels, extent = tensors[int(rng.integers(max(0, len(tensors) - 2), len(tensors)))]
        tensors.append(_block(b, rng, tensors, name, channels, extent))
    name, channels, extent = tensors[-1]
    outputs = []
    if rng.integers(0, 2):
        name, features = b.node("GlobalAveragePool", [name]), channels
    else:
        features = channels * extent * extent
    name = b.node("Flatten", [name])
    if rng.integers(0, 2):
        scores = b.node("Gemm", [name, b.constant(4, features), b.constant(4)], transB=1)
    else:
        scores = b.node("MatMul", [name, b.constant(features, 4)])
    outputs.append(scores)
    if len(tensors) > 2 and rng.integers(0, 2):
        outputs.append(tensors[-2][0])
    outputs = [o for o in outputs if o != "image"]
    graph = make_graph(
        b.nodes,
        "random",
        [make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, 6, 6])],
        [make_tensor_value_info(o, TensorProto.FLOAT, ["n"] + [None] * (1 if o == scores else 3)) for o in outputs],
        b.constants,
    )
    return make_model(graph, opset_imports=[make_opsetid("", opset)], ir_version=10 if opset < 25 else 13)


def _block(
    b: _Builder, rng: np.random.Generator, tensors: list[tuple[str, int, int]], name: str, channels: int, extent: int
) -> tuple[str, int, int]:
    kinds = ["conv", "conv", "conv-relu", "conv-clip", "depthwise", "residual", "concat", "pool", "up", "twin", "pad"]
    kind = rng.choice(kinds)
    if kind == "pad" and extent <= 4:
        fill = [b.scalar(0.0)] if rng.integers(0, 2) else []
        return b.node("Pad", [name, b.integers(0, 0, 1, 0, 0, 0, 0, 1), *fill]), channels, extent + 1
    if kind == "pool" and extent > 2:
        pooled = b.node("MaxPool", [name], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
        return pooled, channels, (extent + 1) // 2
    if kind == "up" and extent <= 3:
        group = 2 if channels % 2 == 0 and rng.integers(0, 2) else 1
        up = b.node(
            "ConvTranspose", [name, b.constant(channels, 4 // group, 2, 2)], strides=[2, 2], group=group
        )  # fmt: skip
        return up, 4, 2 * extent
    same = [t for t in tensors if t[1:] == (channels, extent) and t[0] != name]
    if kind in ("residual", "concat") and same:
        other = same[int(rng.integers(0, len(same)))][0]
        if kind == "residual":
            total = b.node("Add", [name, other])
            return (b.node("Relu", [total]) if rng.integers(0, 2) else total), channels, extent
        return b.node("Concat", [name, other], axis=1), 2 * channels, extent
    if kind == "twin":
        weight = b.constant(channels, channels, 1, 1)
        first = b.node("Conv", [name, weight])
        return b.node("Conv", [first, weight, b.constant(channels)]), channels, extent
    group = channels if kind == "depthwise" else 1
    out = channels if kind == "depthwise" else int(rng.choice([2, 4, 6]))
    inputs = [name, b.constant(out, channels // group, 3, 3)]
    if rng.integers(0, 3):
        inputs.append(b.constant(out))
    stride = 2 if extent > 3 and rng.integers(0, 4) == 0 else 1
    y = b.node("Conv", inputs, pads=[1, 1, 1, 1], group=group, strides=[stride, stride])
    if kind == "conv-relu":
        y = b.node("Relu", [y])
    if kind == "conv-clip":
        y = b.node("Clip", [y, b.scalar(-0.25), b.scalar(1.5)])
    return y, out, (extent + stride - 1) // stride


# ---- preparation and plans ------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Prepared:
    """A loaded model with all its tensors on one feed."""

    graph: Graph
    structure: Structure
    feed: Feed
    values: dict[str, np.ndarray]

    @property
    def movers(self) -> frozenset[str]:
        """Nodes that can only be written on the integers themselves."""
        group_of = self.structure.group_of()
        pads = [node for node in self.graph.nodes if node.op == "Pad"]
        return frozenset(n.name for n in pads if group_of[n.inputs[0].name] == group_of[n.outputs[0].name])

    @property
    def recorded(self) -> dict[str, RecordedTensor]:
        return {name: RecordedTensor(v.dtype.name, (1, *v.shape[1:])) for name, v in self.values.items()}


def prepare(model: onnx.ModelProto, feed: Feed | None = None) -> Prepared:
    """Load ``model`` and run it, nothing optimized; without a feed on four random images."""
    feed = feed or {"image": np.random.default_rng(7).normal(size=(4, 3, 6, 6)).astype(np.float32)}
    graph = graph_io.load(model)
    written = [name for node in model.graph.node for name in node.output if name]
    values = feed | Session(with_outputs(model, written), _UNFUSED).run(feed)
    return Prepared(graph, structure_of(graph, {name: value.dtype for name, value in values.items()}), feed, values)


def random_plan(prepared: Prepared, seed: int, *, opset: int = 21) -> Plan:
    """Any legal mixture of formats: integer layers only between 8-bit tensors, float ones isolated from them."""
    rng = np.random.default_rng(seed)
    choices = [None, UINT8, UINT8, UINT8, INT8, UINT16]
    groups = {group.name: choices[int(rng.integers(0, len(choices)))] for group in prepared.structure.groups}
    group_of = prepared.structure.group_of()
    by_weight: dict[str, str] = {}
    formats: dict[str, str] = {}
    for layer in prepared.structure.layers:
        ends = [groups[group_of[name]] for name in (layer.input, layer.output)]
        options = ["f32", "w16", *(f"w{bits}" for bits in range(2, 9))]
        if ends[0] is not None and ends[0].bits == 16:
            options = ["f32", *(f"w{bits}a16" for bits in range(2, 9))]
        if all(end is not None and end.bits == 8 for end in ends) and layer.op != "ConvTranspose":
            options = ["f32", *(f"w{bits}a8" for bits in range(2, 9))]
        if ends == [None, None] and layer.op == "MatMul":
            options += ["w8b32", "w4b32", *(["w2b32"] if opset >= 25 else [])]
        # One stored form for a weight that two layers read: both float is always legal.
        shared = sum(other.weight == layer.weight for other in prepared.structure.layers) > 1
        choice = "f32" if shared and rng.integers(0, 2) else options[int(rng.integers(0, len(options)))]
        formats[layer.name] = by_weight.setdefault(layer.weight, "w4" if shared and choice != "f32" else choice)
    return plan_of(prepared, formats, groups, opset=opset)


def plan_of(
    prepared: Prepared,
    formats: dict[str, str],
    groups: dict[str, QFormat | None],
    *,
    opset: int = 21,
    isolate: bool = True,
    storage: dict[int, Storage] | None = None,
) -> Plan:
    """A plan with these layer formats (by node name) and group formats; ranges cover what was seen."""
    group_of = prepared.structure.group_of()
    activations = []
    for group in prepared.structure.groups:
        format = groups.get(group.name)
        if format is None:
            activations.append(ActivationPlan(name=group.name, tensors=group.tensors, format="f32"))
            continue
        seen = [prepared.values[name] for name in group.tensors]
        low, high = min(float(v.min()) for v in seen), max(float(v.max()) for v in seen)
        scale, zero_point = activation_parameters(low, high, format)
        activations.append(
            ActivationPlan(
                name=group.name,
                tensors=group.tensors,
                format=str(format),
                scale=float(scale),
                zero_point=zero_point,
                integer_nodes=_movers_in(prepared, group.tensors) if format.bits == 8 else (),
            )
        )
    how: dict[int, Storage] = {8: "plain", 16: "plain", 4: "cast", 2: "cast" if opset >= 25 else "packed-bytes"}
    how |= storage or {}
    layers = []
    for layer in prepared.structure.layers:
        format = LayerFormat.parse(formats.get(layer.name, "f32"))
        is_quantized = groups.get(group_of.get(layer.input, "")) is not None
        layers.append(_layer_plan(prepared, layer, format, is_quantized and isolate, how))
    return Plan(
        tool_version=TOOL_VERSION,
        source_sha256="0" * 64,
        target="onnxruntime-cpu-x86_64-vnni",
        budgets=(),
        objective=("error",),
        opset=opset,
        ir_version=10 if opset < 25 else 13,
        layers=tuple(layers),
        activations=tuple(activations),
        predicted=Predicted(
            loss=None,
            relative_error=None,
            size_bytes=0,
            latency_us=0,
            bops=0,
            stored_bits=0,
            peak_memory_bytes=0,
            float_size_bytes=0,
            float_latency_us=0,
            float_bops=0,
            float_peak_memory_bytes=0,
        ),
        proof=Proof(optimal=True, gap=0, solver="by hand"),
    )


def _movers_in(prepared: Prepared, tensors: tuple[str, ...]) -> tuple[str, ...]:
    nodes = [node for node in prepared.graph.nodes if node.name in prepared.movers]
    return tuple(node.name for node in nodes if node.outputs[0].name in tensors)


def _layer_plan(
    prepared: Prepared, layer: Layer, format: LayerFormat, isolate: bool, how: dict[int, Storage]
) -> LayerPlan:
    bits, is_integer = format.weight_bits, format.activation_bits == 8
    isolated = isolate and not is_integer
    axis, executed = layer.channel_axis, "int8" if is_integer else "f32"
    if format.block is not None:
        axis, executed, how = 0, f"nbits{bits}", dict.fromkeys(how, "plain")
    return LayerPlan(
        name=layer.name,
        op=layer.op,
        format=str(format),
        executed=executed,
        input=layer.input,
        input_channels=input_channels(layer, prepared.recorded) if isolated else 0,
        weight=layer.weight,
        weight_format="f32" if bits is None else str(QFormat(bits=bits, axis=axis, block=format.block)),
        storage="float" if bits is None else how.get(bits, "packed-bytes"),
        bias=layer.bias,
        bias_format=None if layer.bias is None else ("int32" if is_integer else "f32"),
        isolate_input=isolated,
    )


def emit(prepared: Prepared, plan: Plan) -> Graph:
    """The quantized graph, by the compiler's own pipeline."""
    return run_pipeline(QUANTIZE, PassContext.of(prepared.graph, plan=plan)).graph


# ---- what it must compute -------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Simulated:
    """Outputs of the planned model, and how far from the float model's they can be at most when kernels fuse: worst
    cases added up from the input on, with two steps for each quantizer (its rounding, and a fused kernel's).
    """

    outputs: Feed
    bounds: dict[str, float]


def simulate(prepared: Prepared, plan: Plan) -> Simulated:
    """Float nodes one by one in ONNX Runtime, with weights rounded beforehand and planned tensors fake-quantized."""
    model = graph_io.to_proto(prepared.graph)
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    original = dict(constants)
    groups = {name: group for group in plan.activations for name in group.tensors if group.qformat is not None}
    for layer in plan.layers:
        if layer.weight_format == "f32":
            continue
        rounded = round_nearest(original[layer.weight], layer.qformat)
        constants[layer.weight] = rounded.dequantized()
        if layer.bias_format == "int32":
            assert layer.bias is not None
            scale = (np.float32(groups[layer.input].scale) * rounded.scale).astype(np.float32)
            integers = np.rint(original[layer.bias].astype(np.float64) / scale).astype(np.int32)
            constants[layer.bias] = integers.astype(np.float32) * scale
    values: Feed = {}
    bounds: dict[str, float] = {}

    def put(name: str, value: np.ndarray, bound: float) -> None:
        if name in groups:
            group = groups[name]
            format = group.qformat
            assert format is not None
            # The runtime saturates at the type's ends, whether or not the format uses them.
            whole = replace(format, symmetric=False)
            value = fake_quantize(value, np.float32(group.scale), group.zero_point, whole)
            bound += 2 * group.scale
        values[name], bounds[name] = value, bound

    for name, value in prepared.feed.items():
        put(name, value, 0.0)
    in_blocks = {layer.name for layer in plan.layers if layer.layer_format.block is not None}
    for node in model.graph.node:
        result = _run_node(model, node, values, constants)
        bound = _bound(node, prepared.values, bounds, constants, original)
        put(node.output[0], result, bound + (_block_rounding(node, values, constants) if node.name in in_blocks else 0))
    names = [value.name for value in model.graph.output]
    return Simulated({name: values[name] for name in names}, {name: bounds[name] for name in names})


def _run_node(model: onnx.ModelProto, node: onnx.NodeProto, values: Feed, constants: Feed) -> np.ndarray:
    given = {name: values[name] for name in node.input if name in values}
    graph = make_graph(
        [node],
        "one",
        [make_tensor_value_info(name, TensorProto.FLOAT, [None] * v.ndim) for name, v in given.items()],
        [make_tensor_value_info(node.output[0], TensorProto.FLOAT, None)],
        [numpy_helper.from_array(constants[name], name) for name in dict.fromkeys(node.input) if name in constants],
    )
    one = make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    return Session(one, _UNFUSED).run(given)[node.output[0]]


def _block_rounding(node: onnx.NodeProto, values: Feed, constants: Feed) -> float:
    """What a fused kernel adds that rounds its input to 8 bits: half a step of the largest value's scale, each."""
    return float(np.abs(values[node.input[0]]).max()) / 254 * float(np.abs(constants[node.input[1]]).sum())


def _bound(node: onnx.NodeProto, floats: Feed, bounds: dict[str, float], constants: Feed, original: Feed) -> float:
    """Largest error of the node's output, from the largest errors of its inputs."""
    errors = [bounds[name] for name in node.input if name in bounds]
    if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
        return sum(errors) if node.op_type == "Add" else max(errors)
    weight, exact = constants[node.input[1]], original[node.input[1]]
    largest = float(np.abs(floats[node.input[0]]).max())
    # Any output sums at most all weights of the tensor: coarse for convolutions, and right for every layout.
    gain, moved = float(np.abs(weight).sum()), float(np.abs(weight - exact).sum())
    bias = node.input[2] if len(node.input) > 2 else ""
    shift = float(np.abs(constants[bias] - original[bias]).max()) if bias else 0.0
    return gain * errors[0] + moved * largest + shift
