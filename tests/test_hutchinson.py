"""Hessian diagonals against exact Gauss-Newton ones, worked out in float64 numpy on small networks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from analysing import analyses_of, model_of, singles
from scipy import special

from lcpaq_onnx.formats import QFormat
from lcpaq_onnx.numeric.directions import BlockSigns, Signs
from lcpaq_onnx.numeric.hutchinson import LayerProbe, ProbeLosses, channel_rows
from lcpaq_onnx.numeric.rounding import round_nearest
from lcpaq_onnx.passes import HessianDiagonals
from lcpaq_onnx.tables import HessianDiagonal

SAMPLES = 96
# With this many probes a sample the standard error over samples is far above what is left of the probes' own noise,
# and second order holds to about a per cent at a quarter of a 4-bit rounding error (design.md, section 6).
PROBES = 200
TRACE_TOLERANCE = 0.05
# A channel's share rests on its part of the probes only; measured 2 to 5 %.
CHANNEL_TOLERANCE = 0.1


def fisher(logits: np.ndarray) -> np.ndarray:
    """[samples, classes, classes]: second derivative of KL(softmax(z0) ‖ softmax(z)) by z, at z0."""
    p = special.softmax(logits, axis=1)
    return np.einsum("nc,cd->ncd", p, np.eye(p.shape[1])) - np.einsum("nc,nd->ncd", p, p)


def gauss_newton_diagonal(forward: Callable[[np.ndarray], np.ndarray], weight: np.ndarray) -> np.ndarray:
    """Diagonal of JᵀFJ, mean over samples, shape of ``weight``; J by central differences in float64.

    ``forward``: weight → logits [samples, classes].
    """
    step = 1e-6
    curvature = fisher(forward(weight))
    diagonal = np.zeros(weight.size)
    for index in range(weight.size):
        moved = np.zeros(weight.size)
        moved[index] = step
        moved = moved.reshape(weight.shape)
        column = (forward(weight + moved) - forward(weight - moved)) / (2 * step)
        diagonal[index] = np.einsum("nc,ncd,nd->n", column, curvature, column).mean()
    return diagonal.reshape(weight.shape)


def assert_matches(found: HessianDiagonal, exact: np.ndarray, axis: int | None) -> None:
    """Trace within 5 % and three standard errors; channels within theirs. ``exact``: shape of the weight."""
    off = abs(found.trace - exact.sum())
    assert off <= TRACE_TOLERANCE * exact.sum()
    assert off <= 3 * found.trace_stderr + 0.02 * exact.sum()
    channels = channel_rows(exact, axis).mean(axis=1)  # type: ignore[arg-type]
    assert len(found.channel_mean) == len(channels)
    np.testing.assert_allclose(found.channel_mean, channels, rtol=CHANNEL_TOLERANCE, atol=0.01 * channels.max())
    assert sum(found.channel_mean) * exact.size / len(channels) == pytest.approx(found.trace)


# ---- a linear model, in closed form ----------------------------------------------------------------------------------
def linear_case(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(SAMPLES, 12)).astype(np.float32)
    # Channels of unlike size: their shares differ by more than the tolerance.
    weight = (rng.normal(size=(12, 5)) * np.array([0.2, 0.4, 0.6, 0.8, 1.0])).astype(np.float32)
    bias = np.array([1.5, 0, 0, 0, -0.5], np.float32)
    return x, weight, bias


def linear_diagonal(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """x_k² p_c (1 - p_c), mean over samples: [inputs, classes]."""
    p = special.softmax(x.astype(np.float64) @ weight.astype(np.float64) + bias, axis=1)
    return (x.astype(np.float64) ** 2).T @ (p * (1 - p)) / len(x)


@pytest.mark.parametrize("op", ["Gemm", "GemmT", "MatMul"])
def test_a_linear_softmax_model_has_its_closed_form(op: str) -> None:
    x, weight, bias = linear_case()
    body = {
        "Gemm": "[fc] y = Gemm(x, w, b)",
        "GemmT": "[fc] y = Gemm <transB = 1> (x, w, b)",
        "MatMul": "[fc] m = MatMul(x, w) [add] y = Add(m, b)",
    }[op]
    stored = np.ascontiguousarray(weight.T) if op == "GemmT" else weight
    model = model_of(f"g (float[n, 12] x) => (float[n, 5] y) {{ {body} }}", {"w": stored, "b": bias})
    found = analyses_of(model, singles("x", x)).get(HessianDiagonals(SAMPLES, PROBES, PROBES))["fc"]
    exact = linear_diagonal(x, weight, bias)
    assert found.samples == SAMPLES
    assert_matches(found, exact.T if op == "GemmT" else exact, 0 if op == "GemmT" else 1)


def test_second_order_predicts_the_loss_of_a_small_change() -> None:
    x, weight, bias = linear_case(3)
    model = model_of("g (float[n, 12] x) => (float[n, 5] y) { [fc] y = Gemm(x, w, b) }", {"w": weight, "b": bias})
    found = analyses_of(model, singles("x", x)).get(HessianDiagonals(SAMPLES, PROBES, PROBES))["fc"]
    rounded = round_nearest(weight, QFormat(bits=6, axis=1)).dequantized()
    predicted = 0.5 * np.asarray(found.channel_mean) @ ((rounded - weight).astype(np.float64) ** 2).sum(axis=0)
    p, q = (special.softmax(x.astype(np.float64) @ w.astype(np.float64) + bias, axis=1) for w in (weight, rounded))
    loss = special.rel_entr(p, q).sum(axis=1).mean()
    # One direction of the whole quadratic form: its off-diagonal part is of the size of the diagonal's.
    assert 0.4 < predicted / loss < 2.5


def test_tokens_flattened_into_rows_share_their_samples_draw() -> None:
    """The exporter's Reshape → Gemm: the layer sees 6 rows for each sample, and all of them move together."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(SAMPLES, 6, 4)).astype(np.float32) + np.float32(1)  # a mean: rows of a sample add up
    weight = rng.normal(size=(4, 5)).astype(np.float32)
    model = model_of(
        """g (float[n, 6, 4] x) => (float[n, 5] y) {
            [rows] r = Reshape(x, rows_shape) [fc] t = Gemm(r, w) [back] u = Reshape(t, back_shape)
            [mean] y = ReduceMean <keepdims = 0> (u, axes)
        }""",
        {
            "w": weight,
            "rows_shape": np.array([-1, 4]),
            "back_shape": np.array([-1, 6, 5]),
            "axes": np.array([1]),
        },
    )
    found = analyses_of(model, singles("x", x)).get(HessianDiagonals(SAMPLES, PROBES, PROBES))["fc"]
    exact = linear_diagonal(x.astype(np.float64).mean(axis=1), weight, np.zeros(5))
    assert found.trace == pytest.approx(exact.sum(), rel=TRACE_TOLERANCE)


def test_a_sample_of_several_rows_moves_as_one() -> None:
    """A model for three rows at once, no more and no less: each feed is one probe and three losses."""
    x, weight, bias = linear_case(4)
    model = model_of("g (float[3, 12] x) => (float[3, 5] y) { [fc] y = Gemm(x, w, b) }", {"w": weight, "b": bias})
    feeds = [{"x": x[first : first + 3]} for first in range(0, SAMPLES, 3)]
    found = analyses_of(model, feeds).get(HessianDiagonals(SAMPLES, PROBES, PROBES))["fc"]
    assert_matches(found, linear_diagonal(x, weight, bias), 1)


# ---- convolutions, by finite differences of the Jacobian -------------------------------------------------------------
def conv(x: np.ndarray, weight: np.ndarray, groups: int = 1) -> np.ndarray:
    """3 x 3, padding 1, float64."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    each = weight.shape[0] // groups
    width = x.shape[1] // groups
    parts = [
        np.einsum("nchwij,mcij->nmhw", windows[:, g * width : (g + 1) * width], weight[g * each : (g + 1) * each])
        for g in range(groups)
    ]
    return np.concatenate(parts, axis=1)


def network(x: np.ndarray, weights: dict[str, np.ndarray]) -> np.ndarray:
    """conv, sigmoid-weighted unit, depthwise conv, Relu, pooled, linear: float64 logits."""
    t = conv(x, weights["stem"])
    t = t * special.expit(t)
    t = np.maximum(conv(t, weights["dw"], groups=4) + weights["bias"][:, None, None], 0)
    return t.mean(axis=(2, 3)) @ weights["fc"]


@pytest.fixture(scope="module")
def conv_case() -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, HessianDiagonal]]:
    rng = np.random.default_rng(1)
    weights = {
        "stem": rng.normal(size=(4, 2, 3, 3)).astype(np.float32) / 2,
        "dw": rng.normal(size=(4, 1, 3, 3)).astype(np.float32),
        "bias": np.full(4, 0.3, np.float32),
        "fc": rng.normal(size=(4, 3)).astype(np.float32) * 2,
    }
    x = rng.normal(size=(SAMPLES, 2, 5, 5)).astype(np.float32)
    model = model_of(
        """g (float[n, 2, 5, 5] x) => (float[n, 3] y) {
            [stem] a = Conv <pads = [1, 1, 1, 1]> (x, stem) [sig] s = Sigmoid(a) [mul] b = Mul(a, s)
            [dw] c = Conv <pads = [1, 1, 1, 1], group = 4> (b, dw, bias) [relu] d = Relu(c)
            [pool] e = GlobalAveragePool(d) [flat] f = Flatten(e) [fc] y = MatMul(f, fc)
        }""",
        weights,
    )
    found = analyses_of(model, singles("x", x)).get(HessianDiagonals(SAMPLES, PROBES, PROBES))
    return x, weights, found


@pytest.mark.parametrize(("layer", "axis"), [("stem", 0), ("dw", 0), ("fc", 1)])
def test_a_small_network_matches_its_gauss_newton_diagonal(
    conv_case: tuple[np.ndarray, dict[str, np.ndarray], dict[str, HessianDiagonal]], layer: str, axis: int
) -> None:
    x, weights, found = conv_case
    doubles = {name: value.astype(np.float64) for name, value in weights.items()}

    def forward(weight: np.ndarray) -> np.ndarray:
        return network(x.astype(np.float64), {**doubles, layer: weight})

    assert_matches(found[layer], gauss_newton_diagonal(forward, doubles[layer]), axis)


def test_more_probes_do_not_move_the_estimate_beyond_its_error() -> None:
    x, weight, bias = linear_case(2)
    model = model_of("g (float[n, 12] x) => (float[n, 5] y) { [fc] y = Gemm(x, w, b) }", {"w": weight, "b": bias})
    traces = [
        analyses_of(model, singles("x", x), seed=seed).get(HessianDiagonals(SAMPLES, 1, 1))["fc"] for seed in range(8)
    ]
    exact = linear_diagonal(x, weight, bias).sum()
    errors = np.array([t.trace - exact for t in traces])
    stated = np.array([t.trace_stderr for t in traces])
    # The stated error is over samples, so it also holds what the samples themselves vary: never below the probes' own.
    assert np.sqrt((errors**2).mean()) < 1.3 * stated.mean()
    assert abs(errors.mean()) < 3 * stated.mean() / np.sqrt(8)


def test_the_same_seed_gives_the_same_figures() -> None:
    x, weight, bias = linear_case()
    model = model_of("g (float[n, 12] x) => (float[n, 5] y) { [fc] y = Gemm(x, w, b) }", {"w": weight, "b": bias})
    first, again, other = (
        analyses_of(model, singles("x", x), seed=s).get(HessianDiagonals(32, 1, 1)) for s in (0, 0, 1)
    )
    assert first == again
    assert first != other


# ---- the probe itself ------------------------------------------------------------------------------------------------
def generators(count: int) -> list[np.random.Generator]:
    return [np.random.default_rng((1, number)) for number in range(count)]


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_draws_are_signs_of_the_channels_amplitude(axis: int | None) -> None:
    weight = np.random.default_rng(0).normal(size=(6, 4, 3)).astype(np.float32)
    probe = LayerProbe(weight, axis)
    v = probe.whole(generators(5))
    assert v.shape == (5, 6, 4, 3)
    rounded = round_nearest(weight, QFormat(bits=4, axis=axis)).dequantized()
    expected = 0.25 * np.sqrt((channel_rows(rounded - weight, axis) ** 2).mean(axis=1))
    for draw in v:
        rows = channel_rows(draw, axis)
        np.testing.assert_allclose(np.abs(rows), np.broadcast_to(expected[:, None], rows.shape), rtol=1e-6)
    assert len({draw.tobytes() for draw in v}) == 5
    assert abs(np.sign(v).mean()) < 4 / np.sqrt(v.size)


@pytest.mark.parametrize("direction", [Signs(3, 1), BlockSigns(3, 1, 4)])
def test_a_samples_draw_does_not_depend_on_what_is_drawn_besides(direction: Signs | BlockSigns) -> None:
    weight = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    probe = LayerProbe(weight, 0)
    together = direction.draws(probe, "fc", range(10))
    apart = [direction.draws(probe, "fc", part) for part in (range(3), range(3, 4), range(4, 10))]
    np.testing.assert_array_equal(together, np.concatenate(apart))
    assert not np.array_equal(together, direction.draws(probe, "another layer", range(10)))


def test_blocks_cover_every_channel_in_turn() -> None:
    weight = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    direction = BlockSigns(seed=1, index=0, count=6)
    v = direction.draws(LayerProbe(weight, 0), "fc", range(12))
    chosen = direction.chosen(range(12))
    assert sorted(chosen[:6].tolist()) == sorted(chosen[6:].tolist()) == [0, 1, 2, 3, 4, 5]
    moved = np.abs(v).sum(axis=2) > 0
    assert (moved == (np.arange(6)[None] == chosen[:, None])).all()
    # Probed again, a sample meets the next block: it meets every block in time.
    met = [BlockSigns(seed=1, index=index, count=6).chosen(range(12)) for index in range(6)]
    assert (np.sort(met, axis=0) == np.arange(6)[:, None]).all()


@pytest.mark.parametrize("batch", [4, 16, 32])
def test_batches_that_share_a_draw_meet_more_than_one_block(batch: int) -> None:
    """Where a batch moves as one, its first sample chooses the block."""
    firsts = range(0, 8 * batch, batch)
    assert len(set(BlockSigns(seed=0, index=0, count=16).chosen(firsts).tolist())) >= 4


def test_a_quadratic_loss_is_recovered() -> None:
    """With loss ½ Σ h v² for a known h, whole and block draws give h back by channel."""
    rng = np.random.default_rng(2)
    weight = rng.normal(size=(4, 50)).astype(np.float32)
    h = np.array([1.0, 10.0, 0.1, 3.0])[:, None] * rng.uniform(0.5, 1.5, size=(4, 50))
    probe = LayerProbe(weight, 0)
    samples = range(256)
    whole = Signs(0, 0).draws(probe, "fc", samples).astype(np.float64)
    blocks = BlockSigns(0, 0, 4)
    block = blocks.draws(probe, "fc", samples).astype(np.float64)
    loss = 0.5 * (h * whole**2).sum(axis=(1, 2))
    block_loss = 0.5 * (h * block**2).sum(axis=(1, 2))
    losses = ProbeLosses(loss[None], 2 * loss[None], block_loss[None], blocks.chosen(samples)[None])
    found = probe.diagonal(losses, 4)
    # Signs do not matter to a diagonal form, so nothing is random.
    np.testing.assert_allclose(found.channel_mean, h.mean(axis=1), rtol=1e-5)
    assert found.trace == pytest.approx(h.sum(), rel=1e-5)
    assert found.squared_error_per_loss == pytest.approx(2)
    assert found.trace_stderr < 1e-5 * found.trace


def test_without_block_probes_channels_share_evenly() -> None:
    """What rounding at one width costs is then shared by the amplitudes alone."""
    rng = np.random.default_rng(2)
    weight = (rng.normal(size=(3, 50)) * np.array([[0.1], [1.0], [3.0]])).astype(np.float32)
    probe = LayerProbe(weight, 0)
    none = ProbeLosses(np.full((1, 8), 0.5), np.full((1, 8), 1.0), np.zeros((0, 8)), np.zeros((0, 8), np.intp))
    found = probe.diagonal(none, 3)
    per_channel = np.asarray(found.channel_mean) * 50 * probe.amplitude.astype(np.float64) ** 2 / 2
    np.testing.assert_allclose(per_channel, 0.5 / 3, rtol=1e-5)
    assert found.trace_stderr == 0


def test_zero_weights_give_zeros_and_no_warning() -> None:
    probe = LayerProbe(np.zeros((3, 4), np.float32), 0)
    v = probe.whole(generators(2))
    assert not v.any()
    losses = ProbeLosses(np.zeros((1, 2)), np.zeros((1, 2)), np.zeros((1, 2)), np.array([[0, 1]]))
    found = probe.diagonal(losses, 3)
    assert (found.trace, found.relative_stderr, set(found.channel_mean)) == (0.0, 0.0, {0.0})
