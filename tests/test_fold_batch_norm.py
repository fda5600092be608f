"""fold-batch-norm: each layer and each follower, against ONNX Runtime, and each reason to leave one.

Tolerance 2e-6 of the output's largest magnitude: weights are rounded once more (6e-8 each), sums of some dozen products
come in the same order. float16 models: 2e-3, as float16 has 11 bits.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import NodeProto, TensorProto, helper, numpy_helper
from rewriting import constants, notes_of, ops, rewrite

from lcpaq_onnx.graph.graph_io import Graph, load, to_proto
from lcpaq_onnx.manager.pass_base import PassContext
from lcpaq_onnx.passes.rewrite.fold_batch_norm import FoldBatchNorm

FOLD = (FoldBatchNorm(),)
TOLERANCE = 2e-6
C = 6
NORM = ["scale", "shift", "mean", "variance"]


def random(*shape: int, seed: int = 0, dtype: object = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def norm_parameters(channels: int = C, dtype: object = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(9)
    values = {name: rng.standard_normal(channels).astype(dtype) for name in NORM}
    return values | {"variance": rng.uniform(0.1, 3, channels).astype(dtype)}


def model(
    nodes: list[NodeProto],
    initializers: Mapping[str, np.ndarray],
    x: np.ndarray,
    outputs: tuple[str, ...] = ("y",),
    rank: int | None = None,
) -> Graph:
    """Graph whose outputs are of ``rank``, by default that of ``x``."""
    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    rank = rank or x.ndim
    body = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, x.shape)],
        [helper.make_tensor_value_info(name, kind, [None] * rank) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in initializers.items()],
    )
    return load(helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def norm(source: str = "t", target: str = "y", **attributes: object) -> NodeProto:
    return helper.make_node("BatchNormalization", [source, *NORM], [target], "norm", **attributes)


IMAGE = random(2, 4, 5, 5)
ROWS = random(3, 4)
LAYERS = {
    "conv": (IMAGE, "Conv", random(C, 4, 3, 3, seed=1), {"pads": [1, 1, 1, 1]}),
    "conv-strided-groups": (IMAGE, "Conv", random(C, 2, 3, 3, seed=1), {"group": 2, "strides": [2, 2]}),
    "conv-1d": (random(2, 4, 9), "Conv", random(C, 4, 3, seed=1), {}),
    "conv-3d": (random(1, 4, 4, 4, 4), "Conv", random(C, 4, 2, 2, 2, seed=1), {}),
    "transpose": (IMAGE, "ConvTranspose", random(4, C, 3, 3, seed=1), {"strides": [2, 2]}),
    "transpose-groups": (IMAGE, "ConvTranspose", random(4, C // 2, 3, 3, seed=1), {"group": 2}),
    "gemm": (ROWS, "Gemm", random(4, C, seed=1), {}),
    "gemm-transposed": (ROWS, "Gemm", random(C, 4, seed=1), {"transB": 1, "alpha": 0.5, "beta": 2.0}),
}


def layer(name: str, *, bias: bool, target: str = "t") -> tuple[np.ndarray, NodeProto, dict[str, np.ndarray]]:
    x, op, weight, attributes = LAYERS[name]
    inputs = ["x", "w", "b"] if bias else ["x", "w"]
    values = {"w": weight, "b": random(C, seed=2)} if bias else {"w": weight}
    return x, helper.make_node(op, inputs, [target], "layer", **attributes), values


# ---- BatchNormalization ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("name", list(LAYERS))
def test_a_norm_moves_into_the_layer_before_it(name: str, bias: bool) -> None:
    x, node, values = layer(name, bias=bias)
    graph = model([node, norm(epsilon=1e-3)], values | norm_parameters(), x)
    result = rewrite(graph, FOLD, [{"x": x}], TOLERANCE)
    assert ops(result) == [node.op_type]
    assert list(constants(result)) == (["w", "b"] if bias else ["w", "y/bias"])


def test_the_default_epsilon_is_that_of_onnx() -> None:
    x, node, values = layer("conv", bias=False)
    parameters = norm_parameters() | {"variance": np.full(C, 1e-5, np.float32)}
    rewrite(model([node, norm()], values | parameters, x), FOLD, [{"x": x}], TOLERANCE)


def test_half_precision_stays_half_precision() -> None:
    x, node, values = layer("conv", bias=True)
    halves = {name: value.astype(np.float16) for name, value in (values | norm_parameters()).items()}
    graph = model([node, norm()], halves, x.astype(np.float16))
    result = rewrite(graph, FOLD, [{"x": x.astype(np.float16)}], 2e-3)
    assert {value.dtype for value in constants(result).values()} == {np.dtype(np.float16)}


@pytest.mark.parametrize("shape", [(C,), (1, C), (1,), (1, 1), ()])
def test_any_bias_of_a_gemm_that_is_one_number_per_channel(shape: tuple[int, ...]) -> None:
    x, node, values = layer("gemm-transposed", bias=True)
    values["b"] = np.asarray(random(*shape, seed=4), np.float32)
    result = rewrite(model([node, norm()], values | norm_parameters(), x), FOLD, [{"x": x}], TOLERANCE)
    assert ops(result) == ["Gemm"]
    assert "beta" not in result.nodes[0].attrs


# ---- constants per channel ------------------------------------------------------------------------------------------
FOLLOWERS = [("Mul", 0), ("Mul", 1), ("Add", 0), ("Add", 1), ("Sub", 0), ("Sub", 1), ("Div", 0)]


@pytest.mark.parametrize("shape", [(1, C, 1, 1), (C, 1, 1), (), (1,)], ids=str)
@pytest.mark.parametrize(("op", "data_at"), FOLLOWERS)
def test_arithmetic_with_one_number_per_channel_moves_into_a_convolution(
    op: str, data_at: int, shape: tuple[int, ...]
) -> None:
    x, node, values = layer("conv", bias=op == "Sub")
    operand = np.asarray(random(*shape, seed=3) + np.float32(2), np.float32)
    inputs = ["t", "c"] if data_at == 0 else ["c", "t"]
    graph = model([node, helper.make_node(op, inputs, ["y"])], values | {"c": operand}, x)
    assert ops(rewrite(graph, FOLD, [{"x": x}], TOLERANCE)) == ["Conv"]


def test_a_scale_makes_no_bias() -> None:
    x, node, values = layer("gemm", bias=False)
    graph = model([node, helper.make_node("Mul", ["t", "c"], ["y"])], values | {"c": random(C, seed=3)}, x)
    assert list(constants(rewrite(graph, FOLD, [{"x": x}], TOLERANCE))) == ["w"]


def test_a_whole_chain_folds() -> None:
    x, node, values = layer("conv", bias=False)
    chain = [norm("t", "u"), helper.make_node("Mul", ["u", "c"], ["v"]), helper.make_node("Add", ["v", "d"], ["y"])]
    values |= norm_parameters() | {"c": random(1, C, 1, 1), "d": random(1, C, 1, 1)}
    assert ops(rewrite(model([node, *chain], values, x), FOLD, [{"x": x}], TOLERANCE)) == ["Conv"]


@pytest.mark.parametrize("rank", [2, 3])
def test_a_dense_layer_of_matmul_and_add_takes_scales_and_keeps_its_add(rank: int) -> None:
    """What converters leave of a batch norm on a dense layer: MatMul → Add → Mul → Sub."""
    x = random(*[2, 3][: rank - 1], 4)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["t"]),
        helper.make_node("Add", ["b", "t"], ["u"]),
        helper.make_node("Mul", ["u", "c"], ["v"]),
        helper.make_node("Sub", ["v", "d"], ["y"]),
    ]
    values = {"w": random(4, C), "b": random(C, seed=1), "c": random(C, seed=2), "d": random(C, seed=3)}
    result = rewrite(model(nodes, values, x), FOLD, [{"x": x}], TOLERANCE)
    assert ops(result) == ["MatMul", "Add"]


def test_a_bias_behind_a_matmul_stays_one() -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["t"]), helper.make_node("Add", ["t", "b"], ["y"])]
    graph = model(nodes, {"w": random(4, C), "b": random(C)}, ROWS)
    assert ops(rewrite(graph, FOLD, [{"x": ROWS}])) == ["MatMul", "Add"]
    assert notes_of(graph, *FOLD) == {}


# ---- what is shared stays good for the others ----------------------------------------------------------------------
def test_a_bias_that_others_read_is_copied() -> None:
    x, node, values = layer("conv", bias=True)
    other = helper.make_node("Conv", ["x", "w2", "b"], ["z"], "other", pads=[1, 1, 1, 1])
    graph = model([node, norm(), other], values | norm_parameters() | {"w2": random(C, 4, 3, 3, seed=8)}, x, ("y", "z"))
    result = rewrite(graph, FOLD, [{"x": x}], TOLERANCE)
    np.testing.assert_array_equal(constants(result)["b"], values["b"])
    assert "y/bias" in constants(result)


def test_the_caller_s_graph_stays_as_it_was() -> None:
    x, node, values = layer("conv", bias=True)
    graph = model([node, norm()], values | norm_parameters(), x)
    before = to_proto(graph)
    rewrite(graph, FOLD, [{"x": x}], TOLERANCE)
    assert to_proto(graph) == before


# ---- what stays -----------------------------------------------------------------------------------------------------
def refusal(graph: Graph, x: np.ndarray, node: str = "norm") -> str:
    """The reason; the graph must be as it was."""
    count = len(graph.nodes)
    assert len(rewrite(graph, FOLD, [{"x": x}]).nodes) == count
    return notes_of(graph, *FOLD)[node]


def test_other_readers_of_the_layer() -> None:
    x, node, values = layer("conv", bias=False)
    extra = helper.make_node("Relu", ["t"], ["z"])
    graph = model([node, norm(), extra], values | norm_parameters(), x, ("y", "z"))
    assert refusal(graph, x) == "its input 't' has other readers"


def test_a_layer_whose_output_is_returned() -> None:
    x, node, values = layer("conv", bias=False)
    graph = model([node, norm()], values | norm_parameters(), x, ("y", "t"))
    assert refusal(graph, x) == "its input 't' has other readers"


def test_a_shared_weight() -> None:
    x, node, values = layer("conv", bias=False)
    twin = helper.make_node("Conv", ["x", "w"], ["z"], "twin")
    graph = model([node, norm(), twin], values | norm_parameters(), x, ("y", "z"))
    assert refusal(graph, x) == "the weight 'w' is shared with twin"


def test_a_computed_weight() -> None:
    x, node, values = layer("conv", bias=False)
    nodes = [helper.make_node("RandomNormal", [], ["w"], shape=list(values["w"].shape), seed=1.0), node, norm()]
    graph = model(nodes, norm_parameters(), x)
    assert notes_of(graph, *FOLD)["norm"] == "the weight 'w' is computed at run time"


@pytest.mark.parametrize("name", ["w", "b", "scale"])
def test_an_overridable_parameter(name: str) -> None:
    x, node, values = layer("conv", bias=True)
    proto = to_proto(model([node, norm()], values | norm_parameters(), x))
    shape = (values | norm_parameters())[name].shape
    proto.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    assert f"'{name}' is also an input of the model" in refusal(load(proto), x)


def test_training_mode() -> None:
    x, node, values = layer("conv", bias=False)
    training = helper.make_node(
        "BatchNormalization", ["t", *NORM], ["y", "running_mean", "running_var"], "norm", training_mode=1
    )
    graph = model([node, training], values | norm_parameters(), x)
    assert notes_of(graph, *FOLD) == {"norm": "it is in training mode"}


def test_a_norm_behind_something_else() -> None:
    nodes = [helper.make_node("Relu", ["x"], ["t"]), norm()]
    assert refusal(model(nodes, norm_parameters(4), IMAGE), IMAGE) == "its input 't' is not the output of a layer"
    first = model([norm("x")], norm_parameters(4), IMAGE)
    assert refusal(first, IMAGE) == "its input 'x' is not the output of a layer"


def test_half_precision_that_would_overflow() -> None:
    x, node, values = layer("conv", bias=False)
    huge = norm_parameters() | {"scale": np.full(C, 6e4), "variance": np.zeros(C)}
    halves = {name: value.astype(np.float16) for name, value in (values | huge).items()}
    graph = model([node, norm()], halves, x.astype(np.float16))
    assert notes_of(graph, *FOLD) == {"norm": "the folded weights do not fit float16"}


@pytest.mark.parametrize("shape", [(5,), (5, 1), (1, 1, 5, 5), (1, 1, C, 1, 1), (2, C, 1, 1)], ids=str)
def test_a_constant_that_does_not_run_along_channels(shape: tuple[int, ...]) -> None:
    x, node, values = layer("conv", bias=False)
    graph = model([node, helper.make_node("Mul", ["t", "c"], ["y"], "mul")], values | {"c": random(*shape)}, x, rank=max(4, len(shape)))  # fmt: skip  # noqa: E501
    assert refusal(graph, x, "mul") == f"'c' of shape {list(shape)} is not one number per channel of layer"


def test_a_constant_that_raises_the_rank_behind_a_matmul() -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["t"]), helper.make_node("Mul", ["t", "c"], ["y"], "mul")]
    graph = model(nodes, {"w": random(4, C), "c": random(1, 1, C)}, ROWS, rank=3)
    assert "is not one number per channel" in refusal(graph, ROWS, "mul")


def test_a_gemm_bias_with_a_number_per_row() -> None:
    x, node, values = layer("gemm", bias=True)
    graph = model([node, norm()], values | norm_parameters() | {"b": random(3, C)}, x)
    assert refusal(graph, x) == f"the bias 'b' of shape [3, {C}] is not one number per channel"


def test_division_by_zero_is_left_to_the_runtime() -> None:
    x, node, values = layer("conv", bias=False)
    graph = model(
        [node, helper.make_node("Div", ["t", "c"], ["y"], "div")], values | {"c": np.zeros((), np.float32)}, x
    )
    assert notes_of(graph, *FOLD) == {"div": "its scale or shift is not finite"}


def test_opsets_with_broadcast_attributes() -> None:
    x, node, values = layer("conv", bias=True)
    graph = model([node, helper.make_node("Mul", ["t", "c"], ["y"], "mul")], values | {"c": random(1)}, x)
    graph.opset = 6
    (note,) = FoldBatchNorm().run(graph, PassContext.of(graph)).notes
    assert note.reason == "opset 6 is older than 7, raise it first"


# ---- random graphs --------------------------------------------------------------------------------------------------
@st.composite
def networks(draw: st.DrawFn) -> Graph:
    """Convolutions, norms, arithmetic per channel or per position, branches, returned intermediates."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    nodes: list[NodeProto] = []
    values: dict[str, np.ndarray] = {}
    tensors = ["x"]
    for index in range(draw(st.integers(1, 7))):
        source, target = draw(st.sampled_from(tensors[-2:])), f"t{index}"
        kind = draw(st.sampled_from(["Conv", "ConvTranspose", "norm", "Mul", "Add", "Sub", "Div", "Relu", "join"]))
        if kind in ("Conv", "ConvTranspose"):
            group = draw(st.sampled_from([1, 2]))
            weight = draw(st.sampled_from([f"w{index}", *(name for name in values if name[0] == "w")]))
            values.setdefault(weight, (rng.standard_normal((4, 4 // group, 3, 3)) / 4).astype(np.float32))
            group = 4 // values[weight].shape[1]
            bias = [f"b{index}"] if draw(st.booleans()) else []
            values |= {name: rng.standard_normal(4).astype(np.float32) for name in bias}
            nodes.append(helper.make_node(kind, [source, weight, *bias], [target], group=group, pads=[1] * 4))
        elif kind == "norm":
            names = [f"{name}{index}" for name in NORM]
            values |= {name: rng.uniform(0.5, 2, 4).astype(np.float32) for name in names}
            nodes.append(helper.make_node("BatchNormalization", [source, *names], [target]))
        elif kind == "Relu":
            nodes.append(helper.make_node(kind, [source], [target]))
        elif kind == "join":
            nodes.append(helper.make_node("Add", [source, tensors[0]], [target]))
        else:
            shape = draw(st.sampled_from([(), (4, 1, 1), (1, 4, 1, 1), (5,), (1, 1, 5, 5)]))
            values[f"c{index}"] = np.asarray(rng.uniform(0.5, 2, shape), np.float32)
            operands = [source, f"c{index}"]
            nodes.append(helper.make_node(kind, draw(st.permutations(operands)), [target]))
        tensors.append(target)
    returned = draw(st.sets(st.sampled_from(tensors[1:]), max_size=2)) | {tensors[-1]}
    return model(nodes, values, np.empty((2, 4, 5, 5), np.float32), tuple(sorted(returned)))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(networks())
def test_random_networks_compute_the_same(graph: Graph) -> None:
    """1e-5: up to seven layers, each adding the rounding of its weights; divisions can amplify it fourfold."""
    rewrite(graph, FOLD, [{"x": random(2, 4, 5, 5)}], 1e-5)
