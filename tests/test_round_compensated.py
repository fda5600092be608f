"""round-compensated on real networks: better than nearest on unseen samples, the same bytes again, and its refusals."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import onnx
import pytest
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
