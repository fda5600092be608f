"""A layer as a product of matrices, against ONNX Runtime's own layer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from lcpaq_onnx.numeric.layer_matrix import LayerMatrix
from lcpaq_onnx.runtime.session import Session

Case = tuple[str, tuple[int, ...], dict[str, object], tuple[int, ...]]

CASES: dict[str, Case] = {
    "strided": ("Conv", (8, 4, 3, 3), {"strides": [2, 1], "pads": [1, 0, 2, 1], "dilations": [1, 2]}, (2, 4, 9, 11)),
    "grouped": ("Conv", (8, 2, 3, 3), {"group": 4, "pads": [1, 1, 1, 1]}, (2, 8, 7, 7)),
    "same-upper": ("Conv", (8, 1, 5, 5), {"group": 8, "auto_pad": "SAME_UPPER", "strides": [2, 2]}, (2, 8, 9, 8)),
    "1d-same-lower": ("Conv", (6, 4, 3), {"auto_pad": "SAME_LOWER", "strides": [2]}, (2, 4, 10)),
    "3d": ("Conv", (3, 2, 2, 2, 2), {"pads": [1, 0, 0, 0, 1, 0]}, (1, 2, 4, 5, 3)),
    "transposed": (
        "ConvTranspose",
        (4, 6, 3, 3),
        {"strides": [2, 3], "pads": [1, 0, 2, 1], "output_padding": [1, 0], "dilations": [1, 2]},
        (2, 4, 5, 6),
    ),
    "transposed-grouped": (
        "ConvTranspose",
        (8, 3, 4, 4),
        {"group": 2, "strides": [2, 2], "pads": [1, 1, 1, 1]},
        (2, 8, 5, 6),
    ),
    "transposed-cut": ("ConvTranspose", (2, 3, 2, 2), {"strides": [2, 2], "pads": [2, 2, 2, 2]}, (1, 2, 5, 6)),
    "gemm-transB": ("Gemm", (7, 5), {"transB": 1}, (3, 5)),
    "gemm-transA": ("Gemm", (5, 7), {"transA": 1}, (5, 3)),
    "matmul": ("MatMul", (5, 7), {}, (2, 3, 5)),
}


def output_of(op: str, attrs: dict[str, object], x: np.ndarray, w: np.ndarray) -> np.ndarray:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "w", "y")]
    graph = helper.make_graph([helper.make_node(op, ["x", "w"], ["y"], **attrs)], "g", values[:2], values[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    return Session(model).run({"x": x, "w": w})["y"]


@pytest.mark.parametrize("name", CASES)
def test_columns_times_rows_is_the_layer(name: str) -> None:
    op, weight_shape, attrs, input_shape = CASES[name]
    random = np.random.default_rng(0)
    x = random.normal(size=input_shape).astype(np.float32)
    w = random.normal(size=weight_shape).astype(np.float32)
    matrix = LayerMatrix.of(op, attrs, weight_shape)
    assert matrix is not None
    columns = matrix.columns_of(x, np.arange(matrix.column_count(x.shape)))
    rows = matrix.rows_of(w)
    assert rows.shape == (matrix.groups, matrix.rows, matrix.columns)
    found = columns @ rows.swapaxes(1, 2)
    y = output_of(op, attrs, x, w)
    channels_last = np.moveaxis(y, 1, -1) if "Conv" in op else y
    expected = channels_last.reshape(-1, matrix.groups, matrix.rows).swapaxes(0, 1)
    # float32 sums in another order
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_array_equal(matrix.weight_of(rows), w)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_convolutions(data: st.DataObject) -> None:
    """Plain and transposed, in one and two dimensions, with any legal strides, pads, dilations and groups."""
    op = data.draw(st.sampled_from(["Conv", "ConvTranspose"]))
    rank, groups = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    inputs, outputs = groups * data.draw(st.integers(1, 2)), groups * data.draw(st.integers(1, 2))
    few = st.lists(st.integers(1, 3), min_size=rank, max_size=rank)
    kernel, strides, dilations = data.draw(few), data.draw(few), data.draw(few)
    reach = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
    pads = [data.draw(st.integers(0, r)) for r in (*reach, *reach)]
    extents = [r + data.draw(st.integers(2, 5)) for r in reach]
    attrs = {"strides": strides, "dilations": dilations, "pads": pads, "group": groups}
    shape = (outputs, inputs // groups, *kernel) if op == "Conv" else (inputs, outputs // groups, *kernel)
    random = np.random.default_rng(0)
    x = random.normal(size=(2, inputs, *extents)).astype(np.float32)
    w = random.normal(size=shape).astype(np.float32)
    y = output_of(op, attrs, x, w)
    matrix = LayerMatrix.of(op, attrs, shape)
    assert matrix is not None
    count = matrix.column_count(x.shape)
    assert count == y.size // outputs
    chosen = np.sort(random.choice(count, size=max(1, count // 2), replace=False))
    found = matrix.columns_of(x, chosen) @ matrix.rows_of(w).swapaxes(1, 2)
    expected = np.moveaxis(y, 1, -1).reshape(-1, matrix.groups, matrix.rows).swapaxes(0, 1)[:, chosen]
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("op", "attrs", "shape"),
    [
        ("MatMul", {}, (2, 3, 4)),
        ("Gather", {}, (5, 6)),
        ("ConvTranspose", {"auto_pad": "SAME_UPPER"}, (2, 2, 3)),
        ("ConvTranspose", {"output_shape": [9]}, (2, 2, 3)),
    ],
)
def test_what_is_no_plain_product_is_left_alone(op: str, attrs: dict[str, object], shape: tuple[int, ...]) -> None:
    assert LayerMatrix.of(op, attrs, shape) is None
