"""fold-constants and remove-unused: every form of a constant, every reason to leave one."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser
from rewriting import constants, notes_of, ops, outputs_of, parse, rewrite

from lcpaq_onnx.graph.graph_io import Graph, load, to_proto
from lcpaq_onnx.manager.pass_base import PassContext
from lcpaq_onnx.passes.rewrite.fold_constants import FoldConstants
from lcpaq_onnx.passes.rewrite.remove_unused import RemoveUnused

RNG = np.random.default_rng(5)
X = RNG.standard_normal((2, 3)).astype(np.float32)
W = RNG.standard_normal((4, 3)).astype(np.float32)
FOLD = (FoldConstants(),)


def model(nodes: list[onnx.NodeProto], initializers: dict[str, np.ndarray], width: int = 3) -> Graph:
    """x float[2,3] → nodes → y float[2,width]."""
    body = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, width])],
        [numpy_helper.from_array(values, name) for name, values in initializers.items()],
    )
    return load(helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


# ---- Constant nodes -------------------------------------------------------------------------------------------------
SPARSE = helper.make_sparse_tensor(
    helper.make_tensor("v", TensorProto.FLOAT, [2], [1.5, -2.0]),
    helper.make_tensor("i", TensorProto.INT64, [2], [0, 4]),
    [2, 3],
)


@pytest.mark.parametrize(
    ("attribute", "expected"),
    [
        ({"value": numpy_helper.from_array(X, "v")}, X),
        ({"value_float": 2.5}, np.float32(2.5)),
        ({"value_floats": [1.0, 2.0, 3.0]}, np.array([1, 2, 3], np.float32)),
        ({"sparse_value": SPARSE}, np.array([[1.5, 0, 0], [0, -2, 0]], np.float32)),
    ],
    ids=["tensor", "float", "floats", "sparse"],
)
def test_a_constant_node_becomes_an_initializer(attribute: dict[str, object], expected: np.ndarray) -> None:
    graph = model(
        [helper.make_node("Constant", [], ["c"], **attribute), helper.make_node("Add", ["x", "c"], ["y"])], {}
    )
    result = rewrite(graph, FOLD, [{"x": X}])
    assert ops(result) == ["Add"]
    np.testing.assert_array_equal(result.nodes[0].inputs[1].values, expected)


@pytest.mark.parametrize(("attribute", "expected"), [({"value_int": 3}, 3), ({"value_ints": [3, 2]}, [3, 2])])
def test_integer_constants(attribute: dict[str, object], expected: object) -> None:
    nodes = [helper.make_node("Constant", [], ["c"], **attribute), helper.make_node("Identity", ["c"], ["n"])]
    nodes += [helper.make_node("Cast", ["n"], ["f"], to=TensorProto.FLOAT), helper.make_node("ReduceSum", ["f"], ["s"])]
    result = rewrite(model([*nodes, helper.make_node("Add", ["x", "s"], ["y"])], {}), FOLD, [{"x": X}])
    assert ops(result) == ["Add"]
    assert constants(result)["s"] == np.sum(expected)


@pytest.mark.parametrize("attribute", [{"value_string": "a"}, {"value_strings": ["a", "b"]}])
def test_string_constants(attribute: dict[str, object]) -> None:
    nodes = [helper.make_node("Constant", [], ["c"], **attribute), helper.make_node("Equal", ["c", "c"], ["e"])]
    nodes += [helper.make_node("Cast", ["e"], ["f"], to=TensorProto.FLOAT), helper.make_node("ReduceSum", ["f"], ["s"])]
    graph = model([*nodes, helper.make_node("Add", ["x", "s"], ["y"])], {})
    graph.opset = 19  # Equal of strings
    result = rewrite(graph, FOLD)
    assert ops(result)[-1] == "Add"
    assert "Constant" not in ops(result)


def test_the_stored_bytes_of_a_tensor_stay() -> None:
    """An int4 Constant, which NumPy cannot hold packed."""
    packed = helper.make_tensor("v", TensorProto.INT4, [4], [1, -2, 3, 7])
    nodes = [helper.make_node("Constant", [], ["c"], value=packed)]
    nodes += [helper.make_node("Cast", ["c"], ["f"], to=TensorProto.FLOAT), helper.make_node("ReduceSum", ["f"], ["s"])]
    graph = model([*nodes, helper.make_node("Add", ["x", "s"], ["y"])], {})
    graph.opset, graph.ir_version = 21, 10
    result = rewrite(graph, FOLD, [{"x": X}])
    assert ops(result) == ["Cast", "ReduceSum", "Add"]  # packed storage is not unpacked
    (stored,) = to_proto(result).graph.initializer
    assert (stored.name, stored.data_type, len(stored.raw_data or stored.int32_data)) == ("c", TensorProto.INT4, 2)


# ---- expressions ----------------------------------------------------------------------------------------------------
def test_a_weight_behind_many_operators_is_exposed() -> None:
    nodes = [
        helper.make_node("Constant", [], ["shape"], value_ints=[3, 4]),
        helper.make_node("Transpose", ["half"], ["t"], perm=[1, 0]),
        helper.make_node("Cast", ["t"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["f", "shape"], ["r"]),
        helper.make_node("Identity", ["r"], ["i"]),
        helper.make_node("Split", ["i"], ["left", "right"], axis=1),
        helper.make_node("Concat", ["right", "left"], ["w"], axis=1),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    half = W.astype(np.float16)
    result = rewrite(model(nodes, {"half": half}, 4), FOLD, [{"x": X}])
    assert ops(result) == ["MatMul"]
    expected = half.T.astype(np.float32)
    np.testing.assert_array_equal(constants(result)["w"], np.concatenate([expected[:, 2:], expected[:, :2]], 1))


def test_slices_and_indices() -> None:
    graph = parse(
        """g (float[2,3] x) => (float[2,2] y)
        <float[3,4] w = {1,2,3,4,5,6,7,8,9,10,11,12}, int64[1] b = {0}, int64[1] e = {4}, int64[1] a = {1},
         int64[1] s = {2}, int64[3] i = {2,-2,0}, int64[1] n = {0}>
        { c = Slice(w, b, e, a, s)  d = Gather(c, i)  q = Unsqueeze(d, n)  r = Squeeze(q, n)  m = MatMul(x, r)
          y = Flatten(m) }"""
    )
    result = rewrite(graph, FOLD, [{"x": X}])
    np.testing.assert_array_equal(constants(result)["r"], [[9, 11], [5, 7], [1, 3]])


def test_weight_norm_is_evaluated() -> None:
    """torch's weight_norm: w = g · v / ‖v‖; sums of squares may round differently, 4 ulp are 5e-7."""
    nodes = [
        helper.make_node("ReduceL2", ["v"], ["norm"], axes=[1], keepdims=1),
        helper.make_node("Div", ["v", "norm"], ["unit"]),
        helper.make_node("Mul", ["unit", "g"], ["w"]),
        helper.make_node("Gemm", ["x", "w"], ["y"], transB=1),
    ]
    graph = model(nodes, {"v": W, "g": np.ones((4, 1), np.float32)}, 4)
    result = rewrite(graph, FOLD, [{"x": X}], tolerance=5e-7)
    assert ops(result) == ["Gemm"]


def test_copies_of_a_shared_constant_stay_one() -> None:
    """torch exports a bias that several layers share as Identity of one initializer."""
    nodes = [helper.make_node("Identity", ["b"], [f"b{n}"]) for n in range(3)]
    adds = [helper.make_node("Add", [f"h{n}" if n else "x", f"b{n}"], [f"h{n + 1}"]) for n in range(3)]
    adds[-1].output[0] = "y"
    result = rewrite(model([*nodes, *adds], {"b": X[0]}, 3), FOLD, [{"x": X}])
    assert list(constants(result)) == ["b"]
    assert ops(result) == ["Add"] * 3


def test_a_constant_that_is_read_elsewhere_too_is_said_to_be_stored_twice() -> None:
    table = RNG.standard_normal((600, 3)).astype(np.float32)
    nodes = [helper.make_node("Transpose", ["table"], ["w"]), helper.make_node("MatMul", ["x", "w"], ["l"])]
    nodes += [helper.make_node("MatMul", ["l", "table"], ["y"])]
    graph = model(nodes, {"table": table}, 3)
    rewrite(graph, FOLD, [{"x": X}])
    assert "holds it twice" in notes_of(graph, *FOLD)["Transpose:w"]


# ---- what stays -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("columns", "folds"), [(100, True), (100_000, False)])
@pytest.mark.parametrize("op", ["ConstantOfShape", "Expand", "Tile"])
def test_nothing_is_blown_up(op: str, columns: int, folds: bool) -> None:
    inputs = {"Expand": ["one", "dims"], "Tile": ["one", "dims"], "ConstantOfShape": ["dims"]}[op]
    nodes = [helper.make_node(op, inputs, ["c"]), helper.make_node("ReduceSum", ["c"], ["s"])]
    initializers = {"one": np.ones((1, 1), np.float32), "dims": np.array([2, columns])}
    graph = model([*nodes, helper.make_node("Add", ["x", "s"], ["y"])], initializers, 3)
    result = rewrite(graph, FOLD, [{"x": X}])
    assert (ops(result) == ["Add"]) is folds
    if not folds:
        assert notes_of(graph, *FOLD)[f"{op}:c"] == (
            f"its result would take {8 * columns} bytes, its constant inputs take {16 + 4 * (len(inputs) - 1)}"
        )


def test_the_size_limit_is_an_option() -> None:
    graph = parse(
        "g (float[1] x) => (float[100] y) <float[1] c = {1}, int64[1] n = {100}> { t = Tile(c, n) y = Add(x, t) }"
    )
    assert ops(rewrite(graph, [FoldConstants(small_bytes=0, growth=1.5)])) == ["Tile", "Add"]
    assert ops(rewrite(graph, [FoldConstants(small_bytes=0, growth=100)])) == ["Add"]


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("DequantizeLinear(q, s)", "how quantized tensors are stored"),
        ("QuantizeLinear(f, s)", "how quantized tensors are stored"),
        ("Cast<to=1>(q)", "how packed weights are stored"),
        ("Cast<to=2>(big)", "integer type cannot hold"),
        ("Cast<to=6>(nan)", "the reference implementation fails"),
        ("Div(i, zero)", "the reference implementation fails"),
        ("Multinomial(f)", "Multinomial is not among the operators that are evaluated"),
        ("Reshape(f, bad)", "the reference implementation fails"),
        ("local.Thing(f)", "operators of domain 'local' are not evaluated"),
    ],
)
def test_what_is_not_evaluated_has_a_reason(expression: str, reason: str) -> None:
    proto = parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 17, "local": 1]> g (float[1] x) => (float[1] y)
        <int8[1,2] q = {{1,2}}, float s = {{0.5}}, float[1,2] f = {{1,2}}, float[1,2] big = {{300,-1}},
         int64[1] bad = {{5}}, float[1,2] nan = {{0,0}}, int64[2] i = {{1,2}}, int64[1] zero = {{0}}>
        {{ [it] c = {expression}  y = Identity(x) }}"""
    )
    for tensor in proto.graph.initializer:
        if tensor.name == "nan":
            tensor.CopyFrom(numpy_helper.from_array(np.array([[np.nan, np.inf]], np.float32), "nan"))
    graph = load(proto)
    (note,) = FoldConstants().run(graph, PassContext.of(graph)).notes
    assert note.node == "it"
    assert reason in note.reason


def test_a_returned_constant_keeps_its_node() -> None:
    graph = parse("g (float[1] x) => (float[1] y, float c) { [k] c = Constant<value_float=1.0>() y = Add(x, c) }")
    assert ops(rewrite(graph, FOLD, [{"x": X[0, :1]}])) == ["Constant", "Add"]
    assert notes_of(graph, *FOLD) == {"k": "'c' is returned, and what is returned needs a node"}


def overridable(ir: int) -> Graph:
    graph = parse("g (float[1] x) => (float[1] y) <float[1] b = {2}> { [n] c = Neg(b) y = Add(x, c) }", ir=ir)
    proto = to_proto(graph)
    if not any(value.name == "b" for value in proto.graph.input):
        proto.graph.input.append(helper.make_tensor_value_info("b", TensorProto.FLOAT, [1]))
    return load(proto)


def test_an_initializer_that_a_caller_may_override_stays_variable() -> None:
    graph = overridable(ir=8)
    feeds = [{"x": X[0, :1]}, {"x": X[0, :1], "b": X[1, :1]}]
    assert ops(rewrite(graph, FOLD, feeds)) == ["Neg", "Add"]
    assert "also an input" in notes_of(graph, *FOLD)["n"]


def test_before_ir_version_4_every_initializer_is_an_input_and_that_says_nothing() -> None:
    graph = overridable(ir=3)
    graph.opset = 9
    assert ops(rewrite(graph, FOLD, [{"x": X[0, :1]}])) == ["Add"]


LOOP = """g (float[2] x) => (float[2] y) <int64 trips = {3}, bool go = {1}>
{ y = Loop(trips, go, x) <body = b (int64 i, bool c, float[2] h) => (bool again, float[2] out)
  { k = Constant<value_float=0.5>()  again = Constant<value = bool {1}>()  two = Constant<value_float=2.0>()
    w = Mul(k, two)  out = Add(h, w) }> }"""


def test_in_bodies_only_constant_nodes_go_and_not_what_the_body_returns() -> None:
    result = rewrite(parse(LOOP), FOLD, [{"x": X[0, :2]}])
    (body,) = result.subgraphs()
    assert [node.op for node in body.nodes] == ["Constant", "Mul", "Add"]
    assert notes_of(parse(LOOP), *FOLD)["Constant:again"].startswith("'again' is returned")


def test_a_big_weight_is_not_decoded_nor_copied() -> None:
    """Constant → initializer moves the payload as it is in the file."""
    big = RNG.standard_normal((3, 50_000)).astype(np.float32)
    graph = model([helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(big)), helper.make_node("MatMul", ["x", "w"], ["y"])], {}, 50_000)  # fmt: skip  # noqa: E501
    result = rewrite(graph, FOLD, [{"x": X}])
    assert abs(to_proto(result).ByteSize() - to_proto(graph).ByteSize()) < 64


# ---- remove-unused --------------------------------------------------------------------------------------------------
UNUSED = """g (float[2] x, bool c) => (float[2] y) <float[2] w = {1,2}, float[2] spare = {3,4}>
{ dead = Mul(x, w)  deader = Neg(dead)
  y = If(c) <then_branch = t () => (float[2] a) { z = Relu(x) [gone] zz = Relu(deader) a = Neg(x) },
             else_branch = e () => (float[2] b) { b = Abs(x) }> }"""


def test_unread_nodes_and_initializers_go_and_what_only_they_read() -> None:
    graph = parse(UNUSED)
    result = rewrite(graph, [RemoveUnused()], [{"x": X[0, :2], "c": np.array(flag)} for flag in (True, False)])
    assert ops(result) == ["If"]
    assert constants(result) == {}
    assert [[node.op for node in body.nodes] for body in result.subgraphs()] == [["Neg"], ["Abs"]]


def test_an_operator_of_an_unknown_domain_may_do_more_than_compute() -> None:
    proto = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17, "acme": 1, "com.microsoft": 1]> g (float[1] x) => (float[1] y)'
        "{ a = Neg(x) [log] l = acme.Print(a) f = com.microsoft.Gelu(x) y = Abs(x) }"
    )
    graph = load(proto)
    assert ops(rewrite(graph, [RemoveUnused()])) == ["Neg", "Print", "Abs"]
    assert "acme.Print may do more than compute" in notes_of(graph, RemoveUnused())["log"]


def test_an_unread_initializer_that_is_an_input_is_part_of_the_interface() -> None:
    graph = parse("g (float[1] x, float[1] b) => (float[1] y) <float[1] b = {2}> { y = Abs(x) }")
    result = rewrite(graph, [RemoveUnused()])
    assert [value.name for value in to_proto(result).graph.input] == ["x", "b"]
    assert notes_of(graph, RemoveUnused()) == {"b": "it is an input of the model too"}
    assert outputs_of(result, {"x": X[0, :1]})["y"] == abs(X[0, 0])
