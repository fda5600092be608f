"""canonical-names, inline-if, separate-shared-biases: what each does, and what each leaves alone. All bit-exact."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper
from rewriting import assert_same_outputs, constants, notes_of, ops, outputs_of, parse, rewrite

from lcpaq_onnx.formats import QFormat
from lcpaq_onnx.graph import emit, packing
from lcpaq_onnx.graph.graph_io import Graph, load, to_proto
from lcpaq_onnx.graph.usage import scopes
from lcpaq_onnx.numeric.rounding import QuantizedWeight
from lcpaq_onnx.passes.rewrite.canonical_names import CanonicalNames
from lcpaq_onnx.passes.rewrite.inline_if import InlineIf
from lcpaq_onnx.passes.rewrite.separate_shared_biases import SeparateSharedBiases

X = np.array([1.0, -2.0], np.float32)
FEEDS = [{"x": X}]
NAME, INLINE, SEPARATE = (CanonicalNames(),), (InlineIf(),), (SeparateSharedBiases(),)


def names(graph: Graph) -> list[str]:
    return [node.name for scope in scopes(graph) for node in scope.nodes]


def overridable(graph: Graph, name: str, kind: int, shape: list[int]) -> Graph:
    proto = to_proto(graph)
    proto.graph.input.append(helper.make_tensor_value_info(name, kind, shape))
    return load(proto)


# ---- canonical-names ------------------------------------------------------------------------------------------------
def test_nodes_without_a_name_or_with_one_that_others_have_are_named_after_what_they_write() -> None:
    graph = parse("g (float[2] x) => (float[2] y) { [own] a = Relu(x) b = Abs(a) [same] c = Neg(b) [same] y = Abs(c) }")
    result = rewrite(graph, NAME)  # ONNX Runtime refuses the original: "two nodes with same node name"
    outputs_of(result, FEEDS[0])
    assert names(result) == ["own", "Abs:b", "Neg:c", "Abs:y"]
    assert [node.outputs[0].name for node in result.nodes] == ["a", "b", "c", "y"]


def test_a_derived_name_that_is_taken_gets_a_number() -> None:
    graph = parse('g (float[2] x) => (float[2] y) { ["Neg:y"] a = Relu(x) y = Neg(a) }')
    assert names(rewrite(graph, NAME, FEEDS)) == ["Neg:y", "Neg:y#2"]


def test_names_are_unique_across_bodies() -> None:
    graph = parse(
        """g (float[2] x, bool c) => (float[2] y) { [n] z = Relu(x)
        [choose] y = If(c) <then_branch = t () => (float[2] a) { [n] a = Neg(x) },
                            else_branch = e () => (float[2] a) { a = Neg(z) }> }"""
    )
    result = rewrite(graph, NAME, [{"x": X, "c": np.array(flag)} for flag in (True, False)])
    assert names(result) == ["Relu:z", "choose", "Neg:a", "Neg:a#2"]


def test_tensors_that_are_called_what_quantization_will_call_others_are_renamed() -> None:
    graph = parse(
        """g (float[2] x) => (float[2] "h/q") <float[2] "h/scale" = {1,2}, float[2] "lcpaq/blob" = {3,4}>
        { [act] h = Relu(x) [conv] "h/f" = Mul(h, "h/scale") [lcpaq] "x/act" = Add("h/f", "lcpaq/blob")
          ["h/Quantize"] "free/q" = Abs("x/act") [last] "h/q" = Neg("free/q") }"""
    )
    result = rewrite(graph, NAME, FEEDS)
    assert [node.outputs[0].name for node in result.nodes] == ["h", "h/f#2", "x/act#2", "free/q", "h/q"]
    assert list(constants(result)) == ["h/scale#2", "model/lcpaq/blob"]
    assert names(result) == ["act", "conv", "lcpaq", "Abs:free/q", "last"]
    assert notes_of(graph, *NAME) == {"h/q": "a quantizing pass may need this name, but it is part of the interface"}


def test_every_name_that_quantization_gives_is_known_as_taken() -> None:
    """The suffixes are written down in the pass, the names are made in `emit`: they must agree."""
    format8, format4 = QFormat(bits=8, axis=0), QFormat(bits=4, axis=0)
    integers, scale = np.zeros((2, 4), np.int8), np.ones(2, np.float32)
    weight = QuantizedWeight(integers, scale, format8)
    packed = QuantizedWeight(integers, scale, format4)
    t, copy, blob = gs.Variable("t"), gs.Variable(emit.isolated_name("t", "layer")), gs.Variable("t/q")
    ends = (*emit.conversion_ends("t", is_input=True), *emit.conversion_ends("t", is_input=False))
    zero, one = emit.activation_constants("t", 1.0, 0, QFormat(bits=8))
    made = [
        *emit.quantize_dequantize(ends[0], ends[1], zero, one, name="t", made_by=""),
        emit.isolated_dequantize(t, copy, 1.0, 0, 4, QFormat(bits=8), ""),
        emit.dequantize_weight(weight, t, ""),
        *emit.scale_weight(packed, t, ""),
        emit.dequantize_bias(np.zeros(2, np.int32), scale, t, ""),
        packing.unpack_cast(integers, 4, blob, ""),
        *packing.unpack_blob(packing.pack_planes(np.zeros(16, np.int8), 3), 3, [(blob, (5,)), (blob, (8,))], ""),
    ]
    tensors = {tensor.name for node in made for tensor in (*node.inputs, *node.outputs)} | {end.name for end in ends}
    # A graph in which each of these names stands for something else.
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])]
    chain = ["x", "t", *sorted(tensors - {"t"}), "y"]
    nodes = [helper.make_node("Relu", [a], [b], f"node{i}") for i, (a, b) in enumerate(pairwise(chain))]
    nodes[0].name = "layer"
    for node, name in zip(nodes[1:], sorted({node.name for node in made}), strict=False):
        node.name = name
    body = helper.make_graph(nodes, "g", inputs, outputs)
    graph = load(helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    result = rewrite(graph, NAME, FEEDS)
    left = {tensor.name for node in result.nodes for tensor in node.outputs}
    assert left & tensors == {"t"}
    assert not {node.name for node in result.nodes} & {node.name for node in made}


# ---- inline-if ------------------------------------------------------------------------------------------------------
CHOOSE = """g (float[2] x) => (float[2] y) <bool on = {{{on}}}>
{{ h = Relu(x)
   [choose] y = If(on)
     <then_branch = t () => (float[2] a) <float[2] k = {{5,6}}> {{ [n] m = Add(h, k) a = Abs(m) }},
      else_branch = e () => (float[2] b) <float[2] k = {{7,8}}> {{ [n] m = Sub(x, k) b = Neg(m) }}> }}"""


@pytest.mark.parametrize(
    ("on", "left", "k"), [(1, ["Relu", "Add", "Abs"], [5, 6]), (0, ["Relu", "Sub", "Neg"], [7, 8])]
)
def test_the_branch_that_is_always_taken_stays(on: int, left: list[str], k: list[float]) -> None:
    result = rewrite(parse(CHOOSE.format(on=on)), INLINE, FEEDS)
    assert ops(result) == left
    assert constants(result)["k"].tolist() == k
    relu = result.nodes[0]
    assert len(relu.outputs[0].outputs) == on, "the other branch must be forgotten as a reader"


def test_names_that_are_taken_get_a_number() -> None:
    graph = parse(
        """g (float[2] x) => (float[2] y) <bool on = {1}, float[2] k0 = {1,2}>
        { [n] o = Mul(x, k0)
          p = If(on) <then_branch = t () => (float[2] a) <float[2] k = {5,6}> { [n] m = Add(x, k) a = Abs(m) },
                      else_branch = e () => (float[2] b) { b = Neg(x) }>
          q = If(on) <then_branch = t () => (float[2] a) <float[2] k = {9,6}> { [n] m = Sub(p, k) a = Abs(m) },
                      else_branch = e () => (float[2] b) { b = Neg(x) }>
          y = Add(q, o) }"""
    )
    result = rewrite(graph, INLINE, FEEDS)
    assert [node.outputs[0].name for node in result.nodes] == ["o", "m#2", "p", "m", "q", "y"]
    assert {name: value.tolist() for name, value in constants(result).items()} == {
        "k0": [1, 2],
        "k#2": [5, 6],
        "k": [9, 6],
    }


def test_nested_conditions_and_conditions_in_loops() -> None:
    graph = parse(
        """g (float[2] x) => (float[2] y) <bool on = {1}, bool off = {0}, int64 trips = {2}>
        { z = If(on) <then_branch = t () => (float[2] a)
                { u = Abs(x) a = If(off) <then_branch = tt () => (float[2] c) { c = Neg(u) },
                                          else_branch = ee () => (float[2] d) { d = Exp(u) }> },
              else_branch = e () => (float[2] b) { b = Neg(x) }>
          y = Loop(trips, on, z) <body = l (int64 i, bool go, float[2] s) => (bool more, float[2] r)
                { more = Identity(go) r = If(on) <then_branch = lt () => (float[2] f) { f = Mul(s, x) },
                                                  else_branch = le () => (float[2] g) { g = Neg(s) }> }> }"""
    )
    result = rewrite(graph, INLINE, FEEDS)
    assert ops(result) == ["Abs", "Exp", "Loop"]
    assert [[node.op for node in body.nodes] for body in result.subgraphs()] == [["Identity", "Mul"]]


def test_outputs_that_a_branch_only_passes_on() -> None:
    """Constants and one tensor twice, some read further on, some returned."""
    graph = parse(
        """g (float[2] x) => (float[2] y, float[2] p, float[2] q, float[2] r) <bool on = {1}>
        { p, q, r, s, t = If(on) <
            then_branch = tb () => (float[2] c, float[2] n, float[2] n, float[2] d, float[2] n)
              <float[2] c = {1,2}, float[2] d = {3,4}> { n = Neg(x) },
            else_branch = eb () => (float[2] a, float[2] a1, float[2] a2, float[2] a3, float[2] a4)
              { a = Abs(x) a1 = Abs(x) a2 = Abs(x) a3 = Abs(x) a4 = Abs(x) }>
          v = Add(s, t) w = Mul(p, q) y = Add(v, w) }"""
    )
    result = rewrite(graph, INLINE)
    assert ops(result) == ["Neg", "Identity", "Identity", "Add", "Mul", "Add"]
    # Not compared with the original: ONNX Runtime 1.32 returns uninitialized memory for a tensor returned twice.
    c, d = np.array([[1, 2], [3, 4]], np.float32)
    expected = {"y": d - X + c * -X, "p": c, "q": -X, "r": -X}
    assert_same_outputs(expected, outputs_of(result, FEEDS[0]), 0)


def test_conditions_that_are_not_known_stay() -> None:
    computed = parse(CHOOSE.format(on=1).replace("h = Relu(x)", "h = Relu(x) c = Not(on)").replace("If(on)", "If(c)"))
    assert ops(rewrite(computed, INLINE, FEEDS)) == ["Relu", "Not", "If"]
    assert notes_of(computed, *INLINE) == {"choose": "its condition 'c' is computed at run time"}
    fed = overridable(parse(CHOOSE.format(on=1)), "on", TensorProto.BOOL, [])
    fed_outputs = [{"x": X, "on": np.array(flag)} for flag in (True, False)]
    assert ops(rewrite(fed, INLINE, fed_outputs)) == ["Relu", "If"]
    assert "also an input of the model" in notes_of(fed, *INLINE)["choose"]


def test_equal_unnamed_nodes_of_sibling_branches_are_told_apart() -> None:
    """graphsurgeon compares nodes by value; forgetting one branch must not forget the other's equal node."""
    graph = parse(
        """g (float[2] x) => (float[2] y) <bool on = {0}> { h = Relu(x)
        y = If(on) <then_branch = t () => (float[2] a) { a = Neg(h) },
                    else_branch = e () => (float[2] a) { a = Neg(h) }> }"""
    )
    result = rewrite(graph, INLINE, FEEDS)
    (reader,) = result.nodes[0].outputs[0].outputs
    assert reader is result.nodes[1]


# ---- separate-shared-biases -----------------------------------------------------------------------------------------
SHARED = """g (float[1,2] x) => (float[1,2] y, float[1,2] z)
<float[2,2] w = {1,2,3,4}, float[2,2] v = {5,6,7,8}, float[2] b = {9,10}>
{ [first] h = Gemm(x, w, b) [second] y = Gemm(h, v, b) [third] z = Gemm(x, v) %s }"""
ROW = [{"x": X[None]}]


def test_layers_that_share_a_bias_get_one_each() -> None:
    result = rewrite(parse(SHARED % ""), SEPARATE, ROW)
    assert [node.inputs[2].name for node in result.nodes[:2]] == ["b/first", "b/second"]
    assert sorted(constants(result)) == ["b/first", "b/second", "v", "w"]


def test_a_bias_that_something_else_reads_stays_for_it() -> None:
    graph = parse((SHARED % "").replace("second] y = Gemm(h, v, b)", "second] y = Add(h, b)"))
    result = rewrite(graph, SEPARATE, ROW)
    assert [node.inputs[-1].name for node in result.nodes[:2]] == ["b/first", "b"]


def test_a_bias_of_one_layer_stays() -> None:
    graph = parse((SHARED % "").replace("Gemm(h, v, b)", "Gemm(h, v)"))
    assert not Counter(constants(rewrite(graph, SEPARATE, ROW)))["b/first"]


def test_a_bias_that_a_body_reads_is_shared_too() -> None:
    body = """t = If(c) <then_branch = tb () => (float[2] a) { a = Neg(b) },
                         else_branch = eb () => (float[2] e) { e = Abs(b) }>"""
    text = (SHARED % body).replace("Gemm(h, v, b)", "Gemm(h, v)").replace("[1,2] x)", "[1,2] x, bool c)")
    result = rewrite(
        parse(text.replace("float[1,2] z)", "float[1,2] z, float[2] t)")), SEPARATE, [{**ROW[0], "c": np.array(True)}]
    )
    assert result.nodes[0].inputs[2].name == "b/first"
    assert "b" in constants(result)


def test_an_overridable_bias_stays_shared() -> None:
    graph = overridable(parse(SHARED % ""), "b", TensorProto.FLOAT, [2])
    assert "b/first" not in constants(rewrite(graph, SEPARATE, [*ROW, {**ROW[0], "b": X}]))
    assert notes_of(graph, *SEPARATE)["first"] == "its bias 'b' is shared, and also an input of the model"
