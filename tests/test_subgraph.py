"""Suffixes and layer responses: what they predict is what the whole model gives with changed weights."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from analysing import analyses_of, model_of, rounding_error, singles
from onnx import numpy_helper
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info

from lcpaq_onnx.graph.query import nodes_by_name, weight_values
from lcpaq_onnx.graph.subgraph import Suffix, SuffixExtractor, with_outputs
from lcpaq_onnx.manager.analysis import AnalysisManager
from lcpaq_onnx.numeric.directions import Rounding
from lcpaq_onnx.passes import GraphStructure, RecordedTensors
from lcpaq_onnx.passes.analysis.prober import Probe, Prober
from lcpaq_onnx.passes.analysis.teacher import teacher_of
from lcpaq_onnx.runtime.response import LayerResponse
from lcpaq_onnx.runtime.session import Session, SessionOptions

RNG = np.random.default_rng(0)
IMAGE = RNG.normal(size=(3, 4, 6, 6)).astype(np.float32)
# Two ways to the same float32 figures: sums of some tens of products of size 1, in another order.
NOISE = 2e-5


def floats(*shape: int) -> np.ndarray:
    return (RNG.normal(size=shape) / np.sqrt(max(1, np.prod(shape[1:])))).astype(np.float32)


RESIDUAL = model_of(
    """g (float[n, 4, 6, 6] x) => (float[n, 3] y) {
        [one] a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1) [relu] b = Relu(a)
        [two] c = Conv <pads = [1, 1, 1, 1]> (b, w2) [add] d = Add(c, x) [relu2] e = Relu(d)
        [pool] p = GlobalAveragePool(e) [flat] f = Flatten(p) [fc] y = Gemm <transB = 1> (f, w3, b3)
    }""",
    {"w1": floats(4, 4, 3, 3), "b1": floats(4), "w2": floats(4, 4, 3, 3), "w3": floats(3, 4), "b3": floats(3)},
)
BRANCHES = model_of(
    """g (float[n, 4, 6, 6] x) => (float[n, 6, 6, 6] y) {
        [one] a = Conv(x, w1) [left] b = Conv <group = 2> (a, w2) [right] c = Conv(a, w3) [sig] s = Sigmoid(a)
        [mul] m = Mul(c, s) [cat] y = Concat <axis = 1> (b, m)
    }""",
    {"w1": floats(4, 4, 1, 1), "w2": floats(2, 2, 1, 1), "w3": floats(4, 4, 1, 1)},
)
OUTPUTS = model_of(
    """g (float[n, 4, 6, 6] x) => (float[n, 4, 6, 6] a, float[n, 4, 6, 6] e, float[n, 4] f) {
        [one] a = Conv(x, w1) [two] c = Conv(a, w2) [neg] e = Neg(c) [pool] p = GlobalAveragePool(x)
        [flat] q = Flatten(p) [three] f = MatMul(q, w3)
    }""",
    {"w1": floats(4, 4, 1, 1), "w2": floats(4, 4, 1, 1), "w3": floats(4, 4)},
)
SHARED = model_of(
    """g (float[n, 4, 6, 6] x) => (float[n, 4, 6, 6] y) {
        [one] a = Conv(x, w) [relu] b = Relu(a) [two] c = Conv(b, w) [three] d = Conv(c, w) [add] y = Add(d, a)
    }""",
    {"w": floats(4, 4, 1, 1)},
)
BODIES = model_of(
    """g (float[n, 4, 6, 6] x) => (float[n, 4, 6, 6] y) {
        [one] a = Conv(x, w1) [sum] s = ReduceSum <keepdims = 0> (x) [test] c = Greater(s, zero)
        [if] b = If (c) <
            then_branch = yes () => (float[n, 4, 6, 6] u) { [i0] u0 = Relu(a) [i1] u = Mul(u0, two) },
            else_branch = no () => (float[n, 4, 6, 6] v) { [i2] v0 = Neg(a) [i3] v = Add(v0, x) }
        >
        [last] d = Conv(b, w2) [add] y = Add(d, a)
    }""",
    {"w1": floats(4, 4, 1, 1), "w2": floats(4, 4, 1, 1), "zero": np.float32(0), "two": np.float32(2)},
)
MODELS = {"residual": RESIDUAL, "branches": BRANCHES, "outputs": OUTPUTS, "shared": SHARED, "bodies": BODIES}


def with_weight(model: onnx.ModelProto, layer: str, values: np.ndarray) -> onnx.ModelProto:
    """``model`` in which that layer alone reads another weight."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    node = next(node for node in changed.graph.node if node.name == layer)
    node.input[1] = "changed"
    changed.graph.initializer.append(numpy_helper.from_array(values, "changed"))
    return changed


def largest_difference(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> float:
    assert first.keys() == second.keys()
    return max(float(np.abs(second[name] - value).max()) for name, value in first.items())


@pytest.mark.parametrize("name", MODELS)
def test_a_suffix_gives_what_the_whole_model_gives_with_changed_weights(name: str) -> None:
    model = MODELS[name]
    analyses = analyses_of(model, singles("x", IMAGE))
    layers = analyses.get(GraphStructure).layers
    nodes = nodes_by_name(analyses.graph)
    extractor = SuffixExtractor(analyses.graph, analyses.get(RecordedTensors))
    outputs = [value.name for value in model.graph.output]
    before = Session(model).run({"x": IMAGE})
    assert layers
    for layer in layers:
        suffix = extractor.suffix(extractor.cut(layer.raw_output, outputs))
        read = sorted({layer.raw_output, layer.input, *suffix.live} - {"x"})
        cached = {"x": IMAGE} | Session(extractor.prefix(read)).run({"x": IMAGE})
        weight = weight_values(nodes[layer.name], layer)
        change = (0.3 * np.random.default_rng(1).normal(size=weight.shape)).astype(np.float32)
        response = LayerResponse(layer.op, nodes[layer.name].attrs)(cached[layer.input], change[None])
        feed = {name: cached[name] for name in suffix.live} | {layer.raw_output: cached[layer.raw_output] + response}
        found = before | Session(suffix.model).run(feed)
        expected = Session(with_weight(model, layer.name, weight + change)).run({"x": IMAGE})
        assert largest_difference(expected, found) < NOISE * max(np.abs(v).max() for v in expected.values())
        # The change is a large one: the float model's own outputs would not pass.
        assert largest_difference(expected, before) > 0.01


@pytest.mark.parametrize("name", MODELS)
def test_a_probe_of_every_layer_gives_the_loss_of_the_whole_model(name: str) -> None:
    model, direction = MODELS[name], Rounding(3)
    analyses = analyses_of(model, singles("x", IMAGE), loss="squared-error")
    layers = analyses.get(GraphStructure).layers
    probes = {layer: Probe(layer.raw_output, direction) for layer in layers}
    found = Prober(analyses.graph, analyses, 3).measure(list(probes.values()))
    teacher = teacher_of(analyses)
    nodes = nodes_by_name(analyses.graph)
    for layer, probe in probes.items():
        weight = weight_values(nodes[layer.name], layer)
        changed = Session(
            with_weight(model, layer.name, weight + rounding_error(weight, direction.bits, layer.channel_axis))
        )
        before = Session(model)
        for sample, feed in enumerate(singles("x", IMAGE)):
            expected = teacher.loss(before.run(feed), changed.run(feed))
            # Outputs that move by some per cent, and float32's 1e-6 of them.
            assert found[probe].loss[sample] == pytest.approx(expected.item(), rel=1e-3)
            assert expected > 0


@pytest.mark.parametrize("name", MODELS)
def test_a_prefix_gives_what_the_whole_model_gives_and_holds_no_more_than_it_needs(name: str) -> None:
    model = MODELS[name]
    extractor = SuffixExtractor((analyses := analyses_of(model, singles("x", IMAGE))).graph, {})
    read = [layer.raw_output for layer in analyses.get(GraphStructure).layers]
    expected = Session(with_outputs(model, read)).run({"x": IMAGE})
    for tensor in read:
        prefix = extractor.prefix([tensor])
        np.testing.assert_array_equal(Session(prefix).run({"x": IMAGE})[tensor], expected[tensor])
        assert [node.output[0] for node in prefix.graph.node][-1] == tensor


def suffix_of(analyses: AnalysisManager, start: str, *outputs: str) -> Suffix:
    extractor = SuffixExtractor(analyses.graph, analyses.get(RecordedTensors))
    return extractor.suffix(extractor.cut(start, outputs))


def test_a_suffix_holds_only_what_follows() -> None:
    analyses = analyses_of(RESIDUAL, singles("x", IMAGE))
    suffix = suffix_of(analyses, "c", "y")
    assert [node.name for node in suffix.model.graph.node] == ["add", "relu2", "pool", "flat", "fc"]
    assert {tensor.name for tensor in suffix.model.graph.initializer} == {"w3", "b3"}
    assert (suffix.live, suffix.outputs) == (("x",), ("y",))


def test_a_suffix_that_starts_at_an_output_returns_it() -> None:
    analyses = analyses_of(OUTPUTS, singles("x", IMAGE))
    suffix = suffix_of(analyses, "a", "a", "e", "f")
    assert suffix.outputs == ("a", "e")
    found = Session(suffix.model).run({"a": IMAGE})
    np.testing.assert_array_equal(found["a"], IMAGE)
    alone = suffix_of(analyses, "f", "a", "e", "f")
    assert (alone.outputs, len(alone.model.graph.node)) == (("f",), 0)


def test_names_inside_a_body_are_not_fed() -> None:
    analyses = analyses_of(BODIES, singles("x", IMAGE))
    suffix = suffix_of(analyses, "a", "y")
    assert suffix.live == ("c", "x")


def test_what_depends_on_no_input_is_kept_and_not_fed() -> None:
    model = model_of(
        """g (float[n, 4] x) => (float[n, 4] y) {
            [k] k = Constant <value = float[1] {2}> () [scale] s = Exp(k) [fc] m = MatMul(x, w) [mul] y = Mul(m, s)
        }""",
        {"w": floats(4, 4)},
    )
    analyses = analyses_of(model, singles("x", IMAGE[:, :, 0, 0]))
    suffix = suffix_of(analyses, "m", "y")
    assert suffix.live == ()
    assert "scale" in [node.name for node in suffix.model.graph.node]


def test_further_outputs_leave_the_model_as_it_was() -> None:
    before = RESIDUAL.SerializeToString()
    extended = with_outputs(RESIDUAL, ["c", "y", "a"])
    assert [value.name for value in extended.graph.output] == ["y", "c", "a"]
    assert RESIDUAL.SerializeToString() == before


# ---- responses ------------------------------------------------------------------------------------------------------
def layer_case(
    op: str, x: tuple[int, ...], w: tuple[int, ...], attributes: dict[str, object]
) -> tuple[Session, np.ndarray, np.ndarray]:
    """A session of the bare layer with the weight as an input, an input, and a weight."""
    graph = make_graph(
        [make_node(op, ["x", "w"], ["y"], **attributes)],
        "layer",
        [
            make_tensor_value_info("x", onnx.TensorProto.FLOAT, [None] * len(x)),
            make_tensor_value_info("w", onnx.TensorProto.FLOAT, w),
        ],
        [onnx.ValueInfoProto(name="y")],
    )
    model = make_model(graph, opset_imports=[make_opsetid("", 21)], ir_version=10)
    rng = np.random.default_rng(3)
    values = rng.normal(size=x).astype(np.float32), rng.normal(size=w).astype(np.float32)
    return Session(model, SessionOptions("none", threads=1)), *values


CASES = {
    "conv": ("Conv", (4, 4, 7, 7), (6, 4, 3, 3), {}),
    "padded": ("Conv", (4, 4, 7, 7), (6, 4, 3, 3), {"pads": [1, 0, 2, 1]}),
    "same upper": ("Conv", (4, 4, 7, 7), (6, 4, 3, 3), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    "same lower": ("Conv", (4, 4, 7, 7), (6, 4, 2, 2), {"auto_pad": "SAME_LOWER"}),
    "valid": ("Conv", (4, 4, 7, 7), (6, 4, 2, 2), {"auto_pad": "VALID"}),
    "grouped": ("Conv", (4, 4, 7, 7), (6, 2, 3, 3), {"group": 2}),
    "depthwise": ("Conv", (4, 4, 7, 7), (8, 1, 3, 3), {"group": 4, "pads": [1, 1, 1, 1]}),
    "strided dilated": ("Conv", (4, 4, 9, 9), (6, 4, 3, 3), {"strides": [2, 1], "dilations": [1, 3]}),
    "one axis": ("Conv", (4, 3, 9), (5, 3, 4), {"strides": [2]}),
    "three axes": ("Conv", (4, 2, 5, 4, 3), (3, 2, 2, 2, 2), {}),
    "transposed": ("ConvTranspose", (4, 4, 5, 5), (4, 3, 3, 3), {"strides": [2, 2], "output_padding": [1, 1]}),
    "transposed grouped": ("ConvTranspose", (4, 4, 5, 5), (4, 3, 3, 3), {"group": 2, "pads": [1, 1, 1, 1]}),
    "transposed same": ("ConvTranspose", (4, 4, 5, 5), (4, 3, 3, 3), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    "gemm": ("Gemm", (4, 5), (5, 3), {"alpha": 0.5}),
    "gemm B": ("Gemm", (4, 5), (3, 5), {"transB": 1}),
    "matmul": ("MatMul", (4, 5), (5, 3), {}),
    "matmul tokens": ("MatMul", (4, 7, 5), (5, 3), {}),
    "matmul batched": ("MatMul", (4, 2, 7, 5), (2, 5, 3), {}),
    "matmul more axes": ("MatMul", (4, 2, 3, 7, 5), (3, 5, 3), {}),
}


def attributes_of(op: str, attributes: dict[str, object]) -> dict[str, object]:
    """As they stand in a loaded graph."""
    return dict(gs.import_onnx(
        make_model(make_graph([make_node(op, ["x", "w"], ["y"], **attributes)], "g", [], []))
    ).nodes[0].attrs)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("draws", [1, 2, 4])
def test_every_sample_meets_its_own_change_of_the_weight(case: str, draws: int) -> None:
    op, x_shape, w_shape, attributes = CASES[case]
    session, x, _ = layer_case(op, x_shape, w_shape, attributes)
    v = np.random.default_rng(4).normal(size=(draws, *w_shape)).astype(np.float32)
    found = LayerResponse(op, attributes_of(op, attributes))(x, v)
    each = len(x) // draws
    parts = [session.run({"x": x[i * each : (i + 1) * each], "w": v[i]})["y"] for i in range(draws)]
    expected = np.concatenate(parts)
    np.testing.assert_allclose(found, expected, rtol=0, atol=NOISE * np.abs(expected).max())


@pytest.mark.parametrize("case", CASES)
def test_the_response_is_the_difference_that_changed_weights_make(case: str) -> None:
    op, x_shape, w_shape, attributes = CASES[case]
    session, x, w = layer_case(op, x_shape, w_shape, attributes)
    delta = (0.1 * np.random.default_rng(5).normal(size=w_shape)).astype(np.float32)
    before, after = (session.run({"x": x, "w": weight})["y"] for weight in (w, w + delta))
    found = LayerResponse(op, attributes_of(op, attributes))(x, delta[None])
    np.testing.assert_allclose(before + found, after, rtol=0, atol=NOISE * np.abs(after).max())


def test_a_transposed_input_is_turned_round() -> None:
    session, x, w = layer_case("Gemm", (5, 4), (5, 3), {"transA": 1})
    found = LayerResponse("Gemm", {"transA": 1})(x, w[None])
    expected = session.run({"x": x, "w": w})["y"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=NOISE * np.abs(expected).max())


def test_a_matmul_whose_weight_leads_the_batch() -> None:
    session, x, w = layer_case("MatMul", (7, 5), (2, 5, 3), {})
    found = LayerResponse("MatMul", {})(x, w[None])
    expected = session.run({"x": x, "w": w})["y"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=NOISE * np.abs(expected).max())
