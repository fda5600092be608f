"""What the targets claim about ONNX Runtime, held against the graph that ONNX Runtime really runs."""

import dataclasses

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from lcpaq_onnx.formats import LayerFormat, QFormat
from lcpaq_onnx.graph.ops import facts_of, weight_channel_axis
from lcpaq_onnx.graph.probe import Probe, build_probe
from lcpaq_onnx.targets.loader import load
from lcpaq_onnx.targets.target import Quirk

VNNI, GENERIC = "onnxruntime-cpu-x86_64-vnni", "generic-int8"
X = (1, 8, 8, 8)
KERNELS = {"Conv": "QLinearConv", "Gemm": "QGemm", "MatMul": "QLinearMatMul"}
WEIGHTED = {
    "conv": Probe(op="Conv", inputs=[X, (8, 8, 3, 3), (8,)], weighted=True, tail="Relu"),
    "conv-1d": Probe(op="Conv", inputs=[(1, 8, 8), (8, 8, 3), (8,)], weighted=True),
    "conv-3d": Probe(op="Conv", inputs=[(1, 8, 8, 8, 8), (8, 8, 3, 3, 3), (8,)], weighted=True),
    "depthwise": Probe(op="Conv", inputs=[X, (8, 1, 3, 3), (8,)], attributes={"group": 8}, weighted=True),
    "conv-transpose": Probe(op="ConvTranspose", inputs=[X, (8, 4, 2, 2), (4,)], weighted=True),
    "gemm": Probe(op="Gemm", inputs=[(4, 8), (8, 16), (16,)], weighted=True),
    "gemm-transposed": Probe(op="Gemm", inputs=[(4, 8), (16, 8), (16,)], attributes={"transB": 1}, weighted=True),
    "matmul": Probe(op="MatMul", inputs=[(1, 4, 8), (8, 16)], weighted=True),
}
i64 = np.int64
PLAIN = {
    "Add": Probe(op="Add", inputs=[X, X]),
    "AveragePool": Probe(op="AveragePool", inputs=[X], attributes={"kernel_shape": [2, 2]}),
    "Concat": Probe(op="Concat", inputs=[X, X], attributes={"axis": 1}),
    "DepthToSpace": Probe(op="DepthToSpace", inputs=[X], attributes={"blocksize": 2}),
    "Expand": Probe(op="Expand", inputs=[X, np.array([2, 8, 8, 8], i64)]),
    "Flatten": Probe(op="Flatten", inputs=[X]),
    "Gather": Probe(op="Gather", inputs=[X, np.array([0, 1], i64)], attributes={"axis": 1}),
    "GlobalAveragePool": Probe(op="GlobalAveragePool", inputs=[X]),
    "Identity": Probe(op="Identity", inputs=[X]),
    "LeakyRelu": Probe(op="LeakyRelu", inputs=[X], attributes={"alpha": 0.1}),
    "MatMul": Probe(op="MatMul", inputs=[(1, 4, 8), (1, 8, 4)]),
    "MaxPool": Probe(op="MaxPool", inputs=[X], attributes={"kernel_shape": [2, 2]}),
    "Mul": Probe(op="Mul", inputs=[X, X]),
    "ReduceMax": Probe(op="ReduceMax", inputs=[X, np.array([2, 3], i64)]),
    "ReduceMin": Probe(op="ReduceMin", inputs=[X, np.array([2, 3], i64)]),
    "Reshape": Probe(op="Reshape", inputs=[X, np.array([1, -1], i64)]),
    "Resize": Probe(op="Resize", inputs=[X, None, np.array([1, 1, 2, 2], np.float32)], attributes={"mode": "nearest"}),
    "Sigmoid": Probe(op="Sigmoid", inputs=[X]),
    "Slice": Probe(op="Slice", inputs=[X, np.array([1], i64), np.array([5], i64), np.array([1], i64)]),
    "Softmax": Probe(op="Softmax", inputs=[X], attributes={"axis": -1}),
    "Split": Probe(op="Split", inputs=[X], attributes={"axis": 1, "num_outputs": 2}, outputs=2),
    "Squeeze": Probe(op="Squeeze", inputs=[X, np.array([0], i64)]),
    "Tile": Probe(op="Tile", inputs=[X, np.array([1, 1, 2, 2], i64)]),
    "Transpose": Probe(op="Transpose", inputs=[X], attributes={"perm": [0, 2, 3, 1]}),
    "Unsqueeze": Probe(op="Unsqueeze", inputs=[X, np.array([0], i64)]),
    "Where": Probe(op="Where", inputs=[np.ones(X, np.bool_), X, X]),
    # No integer kernel, as far as the target says:
    "Clip": Probe(op="Clip", inputs=[X, np.array(0, np.float32), np.array(3, np.float32)]),
    "Div": Probe(op="Div", inputs=[X, X]),
    "Erf": Probe(op="Erf", inputs=[X]),
    "Gelu": Probe(op="Gelu", inputs=[X]),
    "GlobalMaxPool": Probe(op="GlobalMaxPool", inputs=[X]),
    "HardSigmoid": Probe(op="HardSigmoid", inputs=[X]),
    "HardSwish": Probe(op="HardSwish", inputs=[X]),
    "LayerNormalization": Probe(op="LayerNormalization", inputs=[X, np.ones(8, np.float32)]),
    "Pad": Probe(op="Pad", inputs=[X, np.array([0, 0, 1, 1, 0, 0, 1, 1], i64)]),
    "ReduceMean": Probe(op="ReduceMean", inputs=[X, np.array([2, 3], i64)]),
    "Relu": Probe(op="Relu", inputs=[X]),
    "SpaceToDepth": Probe(op="SpaceToDepth", inputs=[X], attributes={"blocksize": 2}),
    "Sub": Probe(op="Sub", inputs=[X, X]),
    "Tanh": Probe(op="Tanh", inputs=[X]),
}


def optimised(model, folder):
    """Operators of the graph that ONNX Runtime really runs."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]


def stays_integer(operators, outputs):
    """The only DequantizeLinear left are those at the graph's outputs: nothing between saw floats."""
    return operators.count("DequantizeLinear") == outputs


def test_every_operator_of_the_target_is_probed():
    named = load(VNNI).operators.items()
    # Tables that are looked up have no activations: tests/test_look_up_integers.py.
    assert {op for op, rule in named if rule.layers} == {"Gather", *(probe.op for probe in WEIGHTED.values())}
    assert {op for op, rule in named if rule.integer} <= set(PLAIN)


@pytest.mark.parametrize("case", WEIGHTED)
@pytest.mark.parametrize("text", ["w8a8", "w4a8", "w2a8", "w8a16", "w4a16", "w16a16"])
def test_layers_execute_in_what_the_target_says(case, text, tmp_path):
    target, probe, fmt = load(VNNI), WEIGHTED[case], LayerFormat.parse(text)
    if fmt.weight_bits == 2:
        probe = dataclasses.replace(probe, opset=25)
    axis = weight_channel_axis(probe.op, probe.attributes, probe.inputs[1])
    weight = target.weight_format(probe.op, fmt.weight_bits, axis)
    found = optimised(build_probe(probe, target.activation_format(fmt.activation_bits), weight), tmp_path)
    integer = target.executed(probe.op, fmt) == "int8"
    assert stays_integer(found, 1) == integer
    assert (KERNELS.get(probe.op, "none") in found) == integer


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("op", PLAIN)
def test_other_operators_execute_in_what_the_target_says(op, bits, tmp_path):
    target, probe = load(VNNI), PLAIN[op]
    found = optimised(build_probe(probe, target.activation_format(bits), None), tmp_path)
    integer = target.runs_integer(op, bits, probe.attributes)
    assert stays_integer(found, probe.outputs) == integer
    if integer and op in ("Add", "Concat", "GlobalAveragePool", "Mul", "Softmax", "Where"):
        assert f"QLinear{op}" in found


def test_resize_linear_is_float(tmp_path):
    probe = dataclasses.replace(PLAIN["Resize"], attributes={"mode": "linear"})
    target = load(VNNI)
    assert not stays_integer(optimised(build_probe(probe, target.activation_format(8), None), tmp_path), 1)
    assert not target.runs_integer("Resize", 8, probe.attributes)


@pytest.mark.parametrize("op", [op for op in PLAIN if facts_of(op).keeps_scale and load(VNNI).runs_integer(op, 8)])
def test_operators_that_keep_the_scale_need_one_scale(op, tmp_path):
    probe = dataclasses.replace(PLAIN[op], output_scale=0.05)
    found = optimised(build_probe(probe, load(VNNI).activation_format(8), None), tmp_path)
    assert stays_integer(found, probe.outputs) == (op == "Identity")  # Q, DQ, Q, DQ is left


def test_quirk_relu_fuses_only_at_qmin(tmp_path):
    assert load(VNNI).has_quirk(Quirk.RELU_AT_QMIN)
    symmetric = load(GENERIC).activation_format(8)
    found = optimised(build_probe(WEIGHTED["conv"], symmetric, QFormat(bits=8, axis=0)), tmp_path)
    assert "QLinearConv" not in found


def test_the_generic_target_loads_at_its_opset(tmp_path):
    target = load(GENERIC)
    probe = dataclasses.replace(WEIGHTED["conv"], opset=target.runtime.opset_max, tail="")
    model = build_probe(probe, target.activation_format(8), target.weight_format("Conv", 8, 0))
    model.ir_version = target.runtime.ir_max
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(model), full_check=True)
    assert "QLinearConv" in optimised(model, tmp_path)
