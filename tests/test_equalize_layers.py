"""equalize-layers: what it makes equal, what passes factors on, and each reason to leave a pair alone.

Tolerance 5e-6 of the output's largest magnitude: every weight is rounded at most twice more (6e-8 each), once for what
reads it and once for what it reads, and some dozen products add up. float16: 5e-3, as it has 11 bits.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import NodeProto, helper, numpy_helper, shape_inference
from quantizing import random_model
from rewriting import constants, notes_of, ops, rewrite

from lcpaq_onnx.graph.graph_io import Graph, load
from lcpaq_onnx.graph.weight_axes import weight_axes
from lcpaq_onnx.passes import PREPARE
from lcpaq_onnx.passes.rewrite.equalize_layers import EqualizeLayers

EQUALIZE = (EqualizeLayers(),)
TOLERANCE = 5e-6


def uneven(*shape: int, axis: int = 0, seed: int = 0) -> np.ndarray:
    """Random weights whose channels along ``axis`` are of sizes from about 1/20 to 20."""
    rng = np.random.default_rng(seed)
    along = [1] * len(shape)
    along[axis] = -1
    sizes = np.exp(rng.normal(size=shape[axis])).reshape(along)
    return (rng.standard_normal(shape) * sizes).astype(np.float32)


def model(
    nodes: list[NodeProto], weights: dict[str, np.ndarray], x: np.ndarray, outputs: tuple[str, ...] = ("y",)
) -> Graph:
    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    body = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, x.shape)],
        [helper.make_tensor_value_info(name, kind, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    proto = helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return load(shape_inference.infer_shapes(proto))


IMAGE = np.random.default_rng(1).standard_normal((2, 3, 8, 8)).astype(np.float32)
W1, B1, W2 = uneven(8, 3, 3, 3), uneven(8, seed=2), uneven(4, 8, 1, 1, axis=1, seed=3)


def pair(
    *between: NodeProto, source: str = "t", target: str = "u", w2: np.ndarray = W2, **weights: np.ndarray
) -> Graph:
    """Conv → t, ``between``, u → Conv."""
    first = helper.make_node("Conv", ["x", "w1", "b1"], [source], "first")
    second = helper.make_node("Conv", [target, "w2"], ["y"], "second")
    return model([first, *between, second], {"w1": W1, "b1": B1, "w2": w2, **weights}, IMAGE)


def sides(graph: Graph) -> tuple[np.ndarray, np.ndarray]:
    values = constants(graph)
    before = np.maximum(np.abs(values["w1"]).max(axis=(1, 2, 3)), np.abs(values["b1"]))
    return before, np.abs(values["w2"]).max(axis=(0, 2, 3))


def node(op: str, **attributes: object) -> NodeProto:
    return helper.make_node(op, ["t"], ["u"], "between", **attributes)


# ---- what becomes equal ---------------------------------------------------------------------------------------------
def test_both_sides_of_every_channel_become_equal() -> None:
    graph = pair(node("Relu"))
    before, after = sides(graph)
    assert max(before / after) / min(before / after) > 10
    before, after = sides(rewrite(graph, EQUALIZE, [{"x": IMAGE}], TOLERANCE))
    # Iterated until steps are below 1e-4.
    np.testing.assert_allclose(before, after, rtol=3e-4)


@pytest.mark.parametrize(
    "between",
    [
        node("LeakyRelu", alpha=0.2),
        node("Identity"),
        node("MaxPool", kernel_shape=[2, 2], strides=[2, 2]),
        node("AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        node("GlobalAveragePool"),
        helper.make_node("PRelu", ["t", "slope"], ["u"], "between"),
        helper.make_node("Pad", ["t", "pads"], ["u"], "between"),
        helper.make_node("Clip", ["t", "zero"], ["u"], "between"),
        helper.make_node("Mul", ["t", "slope"], ["u"], "between"),
    ],
    ids=lambda between: between.op_type,
)
def test_what_passes_factors_on(between: NodeProto) -> None:
    extra = {
        "slope": uneven(8, 1, 1, seed=5),
        "pads": np.array([0, 0, 1, 0, 0, 0, 0, 1]),
        "zero": np.array(0, np.float32),
    }
    weights = {name: value for name, value in extra.items() if name in between.input}
    before, after = sides(rewrite(pair(between, **weights), EQUALIZE, [{"x": IMAGE}], TOLERANCE))
    np.testing.assert_allclose(before, after, rtol=3e-4)


def test_a_depthwise_chain_of_three_becomes_equal() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["t"], "expand"),
        helper.make_node("Relu", ["t"], ["u"]),
        helper.make_node("Conv", ["u", "w2"], ["v"], "depthwise", group=8, pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["v"], ["w"]),
        helper.make_node("Conv", ["w", "w3"], ["y"], "project"),
    ]
    weights = {"w1": uneven(8, 3, 1, 1), "w2": uneven(8, 1, 3, 3, seed=1), "w3": uneven(5, 8, 1, 1, axis=1, seed=2)}
    values = constants(rewrite(model(nodes, weights, IMAGE), EQUALIZE, [{"x": IMAGE}], TOLERANCE))
    largest = [
        np.abs(values[name]).max(axis=(1 if name == "w1" else (0 if name == "w3" else 1), 2, 3)) for name in weights
    ]
    np.testing.assert_allclose(largest[1], largest[0], rtol=3e-4)
    np.testing.assert_allclose(largest[2], largest[0], rtol=3e-4)
    start = {name: np.abs(value).max(axis=(0 if name == "w3" else 1, 2, 3)) for name, value in weights.items()}
    # Section 4.1 of the paper: the cube root of the three.
    np.testing.assert_allclose(largest[0], (start["w1"] * start["w2"] * start["w3"]) ** (1 / 3), rtol=1e-3)


@pytest.mark.parametrize("flat", ["Flatten", "pooled-Reshape"])
def test_dense_layers_behind_convolutions(flat: str) -> None:
    first = helper.make_node("Conv", ["x", "w1", "b1"], ["t"], "first")
    weights = {"w1": W1, "b1": B1}
    if flat == "Flatten":
        nodes = [first, helper.make_node("Flatten", ["t"], ["u"])]
        weights["w2"] = uneven(8 * 36, 5, axis=0, seed=4)
    else:
        nodes = [
            first,
            helper.make_node("GlobalAveragePool", ["t"], ["p"]),
            helper.make_node("Reshape", ["p", "s"], ["u"]),
        ]
        weights |= {"w2": uneven(8, 5, axis=0, seed=4), "s": np.array([2, -1])}
    nodes.append(helper.make_node("Gemm", ["u", "w2"], ["y"], "second"))
    values = constants(rewrite(model(nodes, weights, IMAGE), EQUALIZE, [{"x": IMAGE}], TOLERANCE))
    before = np.maximum(np.abs(values["w1"]).max(axis=(1, 2, 3)), np.abs(values["b1"]))
    np.testing.assert_allclose(np.abs(values["w2"]).reshape(8, -1).max(axis=1), before, rtol=3e-4)


def test_dense_layers_with_biases_behind_their_products() -> None:
    x = np.random.default_rng(0).standard_normal((2, 5, 6)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["s"], "first"),
        helper.make_node("Add", ["b1", "s"], ["t"], "bias"),
        helper.make_node("Relu", ["t"], ["u"]),
        helper.make_node("MatMul", ["u", "w2"], ["y"], "second"),
    ]
    weights = {"w1": uneven(6, 8, axis=1), "b1": uneven(8, seed=1), "w2": uneven(8, 4, seed=2)}
    result = rewrite(model(nodes, weights, x), EQUALIZE, [{"x": x}], TOLERANCE)
    assert not np.array_equal(constants(result)["w2"], weights["w2"])


def test_two_readers_share_the_factors() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["t"], "first"),
        helper.make_node("Conv", ["t", "w2"], ["y"], "second"),
        helper.make_node("Conv", ["t", "w3"], ["z"], "third", group=2),
    ]
    weights = {"w1": W1, "b1": B1, "w2": W2, "w3": uneven(6, 4, 3, 3, seed=6)}
    result = rewrite(model(nodes, weights, IMAGE, ("y", "z")), EQUALIZE, [{"x": IMAGE}], TOLERANCE)
    before, after = sides(result)
    third = np.abs(constants(result)["w3"]).reshape(2, 3, 4, 3, 3).max(axis=(1, 3, 4)).ravel()
    np.testing.assert_allclose(np.maximum(after, third), before, rtol=3e-4)


def test_channels_that_one_side_does_not_use_stay_as_they_are() -> None:
    w2 = W2.copy()
    w2[:, 3] = 0
    result = rewrite(pair(node("Relu"), w2=w2), EQUALIZE, [{"x": IMAGE}], TOLERANCE)
    np.testing.assert_array_equal(constants(result)["w1"][3], W1[3])


def test_half_precision_stays_half_precision() -> None:
    nodes = [helper.make_node("Conv", ["x", "w1", "b1"], ["u"], "first"), helper.make_node("Conv", ["u", "w2"], ["y"])]
    halves = {name: value.astype(np.float16) for name, value in {"w1": W1, "b1": B1, "w2": W2}.items()}
    x = IMAGE.astype(np.float16)
    result = rewrite(model(nodes, halves, x), EQUALIZE, [{"x": x}], 5e-3)
    assert {value.dtype for value in constants(result).values()} == {np.dtype(np.float16)}


# ---- what stays -----------------------------------------------------------------------------------------------------
def refusal(graph: Graph, name: str = "first") -> str:
    """The reason; the weights must be as they were."""
    before = constants(graph)
    for key, value in constants(rewrite(graph, EQUALIZE, [{"x": IMAGE}])).items():
        np.testing.assert_array_equal(value, before[key])
    return notes_of(graph, *EQUALIZE)[name]


def test_a_clip_with_an_end() -> None:
    six = helper.make_node("Clip", ["t", "low", "high"], ["u"], "between")
    graph = pair(six, low=np.array(0, np.float32), high=np.array(6, np.float32))
    assert refusal(graph) == "Clip between does not pass a factor per channel on"


@pytest.mark.parametrize("op", ["Sigmoid", "HardSwish"])
def test_a_function_that_bends(op: str) -> None:
    assert refusal(pair(node(op))) == f"{op} between does not pass a factor per channel on"


def test_a_pad_with_ones() -> None:
    pad = helper.make_node("Pad", ["t", "pads", "one"], ["u"], "between")
    graph = pair(pad, pads=np.array([0, 0, 1, 1, 0, 0, 1, 1]), one=np.array(1, np.float32))
    assert refusal(graph) == "Pad between does not pass a factor per channel on"


def test_a_second_reader_that_is_no_layer() -> None:
    graph = pair(node("Relu"), helper.make_node("Sigmoid", ["u"], ["z"], "other"))
    graph.outputs.append(graph.tensors()["z"])
    assert refusal(graph) == "Sigmoid other does not pass a factor per channel on"


def test_a_tensor_that_is_returned() -> None:
    graph = pair(node("Relu"))
    graph.outputs.append(graph.tensors()["u"])
    assert refusal(graph) == "'u' is returned"


def test_a_residual() -> None:
    add = helper.make_node("Add", ["t", "t"], ["u"], "between")
    assert refusal(pair(add)) == "between reads 't' in a way that is not looked into"


def test_a_product_of_a_tensor_with_what_comes_from_it() -> None:
    gate = [helper.make_node("Relu", ["t"], ["g"], "relu"), helper.make_node("Mul", ["t", "g"], ["u"], "between")]
    assert refusal(pair(*gate)) == "between reads what comes from it twice"


def test_a_shared_weight() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["t"], "first"),
        helper.make_node("Conv", ["t", "w2"], ["y"], "second"),
        helper.make_node("Conv", ["t", "w2"], ["z"], "twin"),
    ]
    graph = model(nodes, {"w1": W1, "b1": B1, "w2": W2}, IMAGE, ("y", "z"))
    assert refusal(graph) == "the weight 'w2' is shared with twin"


# ---- any network ----------------------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.integers(0, 2**31))
def test_random_networks_compute_the_same(seed: int) -> None:
    """Grouped, transposed and shared convolutions, residuals, Concat, pools, Pad, Clip, several outputs."""
    feeds = [{"image": np.random.default_rng(seed).standard_normal((2, 3, 6, 6)).astype(np.float32)}]
    prepared = rewrite(load(random_model(seed)), PREPARE)
    result = rewrite(prepared, EQUALIZE, feeds, TOLERANCE)
    assert ops(result) == ops(prepared)


@pytest.mark.parametrize(
    ("op", "shape", "attributes"),
    [
        ("Conv", (6, 2, 3, 3), {"group": 2}),
        ("Conv", (6, 4, 3), {}),
        ("ConvTranspose", (4, 3, 2, 2), {"group": 2}),
        ("ConvTranspose", (4, 6, 2, 2), {}),
        ("Gemm", (4, 6), {}),
        ("Gemm", (6, 4), {"transB": 1}),
        ("MatMul", (4, 6), {}),
    ],
)
def test_axes_of_every_layer(op: str, shape: tuple[int, ...], attributes: dict[str, int]) -> None:
    """Scaled along its outputs or inputs, a weight's magnitudes scale in the same rows and columns."""
    found = model([helper.make_node(op, ["x", "w"], ["y"], **attributes)], {"w": uneven(*shape)}, IMAGE).nodes[0]
    axes = weight_axes(found, shape)
    assert axes is not None
    assert (axes.outputs, axes.inputs) == (6, 4)
    weight = uneven(*shape, seed=8)
    rng = np.random.default_rng(0)
    by_output, by_input = rng.uniform(0.5, 2, 6), rng.uniform(0.5, 2, 4)
    scaled = weight * axes.along_outputs(by_output) * axes.along_inputs(by_input)
    matrix = axes.magnitudes(weight)
    expected = matrix * by_output.reshape(len(matrix), -1, 1) * by_input.reshape(len(matrix), 1, -1)
    np.testing.assert_allclose(axes.magnitudes(scaled), expected, rtol=1e-12)
    np.testing.assert_allclose(axes.squares(scaled).sum(), np.square(scaled).sum(), rtol=1e-12)
