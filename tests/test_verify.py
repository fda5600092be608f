"""Verification held against files that are right, and files that are wrong in one way each, in real ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from small_plan import MACS, Emitted, emit, float_model, make_plan

from lcpaq_onnx.errors import ModelError, UsageError
from lcpaq_onnx.graph.stored import stored_weight
from lcpaq_onnx.graph.written import read_model
from lcpaq_onnx.numeric.losses import relative_squared_error
from lcpaq_onnx.runtime.kernels import open_observed, realised_kernels
from lcpaq_onnx.runtime.session import Session, SessionOptions
from lcpaq_onnx.runtime.stopwatch import time_pair
from lcpaq_onnx.targets.loader import load
from lcpaq_onnx.verification.measure import Reference, measure_error
from lcpaq_onnx.verification.report import Check, Report
from lcpaq_onnx.verification.run_checks import FUSION_TOLERANCE, fusion_check
from lcpaq_onnx.verification.teacher import Answers, reference_of
from lcpaq_onnx.verification.verify import Known, VerifyOptions, verify

MIXED = {"stem": "w5", "depthwise": "f32", "middle": "w4a8", "head/project": "w3a8"}
FAST = VerifyOptions(timing_s=0)


def check(emitted: Emitted, *, known: Known = Known(), options: VerifyOptions = FAST) -> Report:  # noqa: B008
    target = load(emitted.plan.target)
    return verify(
        emitted.original, emitted.path, emitted.data, plan=emitted.plan, target=target, options=options, known=known
    )


def edited(emitted: Emitted, edit: Callable[[onnx.ModelProto], object]) -> Emitted:
    model = onnx.load(emitted.path)
    edit(model)
    onnx.save(model, emitted.path)
    predicted = emitted.plan.predicted.model_copy(update={"size_bytes": emitted.path.stat().st_size})
    return replace(emitted, plan=emitted.plan.model_copy(update={"predicted": predicted}))


def set_constant(model: onnx.ModelProto, name: str, values: np.ndarray) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(values), name))


def values_of(model: onnx.ModelProto, name: str) -> np.ndarray:
    return numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name))


def node_of(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def failed(report: Report, ignoring: Iterable[str] = ("plan-stamp",)) -> dict[str, str]:
    """Failed checks by name. Edits change the plan's predicted size, hence its hash: the stamp is tested by itself."""
    return {c.name: c.detail for c in report.checks if not c.passed and c.name not in ignoring}


# ---- a right file ---------------------------------------------------------------------------------------------------
def test_a_right_file_passes_and_every_layer_is_accounted_for(tmp_path):
    report = check(emit(tmp_path, make_plan(MIXED)))
    assert failed(report, ignoring=()) == {}
    assert report.passed
    kernels = {row.name: row.kernel for row in report.layers}
    assert kernels == {
        "stem": "Conv",
        "depthwise": "Conv",
        "middle": "QLinearConv",
        "head/project": "QLinearConv",
        "classify": "QGemm",
    }
    integer = MACS["middle"] + MACS["head/project"] + MACS["classify"]
    assert report.kernels is not None
    assert report.kernels.macs == sum(MACS.values())
    assert report.kernels.integer_share == pytest.approx(integer / sum(MACS.values()))
    assert f"integer MACs {integer / sum(MACS.values()):.1%}" in detail(report, "integer-kernels")
    assert {row.name: row.macs for row in report.layers} == MACS
    assert [row.parameters for row in report.layers] == [216, 72, 576, 128, 80]
    assert next(row for row in report.layers if row.name == "depthwise").float_reason.startswith("planned in float")
    assert report.measured.bops == 64 * integer + 1024 * (sum(MACS.values()) - integer)


def test_stored_and_executed_bits_are_told_apart(tmp_path):
    report = check(emit(tmp_path, make_plan(MIXED)))
    bits = {row.name: (row.stored_bits, row.executed_bits) for row in report.layers}
    assert bits == {
        "stem": (5, 32),
        "depthwise": (32, 32),
        "middle": (4, 8),
        "head/project": (3, 8),
        "classify": (8, 8),
    }
    assert report.bits is not None
    parameters = {row.name: row.parameters for row in report.layers}
    stored = sum(bits[name][0] * count for name, count in parameters.items()) / sum(parameters.values())
    assert report.bits.stored == pytest.approx(stored)
    assert report.bits.stored_in_all == pytest.approx(8 * 5 * 100 / sum(parameters.values()))  # as planned by hand
    executed = sum(bits[name][1] * count for name, count in MACS.items()) / sum(MACS.values())
    assert report.bits.executed == pytest.approx(executed)


def test_loading_is_timed_where_running_is(tmp_path):
    emitted = emit(tmp_path, make_plan(MIXED))
    for timing_s, is_timed in ((0.0, False), (0.01, True)):
        report = check(emitted, options=VerifyOptions(timing_s=timing_s))
        loads = (report.float_measured.load_ms, report.measured.load_ms)
        assert [load is not None for load in loads] == [is_timed, is_timed]
    # Five small layers: far from both ends on any machine.
    assert all(0.1 < load < 5000 for load in loads)


def detail(report: Report, name: str) -> str:
    return next(c.detail for c in report.checks if c.name == name)


def test_measured_error_is_that_of_plain_sessions(tmp_path):
    emitted = emit(tmp_path, make_plan({"middle": "w2a8"}, opset=25))
    report = check(emitted)
    original, quantized = Session(emitted.original), Session(emitted.path)
    feed = {"image": np.concatenate([f["image"] for f in emitted.data])}
    p, q = original.run(feed)["scores"].astype(float), quantized.run(feed)["scores"].astype(float)
    rms = np.sqrt(np.mean((p - q) ** 2)) / np.ptp(p)
    log_p, log_q = (z - np.log(np.exp(z).sum(1, keepdims=True)) for z in (p, q))
    # Batches of another size and one thread move float32 sums in their last digits.
    assert report.measured.relative_error == pytest.approx(rms, rel=1e-2)
    assert report.measured.loss == pytest.approx(float((np.exp(log_p) * (log_p - log_q)).sum(1).mean()), rel=1e-2)
    assert report.measured.agreement == np.mean(p.argmax(1) == q.argmax(1))
    assert report.samples == 12
    assert report.loss_name == "kl-logits"


def test_what_the_caller_measured_is_not_measured_again(tmp_path):
    emitted = emit(tmp_path, make_plan({}))
    answers = Answers(Session(emitted.original), emitted.data.take(5), 5)
    reference, name = reference_of(answers, "squared-error")
    measured = measure_error(Session(emitted.path), answers, reference)
    known = Known(measured=measured, reference=reference, loss_name=name, macs={"stem": 7}, emitted_name="out.onnx")
    report = check(emitted, known=known)
    assert (report.samples, report.loss_name, report.emitted.name) == (5, "squared-error", "out.onnx")
    assert report.kernels is not None
    assert report.kernels.macs == 7


def test_a_loss_of_the_user_is_taken(tmp_path):
    emitted = emit(tmp_path, make_plan({}))
    target = load(emitted.plan.target)
    report = verify(
        *(emitted.original, emitted.path, emitted.data),
        plan=emitted.plan,
        target=target,
        loss=lambda teacher, changed: np.abs(teacher["scores"] - changed["scores"]).max(axis=1),
        options=FAST,
    )
    assert report.loss_name == "user"
    assert report.measured.agreement is not None
    assert 0 < (report.measured.loss or 0) < 1


def test_a_model_in_memory_is_a_reference_too(tmp_path):
    emitted = emit(tmp_path, make_plan({}))
    target = load(emitted.plan.target)
    report = verify(float_model(), emitted.path, emitted.data, plan=emitted.plan, target=target, options=FAST)
    assert report.passed
    assert report.source.name == "small"


def test_the_report_holds_no_folders(tmp_path):
    assert str(tmp_path) not in check(emit(tmp_path, make_plan({}))).to_json()


# ---- kernels --------------------------------------------------------------------------------------------------------
def test_a_layer_that_the_runtime_does_not_fuse_is_reported_with_the_reason(tmp_path):
    def wrong_bias_scale(model):
        set_constant(model, "mid.bias/scale", values_of(model, "mid.bias/scale") * 2)

    report = check(edited(emit(tmp_path, make_plan({})), wrong_bias_scale))
    found = failed(report)
    assert set(found) == {"integer-kernels", "weights-as-planned"}
    assert "middle: planned int8, but runs as float Conv behind DequantizeLinear" in found["integer-kernels"]
    assert "scale of its bias" in found["integer-kernels"]
    assert "middle: the bias scale" in found["weights-as-planned"]
    row = next(row for row in report.layers if row.name == "middle")
    assert (row.is_integer, row.kernel) == (False, "Conv")


def test_a_float_layer_that_the_runtime_requantizes_is_caught(tmp_path):
    report = check(emit(tmp_path, make_plan({"middle": "f32"}, isolate=False)))
    assert failed(report) == {"no-silent-requantization": "middle: planned f32, runs as QLinearConv"}


def test_kernels_of_another_runtime_are_only_warned_of(tmp_path):
    plan = make_plan({"middle": "f32"}, isolate=False, target="generic-int8", opset=13)
    report = check(emit(tmp_path, plan))
    assert "no-silent-requantization" not in {c.name for c in report.checks}
    assert any("not the target" in warning for warning in report.warnings)


def test_layers_are_found_by_name_weight_or_output_and_never_by_a_shorter_name(tmp_path):
    emitted = emit(tmp_path, make_plan({}))
    _, optimized = open_observed(emitted.path, SessionOptions(threads=1))
    written = read_model(emitted.path)
    weights = {layer.name: layer.weight for layer in emitted.plan.layers}
    assert set(realised_kernels(optimized, written, weights).kernels) == set(weights)
    # "mid" is no layer of this graph: neither its name nor its weight is there.
    assert "mid" not in realised_kernels(optimized, written, {**weights, "mid": "absent"}).kernels
    # Renamed nodes are still found by the weight that they alone read.
    renamed = replace(optimized, nodes=tuple(replace(node, name="") for node in optimized.nodes))
    assert set(realised_kernels(renamed, written, weights).kernels) == set(weights)


def test_float_convolutions_in_blocked_layout_are_found_by_their_output(tmp_path):
    onnx.save(float_model(), tmp_path / "float.onnx")
    _, optimized = open_observed(tmp_path / "float.onnx", SessionOptions(threads=1))
    layers = {"stem": "stem.weight", "depthwise": "dw.weight", "middle": "mid.weight"}
    kernels = realised_kernels(optimized, read_model(tmp_path / "float.onnx"), layers).kernels
    assert {name: (kernel.op, kernel.is_integer) for name, kernel in kernels.items()} == dict.fromkeys(
        layers, ("Conv", False)
    )


@pytest.mark.parametrize(
    ("quantization", "fusion", "passes"),
    [(0.0, 0.9 * FUSION_TOLERANCE, True), (0.0, 1.1 * FUSION_TOLERANCE, False), (0.1, 0.02, True), (0.1, 0.03, False)],
)
def test_fusion_may_move_outputs_by_the_tolerance_or_a_quarter_of_the_quantization(quantization, fusion, passes):
    expected = np.linspace(0, 1, 50).reshape(10, 5)  # range 1: differences are parts of the range
    unfused = expected + quantization
    found = fusion_check({"y": expected}, {"y": unfused + fusion}, {"y": unfused}, decides=True)
    assert found.passed == passes
    assert "100% of decisions equal" in found.detail


# ---- one fault, one check -------------------------------------------------------------------------------------------
def test_a_size_that_is_off_by_one_byte_fails(tmp_path):
    emitted = emit(tmp_path, make_plan({}))
    predicted = emitted.plan.predicted.model_copy(update={"size_bytes": emitted.path.stat().st_size - 1})
    found = failed(check(replace(emitted, plan=emitted.plan.model_copy(update={"predicted": predicted}))))
    assert set(found) == {"size"}
    assert "(+1)" in found["size"]


def test_external_data_count_as_size(tmp_path):
    emitted = emit(tmp_path, make_plan({}))
    before = emitted.path.stat().st_size
    model = onnx.load(emitted.path)
    onnx.save(model, emitted.path, save_as_external_data=True, location="weights.bin", size_threshold=64)
    sizes = emitted.path.stat().st_size, (tmp_path / "weights.bin").stat().st_size
    assert read_model(emitted.path).size_bytes == sum(sizes) != before
    assert set(failed(check(emitted))) == {"size"}


@pytest.mark.parametrize(
    ("edit", "check_name", "words"),
    [
        pytest.param(
            lambda m: set_constant(m, "mid_relu/scale", values_of(m, "mid_relu/scale") * np.float32(1.0000005)),
            "activations-as-planned",
            "mid_relu: QuantizeLinear: scale",
            id="activation-scale-last-bit",
        ),
        pytest.param(
            lambda m: set_constant(m, "dw_out/zero_point", values_of(m, "dw_out/zero_point") + np.uint8(1)),
            "activations-as-planned",
            "zero point UINT8",
            id="zero-point",
        ),
        pytest.param(
            lambda m: set_constant(m, "stem_relu/scale", values_of(m, "stem_relu/scale").reshape(1)),
            "activations-as-planned",
            "must be 0-d",
            id="scale-of-shape-1",
        ),
        pytest.param(
            lambda m: node_of(m, "fc.weight/Dequantize").input.pop(),
            "weights-as-planned",
            "classify: no zero point",
            id="weight-zero-point-left-out",
        ),
        pytest.param(
            lambda m: setattr(node_of(m, "middle"), "name", "other"),
            "weights-as-planned",
            "middle: no Conv of that name",
            id="renamed-node",
        ),
        pytest.param(
            lambda m: m.opset_import[0].__setattr__("version", 26),
            "opset",
            "above the target's ceiling; planned opset 21",
            id="opset",
        ),
        pytest.param(
            lambda m: setattr(m, "ir_version", 14),
            "opset",
            "IR 14 of at most 13",
            id="ir-version",
        ),
        pytest.param(
            lambda m: m.graph.node.insert(0, m.graph.node.pop()),
            "onnx-checker",
            "topologically",
            id="node-order",
        ),
    ],
)
def test_each_fault_fails_its_own_check(tmp_path, edit, check_name, words):
    found = failed(check(edited(emit(tmp_path, make_plan({})), edit)))
    assert words in found[check_name]


def test_a_plan_of_other_bits_does_not_fit_the_file(tmp_path):
    emitted = emit(tmp_path, make_plan(MIXED))
    for claimed, words in (
        ({**MIXED, "middle": "w8a8"}, "middle: planned plain, stored cast"),
        ({**MIXED, "middle": "w2a8"}, "middle: planned 2 bits, stored 4"),
        ({**MIXED, "head/project": "w6a8"}, "head/project: planned 6 bits, stored 3"),
        ({**MIXED, "middle": "f32"}, "middle: planned f32, stored 4 bits cast"),
        ({**MIXED, "stem": "w5a8"}, "stem: planned a DequantizeLinear"),
        ({**MIXED, "depthwise": "w8a8"}, "depthwise: planned plain, stored float"),
    ):
        found = failed(check(replace(emitted, plan=make_plan(claimed))))
        assert words in found["weights-as-planned"]


def test_widths_are_read_from_the_file(tmp_path):
    formats = {"stem": "w7a8", "depthwise": "w2a8", "middle": "w5a8", "head/project": "w6a8", "classify": "w3"}
    path = emit(tmp_path, make_plan(formats, opset=25)).path
    model = read_model(path)
    weights = {"stem": "stem", "depthwise": "dw", "middle": "mid", "head/project": "project", "classify": "fc"}
    stored = {name: stored_weight(model, f"{weight}.weight") for name, weight in weights.items()}
    assert {name: s.bits for name, s in stored.items() if s} == {
        "stem": 7,
        "depthwise": 2,
        "middle": 5,
        "head/project": 6,
        "classify": 3,
    }
    assert stored["classify"] is not None
    assert stored["classify"].with_scale_only


def test_another_plan_than_the_stamped_one_fails(tmp_path):
    emitted = emit(tmp_path, make_plan({}))
    report = check(replace(emitted, plan=emitted.plan.model_copy(update={"objective": ("size",)})))
    assert [c.name for c in report.failed_checks] == ["plan-stamp"]


def test_a_file_that_does_not_load_is_a_failed_check_and_still_a_report(tmp_path):
    def unknown_operator(model):
        node_of(model, "middle").op_type = "NoSuchOperator"

    report = check(edited(emit(tmp_path, make_plan({})), unknown_operator))
    assert {"onnx-checker", "loads-and-runs", "weights-as-planned"} <= set(failed(report))
    assert report.kernels is None
    assert report.measured.loss is None
    assert Report.from_json(report.to_json()) == report


def test_a_file_that_is_no_model_is_an_error(tmp_path):
    emitted = emit(tmp_path, make_plan({}))
    emitted.path.write_bytes(b"\xff\xff not a model")
    with pytest.raises(ModelError, match=r"small\.lcpaq\.onnx"):
        check(emitted)


# ---- budgets --------------------------------------------------------------------------------------------------------
def test_budgets_are_judged_as_predicted_and_as_measured(tmp_path):
    budgets = ("size<=20KB", "latency<=0.4x", "bops<=0.5x", "peak_memory<=9KB", "bits<=8", "error<=0.1%")
    report = check(emit(tmp_path, make_plan({}, budgets=budgets)))
    found = failed(report)
    assert set(found) == {"budget-latency", "budget-error"}
    assert "predicted 0.4444x" in found["budget-latency"]
    assert "predicted 2%, measured" in found["budget-error"]
    assert "predicted 9KB" in detail(report, "budget-peak_memory")
    assert detail(report, "budget-bits") == "bits<=8: predicted 8, measured 8"


def test_stored_bits_are_counted_in_the_file(tmp_path):
    plan = make_plan({"middle": "f32"}, budgets=("bits<=8",))  # which says 8 and has a float layer
    report = check(emit(tmp_path, plan))
    assert failed(report) == {"budget-bits": f"bits<=8: predicted 8, measured {report.bits.stored:.4g}"}
    assert report.bits.stored > 8


def test_an_error_budget_that_only_the_prediction_meets_fails(tmp_path):
    plan = make_plan({"middle": "w2a8"}, opset=25, budgets=("error<=1e-6",))
    plan = plan.model_copy(update={"predicted": plan.predicted.model_copy(update={"loss": 0.0, "relative_error": 0.0})})
    report = check(emit(tmp_path, plan))
    assert "predicted 0, measured" in failed(report)["budget-error"]
    assert any("0.00% was predicted" in warning for warning in report.warnings)


# ---- timing ---------------------------------------------------------------------------------------------------------
def test_timing_alternates_and_tells_the_faster_one():
    calls: list[str] = []

    def work(name: str, size: int) -> None:
        calls.append(name)
        np.sort(np.arange(size)[::-1])

    timing = time_pair(lambda: work("a", 40_000), lambda: work("b", 400), 0.05)
    assert timing.speedup > 1
    assert timing.ratio_low <= timing.ratio <= timing.ratio_high
    assert timing.first_minimum_us <= timing.first_median_us
    timed = calls[-4:]
    assert sorted(timed) == ["a", "a", "b", "b"]
    assert calls.count("a") - calls.count("b") in range(-5, 6)
    with pytest.raises(UsageError, match="positive"):
        time_pair(lambda: None, lambda: None, 0)


def test_latency_of_both_models_is_in_the_report(tmp_path):
    report = check(emit(tmp_path, make_plan({})), options=VerifyOptions(timing_s=0.05))
    assert report.latency is not None
    assert report.latency.rounds >= 3
    assert report.measured.latency_us == report.latency.median_us
    assert report.float_measured.latency_us == report.latency.float_median_us
    assert ("slower than" in " ".join(report.warnings)) == (report.latency.speedup < 1)


# ---- the teacher ----------------------------------------------------------------------------------------------------
def test_answers_can_be_read_again_and_give_the_scale_of_all_batches(tmp_path):
    emitted = emit(tmp_path, make_plan({}))
    session = Session(emitted.original)
    answers = Answers(session, emitted.data, 5)
    reference, _ = reference_of(answers, "auto")
    every = np.concatenate([outputs["scores"] for _, outputs in answers])
    assert isinstance(reference, Reference)
    assert reference.decides
    assert reference.scale.range["scores"] == pytest.approx(np.ptp(every))
    first, again = ([o["scores"] for _, o in answers] for _ in range(2))
    assert [len(part) for part in first] == [5, 5, 2]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    changed = {"scores": every + 0.1 * np.ptp(every)}
    assert relative_squared_error({"scores": every}, changed, reference.scale) == pytest.approx(0.01, rel=1e-4)


def test_checks_are_plain_values():
    assert Check(name="size", passed=True, detail="") == Check(name="size", passed=True, detail="")


def test_paths_of_the_original_may_be_missing(tmp_path):
    emitted = emit(tmp_path, make_plan({}))
    with pytest.raises(ModelError, match=r"gone\.onnx"):
        check(replace(emitted, original=Path(tmp_path / "gone.onnx")))
