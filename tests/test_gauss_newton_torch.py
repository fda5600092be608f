"""Hessian diagonals and measured rounding errors against the whole Gauss-Newton matrix, by autodiff in float64."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import pytest
from analysing import analyses_of, model_of, rounding_error, singles

from lcpaq_onnx.manager.analysis import AnalysisManager
from lcpaq_onnx.numeric.directions import Rounding
from lcpaq_onnx.numeric.hutchinson import channel_rows
from lcpaq_onnx.numeric.interactions import interactions_of
from lcpaq_onnx.passes import GraphStructure, HessianDiagonals
from lcpaq_onnx.passes.analysis.prober import Probe, Prober
from lcpaq_onnx.passes.analysis.rounding_errors import RoundingErrors, every_entry

# The import of torch takes seconds.
pytestmark = pytest.mark.slow

SAMPLES = 64
# Each draw of each sample is one probe of the trace. With these the noise is below 1 %, also where a channel has a
# quarter of the draws; 1 % more is the higher orders of a quarter of a 4-bit rounding error.
PROBES, CHANNEL_PROBES = 600, 2400
TOLERANCE = 0.02
# Rounding errors of 6 bits are still 2.5 % off second order here.
BITS = (7, 8)
LAYERS = {"one": 0, "two": 0, "fc": 0}
RNG = np.random.default_rng(11)
WEIGHTS = {
    "w_one": (RNG.normal(size=(4, 2, 3, 3)) / 3).astype(np.float32),
    "w_two": (RNG.normal(size=(4, 4, 3, 3)) / 5).astype(np.float32),
    "w_fc": RNG.normal(size=(3, 4)).astype(np.float32),
    "b_one": RNG.normal(size=4).astype(np.float32) / 4,
    "b_fc": RNG.normal(size=3).astype(np.float32) / 2,
}
X = RNG.normal(size=(SAMPLES, 2, 6, 6)).astype(np.float32)
MODEL = model_of(
    """g (float[n, 2, 6, 6] x) => (float[n, 3] y) {
        [one] a = Conv <pads = [1, 1, 1, 1]> (x, w_one, b_one) [sig] s = Sigmoid(a) [swish] b = Mul(a, s)
        [two] c = Conv <pads = [1, 1, 1, 1]> (b, w_two) [add] d = Add(c, b) [tanh] e = Tanh(d)
        [pool] p = GlobalAveragePool(e) [flat] f = Flatten(p) [fc] y = Gemm <transB = 1> (f, w_fc, b_fc)
    }""",
    WEIGHTS,
)


@dataclass(frozen=True, eq=False)
class Exact:
    """``matrix``: JᵀFJ, mean over samples, of all layers' weights in a row; ``places``: of each layer in it."""

    matrix: np.ndarray
    places: dict[str, slice]

    def block(self, row: str, column: str) -> np.ndarray:
        return self.matrix[self.places[row], self.places[column]]


@functools.cache
def exact() -> Exact:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    doubles = {name: torch.tensor(value, dtype=torch.float64) for name, value in WEIGHTS.items()}
    conv2d = torch.nn.functional.conv2d

    def logits(weights: dict[str, object], x: object) -> object:
        w = {**doubles, **weights}
        b = torch.nn.functional.silu(conv2d(x[None], w["w_one"], w["b_one"], padding=1))  # type: ignore[index]
        e = torch.tanh(conv2d(b, w["w_two"], padding=1) + b)
        return (e.mean(dim=(2, 3)) @ w["w_fc"].T + w["b_fc"])[0]

    weights = {f"w_{name}": doubles[f"w_{name}"] for name in LAYERS}
    x = torch.tensor(X, dtype=torch.float64)
    jacobians = torch.func.vmap(torch.func.jacrev(logits), in_dims=(None, 0))(weights, x)
    flat = torch.cat([jacobians[f"w_{name}"].flatten(2) for name in LAYERS], dim=2)
    p = torch.softmax(torch.func.vmap(logits, in_dims=(None, 0))(weights, x), dim=1)
    fisher = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    matrix = torch.einsum("nci,ncd,ndj->ij", flat, fisher, flat) / SAMPLES
    ends = np.cumsum([WEIGHTS[f"w_{name}"].size for name in LAYERS])
    places = {n: slice(int(end) - WEIGHTS[f"w_{n}"].size, int(end)) for n, end in zip(LAYERS, ends, strict=True)}
    return Exact(matrix.numpy(), places)


@functools.cache
def analyses() -> AnalysisManager:
    return analyses_of(MODEL, singles("x", X), loss="kl-logits")


def error_of(layer: str, bits: int) -> np.ndarray:
    """The rounding error of the layer's weights, in a row."""
    return rounding_error(WEIGHTS[f"w_{layer}"], bits, LAYERS[layer]).astype(np.float64).ravel()


@pytest.mark.parametrize("layer", LAYERS)
def test_traces_and_channels_are_those_of_the_exact_matrix(layer: str) -> None:
    diagonal = np.diag(exact().block(layer, layer)).reshape(WEIGHTS[f"w_{layer}"].shape)
    found = analyses().get(HessianDiagonals(SAMPLES, PROBES, CHANNEL_PROBES))[layer]
    channels = channel_rows(diagonal, LAYERS[layer]).mean(axis=1)  # type: ignore[arg-type]
    assert found.trace == pytest.approx(diagonal.sum(), rel=TOLERANCE)
    np.testing.assert_allclose(found.channel_mean, channels, rtol=TOLERANCE)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("bits", BITS)
def test_measured_rounding_errors_are_the_exact_quadratic_form(layer: str, bits: int) -> None:
    error = error_of(layer, bits)
    expected = 0.5 * error @ exact().block(layer, layer) @ error
    found = analyses().get(RoundingErrors(every_entry(analyses(), BITS), SAMPLES))[layer, bits]
    assert found.loss == pytest.approx(expected, rel=TOLERANCE)


def test_cross_terms_are_those_of_the_exact_matrix() -> None:
    starts = {layer.name: layer.raw_output for layer in analyses().get(GraphStructure).layers}
    probes = {name: Probe(start, Rounding(8)) for name, start in starts.items()}
    found = Prober(analyses().graph, analyses(), SAMPLES).measure(list(probes.values()))
    gram = interactions_of({(name, "w8"): found[probe].embedding for name, probe in probes.items()}).gram
    expected = np.array([[0.5 * error_of(a, 8) @ exact().block(a, b) @ error_of(b, 8) for b in starts] for a in starts])
    size = np.sqrt(np.diagonal(expected))
    np.testing.assert_allclose(gram / np.outer(size, size), expected / np.outer(size, size), atol=TOLERANCE)
    # Some of them matter.
    assert np.abs(expected / np.outer(size, size) - np.eye(len(size))).max() > 0.05
