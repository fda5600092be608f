"""Models in pieces: whatever is asked for, the values are those of the whole model."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from analysing import model_of
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from planning_case import CALIBRATION, MODELS

from lcpaq_onnx.graph.pieces import Pieces
from lcpaq_onnx.graph.subgraph import with_outputs
from lcpaq_onnx.runtime.calibration import open_calibration
from lcpaq_onnx.runtime.session import Session, SessionOptions
from lcpaq_onnx.runtime.walk import Walk

TEXT = """g (float[n, 4] x, bool b) => (float[n, 4] y) {
    [one] a = MatMul(x, w1) [two] c = MatMul(x, w2) [sum] d = Add(a, c)
    [branch] e = If(b) <
        then_branch = t () => (float[n, 4] p) { p = Relu(d) },
        else_branch = f () => (float[n, 4] q) { q = Neg(a) }>
    [three] g = MatMul(e, w1) [last] y = Add(g, x)
}"""
RNG = np.random.default_rng(0)
WEIGHTS = {name: RNG.normal(size=(4, 4)).astype(np.float32) for name in ("w1", "w2")}
X = RNG.normal(size=(3, 4)).astype(np.float32)


@pytest.mark.parametrize("truth", [True, False])
def test_values_are_those_of_the_whole_model_around_branches(truth: bool) -> None:
    model = model_of(TEXT, WEIGHTS)
    feed = {"x": X, "b": np.array(truth)}
    names = ["a", "c", "d", "e", "g", "y"]
    expected = Session(with_outputs(model, names)).run(feed)
    walk = Walk(model, None, [feed])
    for name in names:
        (found,) = walk.to(name)
        np.testing.assert_allclose(found, expected[name], rtol=1e-6, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_stops_in_graph_order(data: st.DataObject) -> None:
    """On a network with residual branches; float32 sums of fused and unfused kernels differ in the last digits."""
    model = onnx.load(MODELS["digits_resnet"])
    names = [node.output[0] for node in model.graph.node if node.op_type in ("Conv", "Relu", "Add", "Gemm")]
    stops = sorted(data.draw(st.sets(st.sampled_from(range(len(names))), min_size=1, max_size=6)))
    whole = Session(with_outputs(model, names), SessionOptions("basic"))
    feeds = list(open_calibration(CALIBRATION, whole.inputs, samples=2))
    walk = Walk(model, None, feeds)
    for stop in stops:
        for feed, found in zip(feeds, walk.to(names[stop]), strict=True):
            expected = whole.run(feed, [names[stop]])[names[stop]]
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_no_node_runs_twice_and_what_is_done_is_dropped() -> None:
    model = onnx.load(MODELS["digits_vit"])
    pieces = Pieces(model)
    seen: list[int] = []
    alive = {value.name for value in model.graph.input}
    for node in model.graph.node[::7]:
        piece = pieces.until(node.output[0])
        seen += piece.nodes
        assert alive.issuperset(piece.inputs)
        alive = (alive | set(piece.outputs)) - set(piece.finished)
    assert len(seen) == len(set(seen))
    # What is kept is what is read later, and the last stop.
    pending = [node for at, node in enumerate(model.graph.node) if at not in seen]
    read = {name for node in pending for name in node.input}
    assert alive <= read | {node.output[0] for node in model.graph.node[::7]}


def test_a_constant_is_replaced_from_where_the_walk_stands() -> None:
    model = model_of(TEXT, WEIGHTS)
    walk = Walk(model, None, [{"x": X, "b": np.array(True)}])
    (before,) = walk.to("a")
    zeros = np.zeros((4, 4), np.float32)
    walk.replace("w1", zeros)
    (after,) = walk.to("g")
    np.testing.assert_allclose(before, X @ WEIGHTS["w1"], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(after, np.zeros((3, 4), np.float32))
    # The caller's model is not changed.
    kept = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    np.testing.assert_array_equal(kept["w1"], WEIGHTS["w1"])
