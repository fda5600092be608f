"""Distinct operators of an ONNX model at the shapes they run with, each as a signature and a probe."""

from __future__ import annotations

import tempfile
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort

from lcpaq_onnx.graph.ops import facts_of, weight_channel_axis
from lcpaq_onnx.graph.probe import Attribute, Probe
from lcpaq_onnx.graph.signatures import Shape, signature_of, signature_of_shapes
from lcpaq_onnx.signature import OperatorSignature
from lcpaq_onnx.targets.target import Target

__all__ = ["LayerNode", "common_nodes", "nodes_of"]

Array = npt.NDArray[np.generic]

# Level BASIC folds constants and batch norms, as a quantizer does first. The two named fusions depend on the writer:
# both forms of the operators they touch get rows.
_FUSIONS = ("MatMulAddFusion", "Pad_Fusion")
_POOLS = frozenset({"AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool"})
_FORMATLESS = frozenset({"Cast", "Constant", "ConstantOfShape", "Shape", "Range", "Identity", "Dropout"})


@dataclass(frozen=True)
class LayerNode:
    """One operator. ``runs_apart``: ONNX Runtime runs it as a node of its own, that is, it is no activation function
    right behind a layer and no form that only other writers of the same model use."""

    signature: OperatorSignature
    probe: Probe
    channel_axis: int | None
    runs_apart: bool
    model_inputs: Mapping[str, Shape]

    def runs_int8(self, target: Target) -> bool:
        if self.probe.weighted:
            rule = target.operators.get(self.signature.op)
            return rule is not None and rule.layers.get("a8") == "int8"
        attributes = dict(self.probe.attributes)
        return target.runs_integer(self.signature.op, 8, attributes)


def nodes_of(path: Path, input_shapes: Mapping[str, Shape]) -> list[LayerNode]:
    """Operators of the model in graph order, duplicates of one signature included. ``input_shapes`` fixes free axes;
    a free batch axis is 1."""
    found = _read(path, input_shapes, ())
    seen = {node.signature.key for node in found}
    others = [node for node in _read(path, input_shapes, _FUSIONS) if node.signature.key not in seen]
    return found + [replace(node, runs_apart=False) for node in others]


def common_nodes() -> list[LayerNode]:
    """Shapes of transformers and decoders, which classifiers lack."""
    conv: dict[str, Attribute] = {"kernel_shape": [2, 2], "strides": [2, 2]}
    return [
        *(_common("MatMul", [(1, m, k), (k, n)], [(1, m, n)], {}) for m, k, n in _MATRICES),
        *(_common("Gemm", [(m, k), (n, k), (n,)], [(m, n)], {"transB": 1}) for m, k, n in _MATRICES),
        *(
            _common("ConvTranspose", [(1, c, h, h), (c, c // 2, 2, 2), (c // 2,)], [(1, c // 2, 2 * h, 2 * h)], conv)
            for c, h in ((256, 14), (128, 28), (64, 56))
        ),
        _common("MatMul", [(1, 12, 128, 32), (1, 12, 32, 128)], [(1, 12, 128, 128)], {}),
        _common("MatMul", [(1, 12, 128, 128), (1, 12, 128, 32)], [(1, 12, 128, 32)], {}),
        _common("Softmax", [(1, 12, 128, 128)], [(1, 12, 128, 128)], {"axis": -1}),
        _common("LayerNormalization", [(1, 128, 384), (384,), (384,)], [(1, 128, 384)], {"axis": -1}),
        *(_common(op, [(1, 128, 1536)], [(1, 128, 1536)], {}) for op in ("Erf", "Gelu", "Sigmoid", "Tanh")),
        *(_common(op, [(1, 128, 384)] * 2, [(1, 128, 384)], {}) for op in ("Add", "Mul")),
    ]


_MATRICES = ((1, 512, 1000), (1, 1280, 1000), (16, 384, 1536), (128, 384, 384), (128, 384, 1536), (128, 1536, 384))


def _common(op: str, inputs: list[Shape], outputs: list[Shape], attributes: dict[str, Attribute]) -> LayerNode:
    # Two batched operands are two activations; every other product here has a weight.
    weighted = facts_of(op).weight_input == 1 and len(inputs[1]) in (2, len(inputs[0])) and inputs[1][0] > 1
    constants = range(1, len(inputs)) if weighted or op == "LayerNormalization" else ()
    tail = "Relu" if op == "ConvTranspose" else ""
    probe = Probe(op=op, inputs=inputs, attributes=attributes, weighted=weighted, tail=tail)
    axis = weight_channel_axis(op, attributes, inputs[1]) if weighted else None
    return LayerNode(signature_of_shapes(op, attributes, inputs, outputs, frozenset(constants)), probe, axis, False, {})


def _read(path: Path, input_shapes: Mapping[str, Shape], disabled: Iterable[str]) -> list[LayerNode]:
    model = _folded(path, disabled)
    inputs = {value.name: input_shapes.get(value.name) or _fixed_shape(value, path) for value in model.graph.input}
    recorded = _run(model, inputs)
    shapes = {name: tuple(value.shape) for name, value in recorded.items()}
    floats = {name for name, value in recorded.items() if value.dtype == np.float32}
    graph = gs.import_onnx(model)
    nodes = []
    for node in graph.nodes:
        moves_floats = any(tensor.name in floats for tensor in node.inputs)
        if node.op in _FORMATLESS or node.domain not in (None, "", "ai.onnx") or not moves_floats:
            continue
        probe = _probe(node, shapes, floats, graph.opset)
        if probe is not None:
            axis = weight_channel_axis(node.op, node.attrs, tuple(node.inputs[1].shape)) if probe.weighted else None
            nodes.append(LayerNode(signature_of(node, shapes), probe, axis, not _fused(node), inputs))
    return nodes


def _folded(path: Path, disabled: Iterable[str]) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(Path(folder) / "folded.onnx")
        options.log_severity_level = 3
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=list(disabled))
        return onnx.load(options.optimized_model_filepath)


def _fixed_shape(value: onnx.ValueInfoProto, path: Path) -> Shape:
    extents = [axis.dim_value for axis in value.type.tensor_type.shape.dim]
    if any(extent <= 0 for extent in extents[1:]):
        raise SystemExit(f"{path}: input '{value.name}' has free axes; give --shape {path.name}:{value.name}=1x…")
    return tuple([extents[0] if extents[0] > 0 else 1, *extents[1:]] if extents else [])


def _run(model: onnx.ModelProto, inputs: Mapping[str, Shape]) -> dict[str, Array]:
    """Values of all tensors on random inputs, by running the model once with all of them as outputs."""
    everything = onnx.ModelProto()
    everything.CopyFrom(model)
    names = [name for node in model.graph.node for name in node.output if name]
    del everything.graph.output[:]
    everything.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(everything.SerializeToString(), options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    feeds = {name: rng.uniform(0, 1, shape).astype(np.float32) for name, shape in inputs.items()}
    return {**dict(zip(names, session.run(names, feeds), strict=True)), **feeds}


def _probe(node: gs.Node, shapes: Mapping[str, Shape], floats: Container[str], opset: int) -> Probe | None:
    """None for operators that read integers computed by the model, which no probe input stands for."""
    weighted = facts_of(node.op).weight_input == 1 and isinstance(node.inputs[1], gs.Constant)
    inputs: list[Shape | Array | None] = []
    for tensor in node.inputs:
        if tensor.is_empty():
            inputs.append(None)
        elif isinstance(tensor, gs.Constant):
            values = tensor.values
            # A float operand of an elementwise operator takes part in the integer kernel like an activation.
            inputs.append(tuple(values.shape) if values.dtype == np.float32 and node.op != "Resize" else values)
        elif tensor.name in floats:
            inputs.append(shapes[tensor.name])
        else:
            return None
    return Probe(
        op=node.op,
        inputs=inputs,
        attributes=dict(node.attrs),
        outputs=len(node.outputs),
        weighted=weighted,
        tail="Relu" if node.op in ("Conv", "ConvTranspose") else "",
        # Pooling in the channels-last and blocked layouts that stand behind convolutions is another kernel.
        after_conv=node.op in _POOLS and len(shapes[node.inputs[0].name]) == 4,
        opset=max(13, opset),
    )


def _fused(node: gs.Node) -> bool:
    if not facts_of(node.op).activation:
        return False
    producers = node.inputs[0].inputs
    return len(producers) == 1 and facts_of(producers[0].op).weight_input is not None
