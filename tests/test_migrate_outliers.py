"""migrate-outliers and scale-inputs, the ranges they look at, and the noise that they expect.

Tolerance 5e-6 of the output's largest magnitude: see test_equalize_layers.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quantizing import random_model
from rewriting import assert_same_outputs, constants, ops, outputs_of, parse

from lcpaq_onnx.errors import PassError, UsageError
from lcpaq_onnx.formats import QFormat
from lcpaq_onnx.graph.graph_io import Graph, load
from lcpaq_onnx.manager.analysis import AnalysisInputs, AnalysisManager
from lcpaq_onnx.manager.pass_base import PassContext, RewritePass
from lcpaq_onnx.manager.pass_hooks import VerifyEach
from lcpaq_onnx.manager.pass_manager import PipelineRun, run_pipeline
from lcpaq_onnx.numeric.channel_noise import LayerNoise, best_factors
from lcpaq_onnx.numeric.rounding import activation_parameters, fake_quantize, round_nearest
from lcpaq_onnx.passes import PREPARE
from lcpaq_onnx.passes.analysis.channel_ranges import ChannelRanges
from lcpaq_onnx.passes.rewrite.migrate_outliers import MigrateOutliers
from lcpaq_onnx.passes.rewrite.scale_inputs import ScaleInputs
from lcpaq_onnx.runtime.calibration import open_calibration
from lcpaq_onnx.runtime.declared import declared_inputs

MIGRATE = (MigrateOutliers(),)
TOLERANCE = 5e-6
C = 8

Feeds = list[dict[str, np.ndarray]]


def run(graph: Graph, passes: Sequence[RewritePass], feeds: Feeds) -> PipelineRun:
    """Verified after each pass, and once more to see that nothing is left to do."""
    data = open_calibration(feeds, declared_inputs(graph))
    done = run_pipeline(passes, PassContext.of(graph, AnalysisInputs(calibration=data)), [VerifyEach()])
    for feed in feeds[:2]:
        assert_same_outputs(outputs_of(graph, feed), outputs_of(done.graph, feed), TOLERANCE)
    again = run_pipeline(passes, PassContext.of(done.graph, AnalysisInputs(calibration=data)))
    assert not any(step.modified for step in again.trace), "a second run found something to do"
    return done


def notes_of(done: PipelineRun) -> dict[str, str]:
    return {note.node: note.reason for step in done.trace if step.result for note in step.result.notes}


def with_values(graph: Graph, seed: int = 0) -> Graph:
    """Constants of ``graph`` set to random ones; two channels of every gamma and value projection are wide."""
    rng = np.random.default_rng(seed)
    for name, tensor in sorted(graph.tensors().items()):
        if name.startswith(("w", "b", "gamma")):
            values = rng.normal(size=tensor.shape).astype(np.float32)
            if name.startswith(("gamma", "wv")):
                values[..., 2] *= 40
                values[..., 5] *= 15
            tensor.values = values
    return graph


def rows(shape: tuple[int, ...] = (1, 5, C), count: int = 6) -> Feeds:
    rng = np.random.default_rng(7)
    return [{"x": rng.standard_normal(shape).astype(np.float32)} for _ in range(count)]


def spread(graph: Graph, tensor: str, feeds: Feeds) -> float:
    """Widest channel of ``tensor`` over the median one."""
    data = open_calibration(feeds, declared_inputs(graph))
    ranges = AnalysisManager(graph, AnalysisInputs(calibration=data)).get(ChannelRanges(frozenset({(tensor, -1)})))
    magnitude = np.maximum(-ranges[tensor].low, ranges[tensor].high)
    return float(magnitude.max() / np.median(magnitude))


NORMALIZED = """g (float[n, 5, 8] x) => (float[n, 5, 6] y, float[n, 5, 4] z)
<float[8] gamma = {1, 1, 1, 1, 1, 1, 1, 1}, float[8] b0 = {0, 0, 0, 0, 0, 0, 0, 0}, float[8, 6] w1 = {W1},
 float[8, 4] w2 = {W2}>
{
    BODY
    y = MatMul (t, w1)
    z = MatMul (t, w2)
}"""


def normalized(body: str) -> Graph:
    zeros = {"W1": ", ".join(["0"] * 48), "W2": ", ".join(["0"] * 32)}
    text = NORMALIZED.replace("BODY", body)
    for name, values in zeros.items():
        text = text.replace("{" + name + "}", "{" + values + "}")
    return with_values(parse(text))


NORMS = {
    "LayerNormalization": "t = LayerNormalization <axis = -1> (x, gamma, b0)",
    "without-shift": "t = LayerNormalization <axis = -1> (x, gamma)",
    "decomposed": """axes = Constant <value_ints = [-1]> ()
    m = ReduceMean <axes = [-1]> (x)
    d = Sub (x, m)
    s = Mul (d, d)
    v = ReduceMean <axes = [-1]> (s)
    r = Sqrt (v)
    n = Div (d, r)
    p = Mul (n, gamma)
    t = Add (p, b0)""",
    "scale-alone": "t = Mul (gamma, x)",
}


# ---- sources --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("body", list(NORMS.values()), ids=list(NORMS))
def test_what_is_normalized_gives_its_outliers_to_all_layers_behind_it(body: str) -> None:
    graph, feeds = normalized(body), rows()
    result = run(graph, MIGRATE, feeds).graph
    assert ops(result) == ops(graph)
    assert spread(result, "t", feeds) < spread(graph, "t", feeds) / 2


def test_a_vector_that_others_read_is_copied() -> None:
    graph = normalized("q = Mul (x, gamma)\n    o = Sigmoid (q)\n    t = Mul (o, gamma)")
    before = constants(graph)["gamma"]
    after = constants(run(graph, MIGRATE, rows()).graph)
    np.testing.assert_array_equal(after["gamma"], before)
    assert "t/1" in after


HEADS = """g (float[n, s, 8] x) => (float[n, s, 8] y)
<float[8, 8] wq, float[8, 8] wk, float[8, 8] wv, float[8] bv, float[8, 8] w1, int64[4] heads = {0, 0, HEADS, 4},
 int64[3] flat = {0, 0, 8}>
{
    q0 = MatMul (x, wq)
    q1 = Reshape (q0, heads)
    q = Transpose <perm = [0, 2, 1, 3]> (q1)
    k0 = MatMul (x, wk)
    k1 = Reshape (k0, heads)
    k = Transpose <perm = [0, 2, 3, 1]> (k1)
    v0 = MatMul (x, wv)
    v = Add (v0, bv)
    v1 = Reshape (v, heads)
    v2 = Transpose <perm = [0, 2, 1, 3]> (v1)
    a0 = MatMul (q, k)
    a = Softmax (a0)
    c0 = MatMul (a, v2)
    c1 = Transpose <perm = [0, 2, 1, 3]> (c0)
    c = Reshape (c1, flat)
    y = MatMul (c, w1)
}"""


def heads(number: str) -> Graph:
    text = HEADS.replace("HEADS", number)
    for name in ("wq", "wk", "wv", "w1"):
        text = text.replace(f"float[8, 8] {name}", f"float[8, 8] {name} = {{{', '.join(['0'] * 64)}}}")
    return with_values(parse(text.replace("float[8] bv", f"float[8] bv = {{{', '.join(['0'] * 8)}}}")))


@pytest.mark.parametrize("number", ["2", "-1"])
def test_values_of_attention_give_theirs_to_the_output_projection(number: str) -> None:
    """Through heads, their number written down or left to the runtime."""
    feeds = [*rows(), *rows((1, 3, C), 2), *rows((2, 4, C), 1)]
    graph = heads(number)
    result = run(graph, MIGRATE, feeds).graph
    assert spread(result, "c", feeds) < spread(graph, "c", feeds) / 2
    for feed in feeds[-3:]:  # other lengths and batches than the one that was recorded
        assert_same_outputs(outputs_of(graph, feed), outputs_of(result, feed), TOLERANCE)


# ---- what stays -----------------------------------------------------------------------------------------------------
RESIDUAL = "o = LayerNormalization <axis = -1> (x, gamma, b0)\n    t = Identity (o)\n    r = Sigmoid (o)"


def with_residual() -> Graph:
    """What is normalized last is read by layers and by the residual."""
    graph = normalized(RESIDUAL)
    residual = graph.tensors()["r"]
    residual.dtype, residual.shape = np.dtype(np.float32), ["n", 5, C]
    graph.outputs.append(residual)
    return graph


def test_the_residual_keeps_what_is_normalized() -> None:
    done = run(with_residual(), MIGRATE, rows())
    assert not done.trace[0].modified
    assert any("does not pass a factor per channel on" in reason for reason in notes_of(done).values())


def test_even_channels_stay_as_they_are() -> None:
    graph = normalized(NORMS["LayerNormalization"])
    values = {"gamma": np.ones(C), "b0": np.zeros(C)}
    for name in ("w1", "w2"):
        values[name] = np.where(np.indices(graph.tensors()[name].shape).sum(axis=0) % 2, 1, -1)
    for name, value in values.items():
        graph.tensors()[name].values = value.astype(np.float32)
    sample = rows()[0]["x"]
    turned = [{"x": np.roll(sample, step, axis=-1)} for step in range(C)]  # every channel sees every value
    assert not run(graph, MIGRATE, turned).trace[0].modified


# ---- scale-inputs ---------------------------------------------------------------------------------------------------
def test_one_mul_in_front_of_the_layers_leaves_the_residual_alone() -> None:
    graph, feeds = with_residual(), rows()
    result = run(graph, (MigrateOutliers(), ScaleInputs()), feeds).graph
    assert sorted(ops(result)) == sorted([*ops(graph), "Mul"])
    (product,) = (node for node in result.nodes if node.op == "Mul")
    assert [reader.op for reader in product.outputs[0].outputs] == ["MatMul", "MatMul"]
    assert spread(result, "t/scaled", feeds) < spread(graph, "t", feeds) / 2


def test_a_mul_must_be_worth_it() -> None:
    done = run(with_residual(), (ScaleInputs(gain=1e6),), rows())
    assert not done.trace[0].modified
    assert notes_of(done)["t"].startswith("scaling it would gain only")


def test_a_gain_of_nothing_is_refused() -> None:
    with pytest.raises(PassError, match="is not above 1"):
        run(with_residual(), (ScaleInputs(gain=1.0),), rows())


# ---- any network ----------------------------------------------------------------------------------------------------
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.integers(0, 2**31), st.sampled_from([4, 8]))
def test_random_networks_compute_the_same(seed: int, bits: int) -> None:
    """Grouped, transposed and shared convolutions, residuals, Concat, pools, Pad, Clip, several outputs."""
    rng = np.random.default_rng(seed)
    prepared = run_pipeline(PREPARE, PassContext.of(load(random_model(seed)))).graph
    feeds = [{"image": rng.standard_normal((1, 3, 6, 6)).astype(np.float32)} for _ in range(3)]
    run(prepared, (MigrateOutliers(weights=bits), ScaleInputs(weights=bits, gain=1.1)), feeds)


# ---- ranges and noise -----------------------------------------------------------------------------------------------
def test_ranges_are_those_of_all_samples() -> None:
    graph, feeds = normalized("t = Identity (x)"), rows()
    data = open_calibration(feeds, declared_inputs(graph))
    ranges = AnalysisManager(graph, AnalysisInputs(calibration=data)).get(
        ChannelRanges(frozenset({("x", -1), ("t", 1)}))
    )
    x = np.concatenate([feed["x"] for feed in feeds])
    np.testing.assert_array_equal(ranges["x"].low, x.min(axis=(0, 1)))
    np.testing.assert_array_equal(ranges["x"].high, x.max(axis=(0, 1)))
    np.testing.assert_array_equal(ranges["t"].high, x.max(axis=(0, 2)))
    # Float64 sums of float32 squares, in another order.
    np.testing.assert_allclose(ranges["x"].mean_square, np.square(x, dtype=np.float64).mean(axis=(0, 1)), rtol=1e-12)


@pytest.mark.parametrize(("tensor", "message"), [(("nowhere", 0), "no tensor 'nowhere'"), (("t", 3), "has no axis 3")])
def test_ranges_of_what_is_not_there(tensor: tuple[str, int], message: str) -> None:
    graph = normalized("t = Identity (x)")
    data = open_calibration(rows(), declared_inputs(graph))
    with pytest.raises(UsageError, match=message):
        AnalysisManager(graph, AnalysisInputs(calibration=data)).get(ChannelRanges(frozenset({tensor})))


def noise_of(x: np.ndarray, weight: np.ndarray) -> LayerNoise:
    """Of x [rows, inputs] and weight [outputs, inputs]."""
    return LayerNoise(
        low=x.min(axis=0).astype(float),
        high=x.max(axis=0).astype(float),
        mean_square=np.square(x).mean(axis=0).astype(float),
        magnitudes=np.abs(weight)[None].astype(float),
        squares=np.square(weight)[None].astype(float),
        kernel=1,
        channel_of=np.arange(x.shape[1]),
    )


@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(8, 8), (6, 8), (8, 6)])
@pytest.mark.parametrize("is_wide", [False, True])
def test_expected_noise_is_what_rounding_makes(is_wide: bool, weight_bits: int, activation_bits: int) -> None:
    """Within 40 %: channels are drawn independently, so what is left is the shape of the rounding errors, which are
    uniform only where steps are fine beside the channel's spread; and few outputs.
    """
    rng = np.random.default_rng(3)
    x = rng.standard_normal((4000, 32)).astype(np.float32)
    weight = rng.standard_normal((64, 32)).astype(np.float32)
    if is_wide:
        x[:, 3] *= 10
    low, high = float(x.min()), float(x.max())
    weight_format = QFormat(bits=weight_bits, symmetric=True, axis=0)
    scale = (np.abs(weight).max(axis=1) / weight_format.qmax).astype(np.float32)
    rounded = round_nearest(weight, weight_format, scale).dequantized()
    activation_format = QFormat(bits=activation_bits, signed=False, symmetric=False)
    step, zero = activation_parameters(low, high, activation_format)
    seen = fake_quantize(x, step, zero, activation_format)
    exact = x.astype(float) @ weight.T
    measured = np.square(seen.astype(float) @ rounded.T - exact).mean() / np.square(exact).mean()
    expected = noise_of(x, weight).error(np.ones(32), weight_bits, activation_bits)
    assert measured == pytest.approx(expected, rel=0.4)


def test_the_best_factors_are_better_by_as_much_as_expected() -> None:
    rng = np.random.default_rng(5)
    x = rng.standard_normal((2000, 32))
    x[:, 3] *= 50
    layer = noise_of(x, rng.standard_normal((64, 32)))
    factors = best_factors([layer], 32, 8, 8)
    assert layer.error(factors, 8, 8) < layer.error(np.ones(32), 8, 8) / 5
    # Nothing to gain where the input stays in float but by evening out the weights.
    assert layer.error(best_factors([layer], 32, 8, 32), 8, 32) <= layer.error(np.ones(32), 8, 32)


def test_channels_that_were_hardly_used_go_with_the_others() -> None:
    rng = np.random.default_rng(5)
    x = rng.standard_normal((200, 8))
    x[:, 3] *= 50
    x[:, 6] *= 1e-6
    factors = best_factors([noise_of(x, rng.standard_normal((16, 8)))], 8, 8, 8)
    others = np.delete(factors, 6)
    assert others.min() < factors[6] < others.max()
