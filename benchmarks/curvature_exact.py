"""Hessian diagonals and rounding errors of the engine against exact ones, in float64 numpy, on a small network."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from claims import Claim, table
from curvature_engine import Subject, opened
from curvature_part import Part
from numpy.typing import NDArray
from onnx import numpy_helper, parser
from scipy import special

from lcpaq_onnx.numeric.hutchinson import channel_rows
from lcpaq_onnx.passes import HessianDiagonals
from lcpaq_onnx.passes.analysis.rounding_errors import RoundingErrors
from lcpaq_onnx.runtime.resources import Execution

__all__ = ["run_exact"]

Float = NDArray[np.float32]
Double = NDArray[np.float64]

_LIMIT = 0.02
_SAMPLES, _PROBES, _QUICK_PROBES = 96, 4000, 200
_WIDTHS = (3, 4, 5, 6)
_STEP = 1e-6
_GRAPH = """<ir_version: 10, opset_import: ["": 21]> g (float[n, 2, 5, 5] x) => (float[n, 3] y) {
    [stem] a = Conv <pads = [1, 1, 1, 1]> (x, stem) [sig] s = Sigmoid(a) [mul] b = Mul(a, s)
    [dw] c = Conv <pads = [1, 1, 1, 1], group = 4> (b, dw, bias) [relu] d = Relu(c)
    [pool] e = GlobalAveragePool(d) [flat] f = Flatten(e) [fc] y = MatMul(f, fc)
}"""
_BIAS = np.full(4, 0.3, np.float32)


def run_exact(*, quick: bool) -> Part:
    """``quick``: fewer probes, so that their own noise of about a per cent shows."""
    rng = np.random.default_rng(1)
    weights: dict[str, Float] = {
        "stem": (rng.normal(size=(4, 2, 3, 3)) / 2).astype(np.float32),
        "dw": rng.normal(size=(4, 1, 3, 3)).astype(np.float32),
        "fc": (rng.normal(size=(4, 3)) * 2).astype(np.float32),
    }
    x = rng.normal(size=(_SAMPLES, 2, 5, 5)).astype(np.float32)
    model = parser.parse_model(_GRAPH)
    constants = {**weights, "bias": _BIAS}
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    return _compared(model, x, weights, _QUICK_PROBES if quick else _PROBES)


def _compared(model: onnx.ModelProto, x: Float, weights: dict[str, Float], probes: int) -> Part:
    feeds = [{"x": x[index : index + 1]} for index in range(len(x))]
    subject = Subject.of(model, feeds)
    with opened(subject.graph, feeds, Execution()) as analyses:
        diagonals = analyses.get(HessianDiagonals(_SAMPLES, probes, probes))
        measured = analyses.get(RoundingErrors(subject.entries(_WIDTHS), _SAMPLES))
    doubles = {name: value.astype(np.float64) for name, value in weights.items()}
    rows: dict[str, dict[str, float]] = {}
    for layer in subject.layers:
        forward = _forward(x.astype(np.float64), doubles, layer.weight)
        exact = _gauss_newton_diagonal(forward, doubles[layer.weight])
        channels = channel_rows(exact, layer.channel_axis).mean(axis=1)  # type: ignore[arg-type]  # made for float32
        found = diagonals[layer.name]
        losses = {bits: _kl(forward, subject, layer.weight, bits) for bits in _WIDTHS}
        rows[layer.name] = {
            "trace": found.trace,
            "exact_trace": float(exact.sum()),
            "trace_error": abs(found.trace / float(exact.sum()) - 1),
            "channel_error": float(np.abs(np.asarray(found.channel_mean) - channels).max() / channels.max()),
            "rounding_error": max(abs(measured[layer.name, bits].loss / losses[bits] - 1) for bits in _WIDTHS),
        }
    header = ("layer", "trace", "exact", "error", "worst channel / largest", "worst rounding error")
    lines = [
        (name, f"{r['trace']:.5g}", f"{r['exact_trace']:.5g}", *(f"{100 * r[key]:.2g} %" for key in _ERRORS))
        for name, r in rows.items()
    ]
    claims = [
        Claim(name, max(row[key] for row in rows.values()), "<=", _LIMIT, f"{against}; largest of {len(rows)} layers")
        for name, key, against in (
            ("error of Hessian diagonals", "trace_error", "exact Gauss-Newton trace in float64"),
            ("error of Hessian diagonals by channel", "channel_error", "exact mean over the channel, of the largest"),
            ("error of measured rounding errors", "rounding_error", f"KL in float64, widths {_WIDTHS}"),
        )
    ]
    return Part(f"{_SAMPLES} samples, {probes} probes\n{table(header, lines)}", {**rows}, claims)


_ERRORS = ("trace_error", "channel_error", "rounding_error")


def _kl(forward: Callable[[Double], Double], subject: Subject, weight: str, bits: int) -> float:
    """Mean divergence in nats from the float network to the one with this weight rounded."""
    layer = next(layer for layer in subject.layers if layer.weight == weight)
    float_weight = subject.weights[weight].astype(np.float64)
    p, q = (
        special.softmax(forward(w), axis=1) for w in (float_weight, subject.rounded(layer, bits).astype(np.float64))
    )
    return float(special.rel_entr(p, q).sum(axis=1).mean())


def _gauss_newton_diagonal(forward: Callable[[Double], Double], weight: Double) -> Double:
    """Diagonal of JᵀFJ, mean over samples, shape of ``weight``; J by central differences."""
    p = special.softmax(forward(weight), axis=1)
    fisher = np.einsum("nc,cd->ncd", p, np.eye(p.shape[1])) - np.einsum("nc,nd->ncd", p, p)
    diagonal = np.zeros(weight.size)
    for index in range(weight.size):
        moved = np.zeros(weight.size)
        moved[index] = _STEP
        step = moved.reshape(weight.shape)
        column = (forward(weight + step) - forward(weight - step)) / (2 * _STEP)
        diagonal[index] = np.einsum("nc,ncd,nd->n", column, fisher, column).mean()
    return diagonal.reshape(weight.shape)


def _forward(x: Double, weights: dict[str, Double], name: str) -> Callable[[Double], Double]:
    """Value of the weight ``name`` → logits [samples, classes]."""
    return lambda value: _network(x, {**weights, name: value})


def _network(x: Double, weights: dict[str, Double]) -> Double:
    t = _conv(x, weights["stem"], 1)
    t = t * special.expit(t)
    t = np.maximum(_conv(t, weights["dw"], 4) + _BIAS[:, None, None], 0)
    result: Double = t.mean(axis=(2, 3)) @ weights["fc"]
    return result


def _conv(x: Double, weight: Double, groups: int) -> Double:
    """3 x 3, padding 1."""
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1))), (3, 3), axis=(2, 3))
    each, width = weight.shape[0] // groups, x.shape[1] // groups
    parts = [
        np.einsum("nchwij,mcij->nmhw", windows[:, g * width : (g + 1) * width], weight[g * each : (g + 1) * each])
        for g in range(groups)
    ]
    return np.concatenate(parts, axis=1)
