"""round-compensated on real networks: better than nearest on unseen samples, the same bytes again, and its refusals."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import onnx
import pytest
from analysing import model_of, singles
from onnx import numpy_helper
from planning_case import CALIBRATION, MODELS

from lcpaq_onnx import compiler
from lcpaq_onnx.compiler import Quantized, Settings
from lcpaq_onnx.errors import UsageError
from lcpaq_onnx.graph import graph_io
from lcpaq_onnx.planning.plan import Plan
from lcpaq_onnx.planning.roundings import compensated, compensated_below_8_bits
from lcpaq_onnx.runtime.session import Session
from lcpaq_onnx.tables import Compensable
from lcpaq_onnx.verification.measure import MeasuredError

SAMPLES = 96
EVALUATION = MODELS["digits_resnet"].parent / "digits_evaluation.npz"


@functools.cache
def quantized(name: str, bits: int, rounding: str, activation: int = 8) -> Quantized:
    settings = Settings(estimator="hessian-diagonal", sensitivity_samples=8, rounding=rounding)  # type: ignore[arg-type]
    chosen = {"weights": [bits], "activations": [activation], "objective": "error"}
    return compiler.quantize(MODELS[name], CALIBRATION, samples=SAMPLES, settings=settings, **chosen)  # type: ignore[arg-type]


def outputs(model: Path | onnx.ModelProto) -> np.ndarray:
    """Logits of unseen samples."""
    session = Session(model)
    with np.load(EVALUATION) as data:
        x = data[session.inputs[0].name]
    return np.concatenate(
        [session.run({session.inputs[0].name: x[i : i + 1]})[session.outputs[0].name] for i in range(len(x))]
    )


def divergence(name: str, model: onnx.ModelProto) -> float:
    """KL of the float model's answers on unseen samples from those of ``model``."""
    before, after = outputs(MODELS[name]), outputs(model)
    logs = [
        z - np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True)) - z.max(1, keepdims=True)
        for z in (before, after)
    ]
    return float((np.exp(logs[0]) * (logs[0] - logs[1])).sum(1).mean())


@pytest.mark.parametrize(
    ("name", "bits"), [("digits_resnet", 3), ("digits_resnet", 2), ("digits_mobile", 4), ("digits_vit", 3)]
)
def test_unseen_samples_lose_less_than_with_nearest_integers(name: str, bits: int) -> None:
    found, nearest = quantized(name, bits, "compensated"), quantized(name, bits, "nearest")
    assert {layer.rounding for layer in found.plan.layers if layer.weight_format != "f32"} <= {"compensated", "nearest"}
    assert any(layer.rounding == "compensated" for layer in found.plan.layers)
    assert all(layer.rounding != "compensated" for layer in nearest.plan.layers)
    assert divergence(name, found.model) < 0.5 * divergence(name, nearest.model)
    assert found.report.passed, found.report.failed_checks
    # Other integers, not other bytes.
    assert found.report.emitted.size_bytes == found.plan.predicted.size_bytes == nearest.plan.predicted.size_bytes


def test_biases_take_up_the_difference() -> None:
    """The mean of each logit over calibration samples stays nearer to the float model's than with nearest integers."""
    session = Session(MODELS["digits_resnet"])
    x = np.load(CALIBRATION)[session.inputs[0].name][:SAMPLES]
    feeds = [{session.inputs[0].name: x[i : i + 1]} for i in range(SAMPLES)]

    def mean(model: Path | onnx.ModelProto) -> np.ndarray:
        session = Session(model)
        return np.mean([session.run(feed)[session.outputs[0].name] for feed in feeds], axis=0)

    expected = mean(MODELS["digits_resnet"])
    found, nearest = (mean(quantized("digits_resnet", 3, rounding).model) for rounding in ("compensated", "nearest"))
    assert np.abs(found - expected).max() < 0.2 * np.abs(nearest - expected).max()


def test_a_plan_replays_to_the_same_bytes_with_its_data_and_no_other(tmp_path: Path) -> None:
    made = quantized("digits_resnet", 3, "compensated")
    plan = Plan.from_json(made.plan.to_json())
    again = compiler.apply(MODELS["digits_resnet"], plan, CALIBRATION, samples=SAMPLES)
    made.save(tmp_path / "made.onnx")
    graph_io.save(again, tmp_path / "again.onnx")
    assert (tmp_path / "made.onnx").read_bytes() == (tmp_path / "again.onnx").read_bytes()
    with pytest.raises(UsageError, match="sees in calibration data"):
        compiler.apply(MODELS["digits_resnet"], plan)
    with pytest.raises(UsageError, match="other calibration data"):
        compiler.apply(MODELS["digits_resnet"], plan, CALIBRATION, samples=SAMPLES - 1)
    with pytest.raises(UsageError, match="other calibration data"):
        compiler.apply(MODELS["digits_resnet"], plan, EVALUATION, samples=SAMPLES)


def test_nearest_plans_need_no_data() -> None:
    made = quantized("digits_resnet", 3, "nearest")
    assert made.plan.calibration_sha256 == ""
    assert graph_io.to_proto(compiler.apply(MODELS["digits_resnet"], made.plan)) == made.model


def test_auto_keeps_the_better_one() -> None:
    auto = quantized("digits_resnet", 3, "auto")
    assert auto.plan.layers == quantized("digits_resnet", 3, "compensated").plan.layers
    assert auto.model == quantized("digits_resnet", 3, "compensated").model


def test_weights_stay_within_their_width() -> None:
    made = quantized("digits_mobile", 4, "compensated")
    graph = compiler.apply(MODELS["digits_mobile"], made.plan, CALIBRATION, samples=SAMPLES)
    stored = {t.name: numpy_helper.to_array(t) for t in graph_io.to_proto(graph).graph.initializer}
    narrow = [values for values in stored.values() if values.dtype.name == "int4"]
    assert narrow
    assert all(values.astype(np.int8).min() >= -8 and values.astype(np.int8).max() <= 7 for values in narrow)


def test_which_plans_are_compensated_without_measuring() -> None:
    low, eight = quantized("digits_resnet", 3, "nearest").plan, quantized("digits_resnet", 8, "nearest").plan
    able = Compensable(tuple(layer.name for layer in low.layers[1:]), "abc", 40)
    assert compensated(low, None) is None
    assert compensated(low, Compensable((), "abc", 40)) is None
    assert compensated_below_8_bits(eight, able) == eight
    found = compensated_below_8_bits(low, able)
    assert (found.calibration_sha256, found.rounding_samples) == ("abc", 40)
    assert [layer.rounding for layer in found.layers] == ["nearest", *["compensated"] * (len(low.layers) - 1)]


# ---- networks that are not like others ------------------------------------------------------------------------------
RNG = np.random.default_rng(0)


def random_weights(*shapes: tuple[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    return {name: RNG.normal(size=shape).astype(np.float32) for name, shape in shapes}


def made(text: str, constants: dict[str, np.ndarray], x: np.ndarray, rounding: str = "compensated") -> Quantized:
    settings = Settings(estimator="hessian-diagonal", sensitivity_samples=4, rounding=rounding)  # type: ignore[arg-type]
    model = model_of(text, constants)
    return compiler.quantize(model, singles("x", x), weights=[4], activations=[32], objective="size", settings=settings)


def test_a_bias_of_one_number_stays_one() -> None:
    text = "g (float[n, 32] x) => (float[n, 24] y) { [a] h = Gemm(x, w, b) [r] i = Relu(h) [z] y = MatMul(i, v) }"
    constants = random_weights(("w", (32, 24)), ("b", (1,)), ("v", (24, 24)))
    found = made(text, constants, RNG.normal(size=(24, 32)).astype(np.float32))
    assert found.report.emitted.size_bytes == found.plan.predicted.size_bytes
    assert {layer.rounding for layer in found.plan.layers} == {"compensated"}


def test_means_that_dwarf_the_spread() -> None:
    text = "g (float[n, 32] x) => (float[n, 8] y) { [a] h = Gemm(x, w, b) [z] y = Gemm(h, v, c) }"
    constants = random_weights(("w", (32, 24)), ("b", (24,)), ("v", (24, 8)), ("c", (8,)))
    x = (1000 + RNG.normal(size=(24, 32))).astype(np.float32)
    found, nearest = (made(text, constants, x, rounding) for rounding in ("compensated", "nearest"))
    assert found.report.measured.relative_error < 0.2 * nearest.report.measured.relative_error
    same = made(text, constants, np.repeat(x[:1], 6, axis=0))
    assert np.isfinite(same.report.measured.loss)


def test_shapes_that_depend_on_values() -> None:
    """The rounded version picks other rows than the float one."""
    text = """g (float[n, 16] x) => (float[1, 8] y) {
        [a] h = MatMul(x, w) [f] flat = Flatten <axis = 0> (h) [q] row = Squeeze(flat, zero)
        [g] large = Greater(row, half) [nz] where = NonZero(large) [t] rows = Transpose(where)
        [p] picked = GatherND(row, rows) [u] wide = Unsqueeze(picked, one)
        [e] many = Concat <axis = 1> (wide, wide, wide, wide) [z] each = MatMul(many, v) [m] y = ReduceMean(each, zero)
    }"""
    constants = random_weights(("w", (16, 24)), ("v", (4, 8))) | {
        "half": np.float32(0.5), "zero": np.array([0]), "one": np.array([1])
    }  # fmt: skip
    found = made(text, constants, RNG.normal(size=(12, 16)).astype(np.float32))
    assert any(layer.rounding == "compensated" for layer in found.plan.layers)


def test_memory_that_is_free_does_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = quantized("digits_resnet", 3, "compensated").plan
    files = []
    for free in (64 << 20, 8 << 30):
        monkeypatch.setattr("lcpaq_onnx.runtime.resources.free_bytes", lambda free=free: free)
        graph = compiler.apply(MODELS["digits_resnet"], plan, CALIBRATION, samples=SAMPLES)
        files.append(graph_io.to_proto(graph).SerializeToString())
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("gain", "first", "expected"),
    [
        (np.ones(20), 0, True),
        (np.r_[np.ones(19), np.nan], 0, False),
        (np.r_[np.full(19, 0.1), 50.0], 0, True),  # one sample makes up the mean and its noise
        (np.r_[np.ones(40), -np.ones(10)], 40, False),  # better on what rounding has seen only
        (np.r_[np.ones(46), -np.ones(4)], 46, True),  # too few that it has not seen
        (np.zeros(20), 0, False),
    ],
)
def test_what_counts_as_clearly_better(gain: np.ndarray, first: int, expected: bool) -> None:
    base = MeasuredError(np.full(len(gain), 100.0), 0.1, None)
    found = MeasuredError(base.losses - gain, 0.1, None)
    assert found.is_clearly_below(base, first) is expected
