"""The main job, default options and one size budget, on every classifier of the assets. Nothing here knows a model."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from assets_tasks import Assets
from claims import Claim, table
from judging import Judge, runner, take_turns

import lcpaq_onnx

__all__ = ["ModelsResult", "run_models"]

_BUDGETS = ("", "size<=0.3x")


@dataclass(frozen=True)
class ModelsResult:
    """``rows``: one per model and budget; a run that ended in an error has the key ``error``."""

    rows: list[dict[str, object]]
    claims: list[Claim]

    def text(self) -> str:
        header = (
            *("model", "budget", "top-1 float", "ours", "agree", "KL", "size", "speed", "int. MACs", "checks", "s"),
            "formats",
        )
        return table(header, [_line(row) for row in self.rows])


def run_models(
    assets: Assets, folder: Path, names: Iterable[str], *, calibration: int, evaluation: int, timing_s: float
) -> ModelsResult:
    """``names``: tasks. Speed is float time / ours at batch 1 on one thread, in turns."""
    rows = [
        row
        for name in names
        for row in _one_model(assets, name, folder, calibration=calibration, evaluation=evaluation, timing_s=timing_s)
    ]
    done = sum("error" not in row for row in rows)
    passed = sum(bool(row.get("checks_passed")) for row in rows)
    claims = [
        Claim("every classifier: runs that gave a file", done, ">=", len(rows)),
        Claim("every classifier: runs whose checks all passed", passed, ">=", len(rows)),
    ]
    return ModelsResult(rows, claims)


def _one_model(
    assets: Assets, name: str, folder: Path, *, calibration: int, evaluation: int, timing_s: float
) -> list[dict[str, object]]:
    task = assets.task(name, calibration, evaluation)
    judge = Judge(assets, task)
    rows: list[dict[str, object]] = []
    for index, budget in enumerate(_BUDGETS):
        row: dict[str, object] = {"model": name, "budget": budget, "samples": len(task.labels)}
        rows.append(row)
        print(f"{name} {budget or 'without a budget'}", file=sys.stderr, flush=True)
        start = time.perf_counter()
        try:
            quantized = lcpaq_onnx.quantize(task.model, task.calibration, budget=[budget] if budget else [])
        except lcpaq_onnx.LcpaqError as error:
            row |= {"error": str(error), "seconds": time.perf_counter() - start}
            continue
        row["seconds"] = time.perf_counter() - start
        path = folder / f"{name}_{index}.onnx"
        quantized.save(path)
        feed = task.evaluation[0]
        times = take_turns({"float": runner(task.model, feed), "ours": runner(path, feed)}, timing_s)
        report = quantized.report
        formats = sorted({layer.format for layer in quantized.plan.layers})
        row |= {
            "top1_float": judge.reference_top1,
            **asdict(judge.judge(path)),
            "size_ratio": path.stat().st_size / task.model.stat().st_size,
            "speedup": times.ratio("float", "ours"),
            "integer_macs": report.kernels.integer_share if report.kernels else 0.0,
            "checks": len(report.checks),
            "checks_passed": report.passed,
            "checks_failed": [f"{check.name}: {check.detail}" for check in report.failed_checks],
            "warnings": list(report.warnings),
            "formats": {f: sum(layer.format == f for layer in quantized.plan.layers) for f in formats},
        }
    return rows


def _line(row: dict[str, object]) -> tuple[str, ...]:
    start = (str(row["model"]), str(row["budget"]) or "none")
    if "error" in row:
        return (*start, "ERROR", *[""] * 7, f"{row['seconds']:.1f}", " ".join(str(row["error"]).split()))
    failed, formats = row["checks_failed"], row["formats"]
    assert isinstance(failed, list)
    assert isinstance(formats, dict)
    return (
        *start,
        f"{100 * float(str(row['top1_float'])):.1f} %",
        f"{100 * float(str(row['top1'])):.1f} %",
        f"{100 * float(str(row['agreement'])):.1f} %",
        f"{row['kl']:.5f}",
        f"{row['size_ratio']:.3f}",
        f"{row['speedup']:.2f}",
        f"{100 * float(str(row['integer_macs'])):.1f} %",
        "passed" if not failed else "FAILED " + ", ".join(text.split(":")[0] for text in failed),
        f"{row['seconds']:.1f}",
        " ".join(f"{name}:{count}" for name, count in formats.items()),
    )
