"""The report: JSON there and back, and a text that says what matters, first things first."""

from __future__ import annotations

import json

import pytest

from lcpaq_onnx.errors import LcpaqError, UsageError
from lcpaq_onnx.planning.plan import Proof
from lcpaq_onnx.verification.report import (
    ActivationRow,
    BitSummary,
    Check,
    Environment,
    KernelSummary,
    LatencyMeasure,
    LayerRow,
    ModelFile,
    Report,
    Totals,
)
from lcpaq_onnx.verification.report_text import render_text
from lcpaq_onnx.verification.text_table import shorten

LONG = "model/backbone/stage_2/block_11/branch_main/convolution_3x3/Conv"


def layer(name: str, **changes: object) -> LayerRow:
    fields = {
        "name": name,
        "op": "Conv",
        "format": "w4a8",
        "executed": "int8",
        "kernel": "QLinearConv",
        "is_integer": True,
        "float_reason": "",
        "storage": "cast",
        "parameters": 2304,
        "size_bytes": 1400,
        "stored_bits": 4,
        "executed_bits": 8,
        "macs": 2_359_296,
        "loss": 2e-4,
        "loss_stderr": 2e-5,
        "reason": "saves 1.2 KB for +0.1 % loss",
    }
    return LayerRow.model_validate({**fields, **changes})


def report(**changes: object) -> Report:
    fields = {
        "tool_version": "0.1.0",
        "source": ModelFile(name="resnet.onnx", sha256="a" * 64, size_bytes=1_069_000),
        "emitted": ModelFile(name="resnet.lcpaq.onnx", sha256="b" * 64, size_bytes=190_000),
        "plan_sha256": "c" * 64,
        "target": "onnxruntime-cpu-x86_64-vnni",
        "budgets": ("size<=0.18x",),
        "objective": ("error",),
        "environment": Environment(onnxruntime="1.32.0", threads=1, cpu_count=2, machine="x86_64"),
        "calibration": "npz calibration.npz (first 64 of 256 samples)",
        "samples": 64,
        "loss_name": "kl-logits",
        "promised": Totals(size_bytes=190_000, latency_us=430.0, bops=2.6e9, loss=0.012, relative_error=0.011),
        "measured": Totals(
            size_bytes=190_000,
            latency_us=450.0,
            load_ms=18.6,
            bops=2.7e9,
            loss=0.0141,
            loss_stderr=0.002,
            relative_error=0.0123,
            agreement=0.984375,
        ),
        "float_promised": Totals(size_bytes=1_069_000, latency_us=900.0, bops=4.1e10),
        "float_measured": Totals(size_bytes=1_069_000, latency_us=910.0, load_ms=11.4, bops=4.1e10),
        "latency": LatencyMeasure(
            rounds=700,
            float_median_us=910.0,
            float_minimum_us=880.0,
            median_us=450.0,
            minimum_us=430.0,
            speedup=2.02,
            speedup_low=1.97,
            speedup_high=2.06,
        ),
        "kernels": KernelSummary(
            macs=4_718_592, integer_macs=4_595_909, layers=3, integer_layers=2, quantize_nodes=1, dequantize_nodes=2
        ),
        "bits": BitSummary(stored=4.0, stored_in_all=4.861, executed=8.6),
        "checks": (Check(name="size", passed=True, detail="190,000 bytes on disk, 190,000 predicted"),),
        "warnings": (),
        "layers": (
            layer("stem"),
            layer(LONG),
            layer(
                "fc",
                op="Gemm",
                kernel="Gemm",
                is_integer=False,
                executed_bits=32,
                float_reason="planned in float: it is cheap",
            ),
        ),
        "activations": (
            ActivationRow(
                name="relu_1",
                tensors=2,
                format="uint8:asym",
                scale=0.02,
                zero_point=0,
                range=(0.0, 5.1),
                loss=1e-4,
                loss_stderr=1e-5,
                reason="",
            ),
            ActivationRow(
                name="scores",
                tensors=1,
                format="f32",
                scale=0.0,
                zero_point=0,
                range=None,
                loss=0.0,
                loss_stderr=0.0,
                reason="",
            ),
        ),
        "proof": Proof(optimal=True, gap=0.0, solver="HiGHS", shadow_prices=("+10 KB of size buys -4 % loss",)),
    }
    return Report.model_validate({**fields, **changes})


FAILED = (
    Check(name="size", passed=False, detail="190,001 bytes on disk, 190,000 predicted (+1)"),
    Check(name="opset", passed=True, detail="opset 21 of at most 25"),
)


def test_json_there_and_back_is_the_same_report():
    original = report(warnings=("slower",), checks=FAILED)
    assert Report.from_json(original.to_json()) == original
    assert original.to_json().endswith("}\n")
    assert original.to_json() == Report.from_json(original.to_json()).to_json()


def test_a_saved_report_is_read_and_a_missing_one_named(tmp_path):
    path = tmp_path / "out.report.json"
    path.write_text(report().to_json(), encoding="utf-8")
    assert Report.load(path) == report()
    with pytest.raises(LcpaqError, match=r"gone\.report\.json"):
        Report.load(tmp_path / "gone.report.json")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema_version": 99}, "report schema 99, this lcpaq reads 1 or 2"),
        ({"schema_version": True}, "report schema True"),
        ({"schema_version": "1"}, "report schema '1'"),
        ({"samples": "many"}, "out.json: samples"),
        ({"surprise": 1}, "out.json: surprise"),
    ],
)
def test_other_schemas_and_wrong_fields_are_errors_that_name_them(change, words):
    data = {**json.loads(report().to_json()), **change}
    with pytest.raises(UsageError, match=words):
        Report.from_json(json.dumps(data), source="out.json")
    with pytest.raises(UsageError, match=r"out\.json is not JSON"):
        Report.from_json("{", source="out.json")


def test_a_report_of_schema_1_is_still_read():
    data = json.loads(report().to_json())
    data["schema_version"] = 1
    del data["bits"]
    for totals in ("promised", "measured", "float_promised", "float_measured"):
        del data[totals]["load_ms"]
    for row in data["layers"]:
        del row["stored_bits"], row["executed_bits"]
    data["layers"] += [
        data["layers"][0] | {"name": "a", "format": "f32", "executed": "f32", "kernel": "Conv", "is_integer": False},
        data["layers"][0] | {"name": "b", "kernel": "", "is_integer": False},
    ]
    old = Report.from_json(json.dumps(data))
    assert old.schema_version == 2
    assert old.bits is None
    assert old.measured.load_ms is None
    bits = [(row.stored_bits, row.executed_bits) for row in old.layers]
    assert bits == [(4, 8), (4, 8), (4, 32), (32, 32), (4, 8)]
    assert Report.from_json(old.to_json()) == old
    assert "load " not in render_text(old)
    data["layers"][0]["format"] = "w4z9"
    with pytest.raises(UsageError, match=r"out.json: layers.0.stored_bits"):
        Report.from_json(json.dumps(data), source="out.json")


def test_passed_means_every_check_did():
    assert report().passed
    assert not report(checks=FAILED).passed
    assert [check.name for check in report(checks=FAILED).failed_checks] == ["size"]


def test_integer_share_is_by_multiply_accumulates_else_by_layers():
    summary = report().kernels
    assert summary is not None
    assert summary.integer_share == pytest.approx(4_595_909 / 4_718_592)
    assert summary.model_copy(update={"macs": 0, "integer_macs": 0}).integer_share == pytest.approx(2 / 3)
    empty = KernelSummary(macs=0, integer_macs=0, layers=0, integer_layers=0, quantize_nodes=0, dequantize_nodes=0)
    assert empty.integer_share == 0


# ---- text -----------------------------------------------------------------------------------------------------------
def test_the_headline_says_what_was_gained():
    text = render_text(report())
    assert "resnet.onnx -> resnet.lcpaq.onnx" in text
    assert "all 1 checks passed" in text
    assert "5.63x smaller: 1.069 MB -> 190 KB" in text
    assert "2.02x faster: 910 us -> 450 us" in text
    assert "1.23% of the output's range, 98.4% of decisions kept" in text
    assert "integer MACs 97.4% (2 of 3 layers)" in text
    assert "load     11.4 ms -> 18.6 ms" in text
    assert "bits     4.00 stored for a weight (4.86 with its scale and nodes), 8.6 executed" in text


def test_promises_stand_beside_measurements():
    lines = render_text(report()).splitlines()
    size = next(
        line.split() for line in lines if line.strip().startswith("size ") and "MB" in line and "->" not in line
    )
    assert size == ["size", "1.069", "MB", "190", "KB", "0.178x", "190", "KB", "0.178x"]
    loss = next(line for line in lines if "loss (kl-logits)" in line)
    assert "1.2e-02" in loss
    assert "0.0141 ± 0.002" in loss
    memory = next(line.split() for line in lines if "peak memory" in line)
    assert memory == ["peak", "memory", "–", "–", "–"]


def test_failures_and_warnings_come_before_everything_else():
    text = render_text(report(checks=FAILED, warnings=("slower than the float model",)))
    lines = [line for line in text.splitlines() if line]
    assert lines[1].endswith("1 of 2 checks FAILED")
    assert lines[2].startswith("FAILED   size: 190,001 bytes")
    assert lines[3].startswith("warning  slower than the float model")
    assert text.index("FAILED   size") < text.index("smaller")


def test_the_layer_table_is_aligned_totalled_and_keeps_both_ends_of_long_names():
    lines = render_text(report()).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("Layers:"))
    title, rule, *rows = lines[start + 1 : start + 8]
    assert lines[start] == "Layers: 3 x w4a8; bits: stored/executed"
    assert [row[title.index("bits") :].split()[0] for row in rows[:3]] == ["4/8", "4/8", "4/32"]
    kernels = [row[title.index("kernel") :].split()[0] for row in rows[:3]]
    assert kernels == ["QLinearConv", "QLinearConv", "Gemm"]
    assert rows[1].split()[0] == shorten(LONG, 30)
    assert rows[1].split()[0].startswith("model/backbone")
    assert rows[1].split()[0].endswith("3x3/Conv")
    assert rows[3] == rule
    assert rows[4].split() == ["3", "layers", "6,912", "4,200", "7.078", "6.0e-04", "±6%"]
    assert "planned in float" in rows[2]
    assert "planned in float: it is cheap" in render_text(report(), width=160)


def test_activations_proof_and_environment_are_told():
    text = render_text(report())
    assert "Activations: 1 x f32, 1 x uint8:asym" in text
    assert "proved optimal" in text
    assert "least error within size<=0.18x" in text
    assert "+10 KB of size buys" in text
    assert "ONNX Runtime 1.32.0 on x86_64, 1 of 2 CPUs; 700 timing rounds" in text
    assert "gap 1.50%" in render_text(report(proof=Proof(optimal=False, gap=0.015, solver="HiGHS")))


def test_a_model_that_got_larger_and_slower_is_not_praised():
    slow = report().latency
    assert slow is not None
    worse = report(
        emitted=ModelFile(name="out.onnx", sha256="b" * 64, size_bytes=2_138_000),
        latency=slow.model_copy(update={"speedup": 0.5}),
    )
    text = render_text(worse)
    assert "2.00x LARGER" in text
    assert "2.00x SLOWER" in text


@pytest.mark.parametrize("width", [100, 131, 132, 133, 200])
def test_lines_fit_the_width(width):
    text = render_text(report(warnings=("word " * 60,), checks=FAILED), width=width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert not any(line.endswith(" ") for line in text.splitlines())
    assert "\x1b" not in text


def test_a_report_of_a_file_that_did_not_run_can_be_read():
    text = render_text(report(measured=Totals(size_bytes=190_000), latency=None, kernels=None, loss_name="", samples=0))
    assert "faster" not in text
    assert "5.63x smaller" in text


@pytest.mark.parametrize(
    ("text", "width", "short"), [("abcdef", 6, "abcdef"), ("abcdefgh", 5, "ab…gh"), ("abcdefgh", 4, "ab…h")]
)
def test_shortening_cuts_the_middle(text, width, short):
    assert shorten(text, width) == short
