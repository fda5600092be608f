"""Signatures: counts and keys of nodes at recorded shapes."""

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from lcpaq_onnx.errors import ModelError
from lcpaq_onnx.graph.signatures import known_operators, signature_of, signature_of_shapes

WEIGHT = frozenset({1, 2})


def test_conv_2d_counts_and_key():
    found = signature_of_shapes(
        "Conv", {"group": 1, "strides": [2, 2]}, [(1, 3, 32, 32), (16, 3, 3, 3), (16,)], [(1, 16, 16, 16)], WEIGHT
    )
    assert (found.kind, found.macs) == ("conv", 16 * 16 * 16 * 27)
    assert (found.input_elements, found.output_elements, found.weight_elements) == (3 * 32 * 32, 4096, 16 * 27 + 16)
    assert found.key == "Conv 3x32x32 k3x3 s2x2 d1x1 g1 -> 16x16x16"
    assert found.bytes("int8") == 3072 + 4096 + 448


@pytest.mark.parametrize(
    ("attributes", "data", "weight", "result", "kind", "macs", "detail"),
    [
        ({}, (1, 4, 9), (6, 4, 3), (1, 6, 7), "conv", 6 * 7 * 12, "4x9 k3 s1 d1 g1 -> 6x7"),
        (
            {},
            (1, 2, 4, 4, 4),
            (3, 2, 2, 2, 2),
            (1, 3, 3, 3, 3),
            "conv",
            81 * 16,
            "2x4x4x4 k2x2x2 s1x1x1 d1x1x1 g1 -> 3x3x3x3",
        ),
        (
            {"group": 8},
            (1, 8, 4, 4),
            (8, 1, 3, 3),
            (1, 8, 2, 2),
            "depthwise",
            32 * 9,
            "8x4x4 k3x3 s1x1 d1x1 g8 -> 8x2x2",
        ),
        ({"group": 2}, (1, 8, 4, 4), (6, 4, 1, 1), (1, 6, 4, 4), "conv", 96 * 4, "8x4x4 k1x1 s1x1 d1x1 g2 -> 6x4x4"),
        ({}, (1, 8, 4, 4), (6, 8, 1, 1), (1, 6, 4, 4), "pointwise", 96 * 8, "8x4x4 k1x1 s1x1 d1x1 g1 -> 6x4x4"),
        ({"dilations": [2]}, (8, 4, 9), (6, 4, 3), (8, 6, 5), "conv", 8 * 30 * 12, "b8 4x9 k3 s1 d2 g1 -> 6x5"),
    ],
)
def test_conv_kinds(attributes, data, weight, result, kind, macs, detail):
    found = signature_of_shapes("Conv", attributes, [data, weight], [result], WEIGHT)
    assert (found.kind, found.macs, found.detail) == (kind, macs, detail)


def test_conv_transpose_costs_per_input_element():
    found = signature_of_shapes(
        "ConvTranspose", {"strides": [2, 2]}, [(1, 8, 4, 4), (8, 5, 2, 2)], [(1, 5, 8, 8)], WEIGHT
    )
    assert (found.kind, found.macs) == ("convtranspose", 8 * 16 * 5 * 4)


@pytest.mark.parametrize(
    ("attributes", "data", "weight"),
    [({}, (3, 4), (4, 5)), ({"transB": 1}, (3, 4), (5, 4)), ({"transA": 1}, (4, 3), (4, 5))],
)
def test_gemm_transposes(attributes, data, weight):
    found = signature_of_shapes("Gemm", attributes, [data, weight, (5,)], [(3, 5)], WEIGHT)
    assert (found.kind, found.macs, found.weight_elements) == ("gemm", 60, 25)
    assert found.detail == "b3 4 -> 5"


def test_matmul_batches_and_two_activations():
    weighted = signature_of_shapes("MatMul", {}, [(2, 7, 4), (4, 5)], [(2, 7, 5)], frozenset({1}))
    assert (weighted.macs, weighted.weight_elements, weighted.input_elements) == (2 * 7 * 5 * 4, 20, 56)
    assert weighted.detail == "b2 7x4 x 4x5 -> 7x5"
    plain = signature_of_shapes("MatMul", {}, [(1, 3, 7, 4), (1, 3, 4, 7)], [(1, 3, 7, 7)], frozenset())
    assert (plain.kind, plain.macs, plain.weight_elements) == ("matmul", 3 * 7 * 7 * 4, 0)


def test_operators_without_macs_count_elements():
    add = signature_of_shapes("Add", {}, [(1, 8, 4, 4), (8, 1, 1)], [(1, 8, 4, 4)], frozenset({1}))
    assert (add.kind, add.macs, add.work, add.detail) == ("elementwise", 0, 256, "8x4x4 + 8x1x1 -> 8x4x4")
    pool = signature_of_shapes(
        "MaxPool", {"kernel_shape": [2, 2], "strides": [2, 2]}, [(1, 8, 4, 4)], [(1, 8, 2, 2)], frozenset()
    )
    assert (pool.kind, pool.detail) == ("pool", "8x4x4 k2x2 s2x2 -> 8x2x2")
    concat = signature_of_shapes("Concat", {"axis": 1}, [(1, 2, 4), (1, 3, 4)], [(1, 5, 4)], frozenset())
    assert (concat.kind, concat.detail) == ("movement", "2x4 + 3x4 axis=1 -> 5x4")
    assert signature_of_shapes("LSTM", {}, [(1, 2, 4)], [(1, 2, 4)], frozenset()).kind == "other"


def test_signature_of_node_reads_constants_and_absent_inputs():
    data, result = gs.Variable("x", np.float32), gs.Variable("y", np.float32)
    weight = gs.Constant("w", np.zeros((6, 4, 1, 1), np.float32))
    conv = gs.Node("Conv", "conv", {"group": 1}, [data, weight], [result])
    found = signature_of(conv, {"x": (1, 4, 5, 5), "y": (1, 6, 5, 5)})
    assert (found.kind, found.macs, found.weight_elements) == ("pointwise", 600, 24)
    resize = gs.Node("Resize", "up", {"mode": "nearest"}, [data, gs.Variable.empty(), weight], [result])
    assert signature_of(resize, {"x": (1, 4, 5, 5), "y": (1, 6, 5, 5)}).input_elements == 100
    with pytest.raises(ModelError, match="'y' of node 'conv'"):
        signature_of(conv, {"x": (1, 4, 5, 5)})


def test_known_operators_are_those_of_onnx():
    assert {"Conv", "QuantizeLinear", "Gelu"} <= known_operators()
    assert "QLinearAdd" not in known_operators()
