"""raise-opset: what the converter changes is taken over, everything else stays; wrong conversions are refused."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from model_equality import canonical
from onnx import TensorProto, helper, parser
from rewriting import constants, notes_of, ops, parse, rewrite, traced

from lcpaq_onnx.errors import PassError
from lcpaq_onnx.graph.graph_io import load, node_metadata, to_proto
from lcpaq_onnx.passes.pipelines import raise_to
from lcpaq_onnx.passes.rewrite.raise_opset import RaiseOpset

X = np.random.default_rng(1).standard_normal((2, 3, 4)).astype(np.float32)
OLD = """g (float[2,3,4] x) => (float[1,2,3,4] y)
{ [soft] a = Softmax(x) [sum] b = ReduceSum<axes=[2], keepdims=1>(a) [mul] c = Mul(x, b)
  [unsqueeze] y = Unsqueeze<axes=[0]>(c) }"""


@pytest.mark.parametrize(("to", "ir"), [(13, 8), (21, 10), (25, 13)])
def test_operators_that_mean_something_else_are_rewritten(to: int, ir: int) -> None:
    """Softmax-11 flattens from axis 1 on, Softmax-13 works along the last axis; axes became inputs."""
    graph = parse(OLD, opset=11, ir=8)
    result = rewrite(graph, [RaiseOpset(to=to)], [{"x": X}], tolerance=1e-6)
    assert (result.opset, result.ir_version) == (to, ir)
    assert {"soft", "sum", "mul", "unsqueeze"} <= {node.name for node in result.nodes}
    assert {"a", "b", "c", "y"} <= {tensor.name for node in result.nodes for tensor in node.outputs}


def test_the_ir_version_is_the_least_that_knows_the_opset() -> None:
    result = rewrite(parse("g (float[2] x) => (float[2] y) { y = Relu(x) }", opset=11, ir=6), [RaiseOpset(to=13)])
    assert result.ir_version == 7


def test_a_model_that_is_new_enough_stays() -> None:
    graph = parse("g (float[2] x) => (float[2] y) { y = Relu(x) }", opset=21, ir=10)
    before = to_proto(graph)
    result = traced(graph, [RaiseOpset(to=21), RaiseOpset(to=13)])
    assert not any(done.modified for done in result.trace)
    assert to_proto(result.graph) == before


def test_all_that_the_converter_forgets_stays() -> None:
    model = to_proto(parse(OLD, opset=11))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(3000, np.float32), "spare"))
    helper.set_model_props(model, {"names": "cat, dog"})
    model.doc_string, model.domain, model.model_version, model.producer_name = "doc", "acme", 7, "me"
    graph = model.graph
    graph.doc_string = "graph doc"
    for holder in (graph, *graph.node):
        holder.metadata_props.add(key="where", value=holder.name)
    graph.node[2].doc_string = "why"
    graph.value_info.append(helper.make_tensor_value_info("c", TensorProto.FLOAT, ["n", 3, None]))
    graph.value_info[0].doc_string = "typed"
    graph.quantization_annotation.add(tensor_name="c")
    graph.input.append(helper.make_tensor_value_info("spare", TensorProto.FLOAT, [3000]))
    graph.output[0].metadata_props.add(key="unit", value="m")
    raised = to_proto(rewrite(load(model), [RaiseOpset(to=21)], [{"x": X}], 1e-6))
    expected = onnx.ModelProto()
    expected.CopyFrom(model)
    expected.ir_version = 10
    expected.opset_import[0].version = 21
    # The nodes differ, and are looked at one by one.
    old, new = {node.name: node for node in graph.node}, {node.name: node for node in raised.graph.node if node.name}
    assert list(new) == list(old)
    assert all(new[name].metadata_props == old[name].metadata_props for name in old)
    assert new["mul"] == old["mul"]
    del expected.graph.node[:]
    del raised.graph.node[:]
    assert canonical(raised) == canonical(expected)


def test_untouched_nodes_stay_the_same_objects_and_are_not_stamped_as_made() -> None:
    result = traced(parse(OLD, opset=11), [RaiseOpset(to=13)]).graph
    stamped = {node.name: "lcpaq.pass" in node_metadata(node) for node in result.nodes}
    assert stamped == {"": True, "soft": False, "sum": False, "mul": False, "unsqueeze": False}


def test_in_a_pipeline_new_nodes_are_named_and_new_constants_folded() -> None:
    result = rewrite(parse(OLD, opset=11), raise_to(21), [{"x": X}], 1e-6)
    assert "Constant" not in ops(result)
    assert all(node.name for node in result.nodes)


def test_raising_twice_gives_what_raising_once_gives() -> None:
    graph = parse(OLD, opset=11)
    step = traced(traced(graph, [RaiseOpset(to=13)]).graph, [RaiseOpset(to=21)]).graph
    once = traced(graph, [RaiseOpset(to=21)]).graph
    assert [(node.op, node.name) for node in step.nodes] == [(node.op, node.name) for node in once.nodes]


def test_bodies_are_raised_too() -> None:
    graph = parse(
        """g (float[2,3,4] x, bool c) => (float[2,3,4] y)
        { [choose] y = If(c) <then_branch = t () => (float[2,3,4] a) { [soft] a = Softmax(x) },
            else_branch = e () => (float[2,3,4] b)
              { [u] q = Unsqueeze<axes=[0]>(x) [s] b = Squeeze<axes=[0]>(q) }> }""",
        opset=11,
    )
    feeds = [{"x": X, "c": np.array(flag)} for flag in (True, False)]
    result = rewrite(graph, raise_to(21), feeds, 1e-6)
    assert [node.name for body in result.subgraphs() for node in body.nodes if node.op == "Softmax"] == ["soft"]


def test_unnamed_and_equally_named_nodes_are_carried_over() -> None:
    text = OLD.replace("[soft] ", "").replace("[sum]", "[mul]")
    result = rewrite(parse(text, opset=11), [RaiseOpset(to=21)])
    assert [node.name for node in result.nodes if node.op in ("ReduceSum", "Mul")] == ["mul", "mul"]


def test_large_weights_are_not_shown_to_the_converter_and_stay_as_stored() -> None:
    weight = np.random.default_rng(0).standard_normal((4, 500)).astype(np.float32)
    proto = to_proto(parse("g (float[2,4] x) => (float[2,500] y) { [mm] m = MatMul(x, w) y = Softmax(m) }", opset=11))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    result = rewrite(load(proto), [RaiseOpset(to=21)], [{"x": X[0, :2]}], 1e-6)
    np.testing.assert_array_equal(constants(result)["w"], weight)


def test_inputs_of_ir_version_3_that_are_initializers_do_not_become_overridable() -> None:
    """In IR 3 they had to be inputs; in IR 4 and later that would stop every optimization of them."""
    graph = parse("g (float[2] x, float[2] b) => (float[2] y) <float[2] b = {1,2}> { y = Add(x, b) }", opset=8, ir=3)
    proto = to_proto(rewrite(graph, [RaiseOpset(to=13)], [{"x": X[0, 0, :2]}]))
    assert [value.name for value in proto.graph.input] == ["x"]


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("opset", [9, 10])
def test_resizing_keeps_its_coordinates(opset: int, mode: str) -> None:
    """onnx's converter leaves Resize-11 to its new default, half-pixel coordinates; the results would differ."""
    op = "Upsample" if opset == 9 else "Resize"
    graph = parse(
        f"""g (float[1,1,3,4] x) => (float[1,1,N,M] y) <float[4] s = {{1,1,2,3}}>
        {{ [up] y = {op}<mode="{mode}">(x, s) }}""",
        opset=opset,
        ir=5,
    )
    result = rewrite(graph, raise_to(21), [{"x": X[None, :1]}], 1e-6)
    assert [node.name for node in result.nodes] == ["up"]


def test_a_nearest_resize_that_shrinks_is_refused() -> None:
    text = "g (float[1,1,3,4] x) => (float[1,1,N,M] y) <float[4] s = {1,1,0.5,0.5}> { y = Resize(x, s) }"
    with pytest.raises(PassError, match="nearest Resize of 'x' is another one from opset 11 on"):
        traced(parse(text, opset=10, ir=5), [RaiseOpset(to=13)])


def test_operators_of_other_domains_are_carried_along() -> None:
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 11, "acme": 3]> g (float[2,3,4] x) => (float[2,3,4] y)'
        '{ [own] a = acme.Thing<k="v">(x) [soft] b = Softmax(a) y = acme.Thing(b) }'
    )
    result = traced(load(model), [RaiseOpset(to=21)]).graph
    assert [node.op for node in result.nodes if node.domain == "acme"] == ["Thing", "Thing"]
    assert {entry.domain: entry.version for entry in result.import_domains} == {"": 21, "acme": 3}
    alone = parser.parse_model(
        '<ir_version: 8, opset_import: ["acme": 3]> g (float[1] x) => (float[1] y) { y = acme.A(x) }'
    )
    assert traced(load(alone), [RaiseOpset(to=13)]).graph.opset == 13


def test_local_functions_are_refused() -> None:
    model = parser.parse_model(
        """<ir_version: 8, opset_import: ["": 11, "local": 1]> g (float[2] x) => (float[2] y) { y = local.F(x) }
        <opset_import: ["": 11], domain: "local"> F (a) => (b) { b = Relu(a) }"""
    )
    with pytest.raises(PassError, match=r"local functions \(F, …\) cannot be raised.*\n.*\n?.*inline_local_functions"):
        traced(load(model), [RaiseOpset(to=21)])


def test_an_opset_that_nobody_knows_is_refused() -> None:
    with pytest.raises(PassError, match="onnx cannot convert the model from opset 17 to 900"):
        traced(parse("g (float[2] x) => (float[2] y) { y = Relu(x) }"), [RaiseOpset(to=900)])
    assert notes_of(parse("g (float[2] x) => (float[2] y) { y = Relu(x) }"), RaiseOpset(to=17)) == {}
