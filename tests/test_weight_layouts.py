"""Products with constant weights in every layout that exporters write: found, quantized, close to the float model."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from layouts import LAYOUTS, Layout
from onnx import numpy_helper, parser

import lcpaq_onnx
from lcpaq_onnx.graph import graph_io
from lcpaq_onnx.manager.pass_base import PassContext
from lcpaq_onnx.manager.pass_manager import run_pipeline
from lcpaq_onnx.passes import PREPARE
from lcpaq_onnx.passes.rewrite.plain_products import PlainProducts
from lcpaq_onnx.runtime.session import Session


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_its_layers_run_in_integer_kernels(layout: Layout) -> None:
    feeds = layout.feeds()
    done = lcpaq_onnx.quantize(layout.model(), feeds, weights=[8], activations=[8])
    layers = done.report.layers
    assert len(layers) == layout.layers
    assert all(layer.is_integer for layer in layers), [(layer.name, layer.kernel) for layer in layers]
    assert all(check.passed for check in done.report.checks), [c for c in done.report.checks if not c.passed]
    expected, found = (Session(m).run(feeds[0])["y"] for m in (layout.model(), done.model))
    # Two or three roundings to 8 bits, each of them 0.3 % of a range.
    assert np.sqrt(((found - expected) ** 2).mean()) <= 0.01 * np.ptp(expected)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_preparing_does_not_change_what_it_computes(layout: Layout) -> None:
    prepared = run_pipeline(PREPARE, PassContext.of(graph_io.load(layout.model()))).graph
    feed = layout.feeds()[0]
    expected, found = (Session(m).run(feed)["y"] for m in (layout.model(), graph_io.to_proto(prepared)))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)  # alpha·W is rounded once, sums in another order


def plain(text: str, **constants: np.ndarray) -> tuple[onnx.ModelProto, onnx.ModelProto, list[str]]:
    """The model before and after ``plain-products``, and why it kept what it kept."""
    model = parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]> g {text}')
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    run = run_pipeline((PlainProducts(),), PassContext.of(graph_io.load(model)))
    (done,) = run.trace
    assert done.result is not None
    return model, graph_io.to_proto(run.graph), [note.reason for note in done.result.notes]


RNG = np.random.default_rng(0)
W, B = RNG.normal(size=(8, 4)).astype(np.float32), RNG.normal(size=4).astype(np.float32)


def test_factors_move_into_weight_and_bias() -> None:
    text = "(float[n, 8] x) => (float[n, m] y) { y = Gemm <alpha = 0.3, beta = 3.0> (x, w, b) }"
    model, after, reasons = plain(text, w=W, b=B)
    assert reasons == []
    assert not after.graph.node[0].attribute
    x = {"x": RNG.normal(size=(3, 8)).astype(np.float32)}
    np.testing.assert_allclose(Session(after).run(x)["y"], Session(model).run(x)["y"], rtol=1e-5, atol=1e-6)


def test_a_factor_of_an_absent_bias_does_not_matter() -> None:
    _, after, reasons = plain("(float[n, 8] x) => (float[n, m] y) { y = Gemm <alpha = 2.0, beta = 3.0> (x, w) }", w=W)
    assert reasons == []
    assert not after.graph.node[0].attribute
    np.testing.assert_array_equal(numpy_helper.to_array(after.graph.initializer[0]), 2 * W)


@pytest.mark.parametrize(
    ("text", "constants", "reason"),
    [
        (
            "(float[n, 8] x, float[4] b) => (float[n, m] y) { y = Gemm <beta = 2.0> (x, w, b) }",
            {"w": W},
            "'b' is computed at run time",
        ),
        (
            "(float[n, 8] x) => (float[n, m] y, float[n, m] z) { y = Gemm <alpha = 2.0> (x, w) z = MatMul(x, w) }",
            {"w": W},
            "'w' is shared",
        ),
        (
            "(float[n, 8] x) => (float[n, m] y) { y = Gemm <alpha = 1e38> (x, w) }",
            {"w": 100 * W},
            "alpha times 'w' does not fit float32",
        ),
        (
            "(float[3, 8] x) => (float[b, n, m] y) { y = MatMul(x, w) }",
            {"w": W[None]},
            "'x' has fewer axes than 'w'",
        ),
    ],
)
def test_it_says_why_it_keeps_a_product(text: str, constants: dict[str, np.ndarray], reason: str) -> None:
    model, after, reasons = plain(text, **constants)
    assert reasons == [reason]
    assert after.graph.node == model.graph.node


def test_factors_that_stay_leave_the_layer_in_float() -> None:
    text = "(float[n, 8] x, float[4] b) => (float[n, m] y) { y = Gemm <beta = 2.0> (x, w, b) }"
    model, _, _ = plain(text, w=W)
    feed = {"x": RNG.normal(size=(3, 8)).astype(np.float32), "b": B}
    done = lcpaq_onnx.quantize(model, [feed], weights=[8], activations=[8])
    assert [layer.format for layer in done.report.layers] == ["f32"]
