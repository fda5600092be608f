"""Verification of an emitted file: is it valid, is it what the plan says, does it run as promised. Returns a Report."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from lcpaq_onnx.graph.written import read_model, sha256_of
from lcpaq_onnx.numeric.losses import LossName, TeacherLoss
from lcpaq_onnx.planning.plan import Plan
from lcpaq_onnx.provenance import TOOL_VERSION
from lcpaq_onnx.runtime.calibration import CalibrationData
from lcpaq_onnx.runtime.kernels import runtime_version
from lcpaq_onnx.targets.target import Target
from lcpaq_onnx.verification.budget_checks import budget_checks
from lcpaq_onnx.verification.file_checks import file_checks
from lcpaq_onnx.verification.model_run import Known, ModelRun, VerifyJob, VerifyOptions, run_model
from lcpaq_onnx.verification.report import Environment, ModelFile, Report, Totals
from lcpaq_onnx.verification.report_rows import activation_rows, bit_summary, kernel_summary, layer_rows

if TYPE_CHECKING:
    import onnx

__all__ = ["Known", "VerifyOptions", "verify"]

# A prediction off by more than the factor is worth a look, unless the error is too small to matter.
_SUSPICIOUS_FACTOR = 2.0
_NEGLIGIBLE_ERROR = 1e-3


def verify(
    original: Path | onnx.ModelProto,
    emitted: Path,
    data: CalibrationData,
    *,
    plan: Plan,
    target: Target,
    loss: LossName | TeacherLoss = "auto",
    options: VerifyOptions = VerifyOptions(),  # noqa: B008 - a frozen value
    known: Known = Known(),  # noqa: B008 - a frozen value
) -> Report:
    """Check the file ``emitted`` against ``plan``, against the float model ``original``, and against the runtime.

    A file that fails a check still gives a report. Raises ModelError when ``emitted`` cannot be read as a model or
    ``original`` cannot be run, CalibrationError when ``data`` do not fit.
    """
    source = read_model(original, base_dir=known.base_dir)
    written = read_model(emitted)
    checks = file_checks(emitted, written, source, plan, target)
    run = run_model(VerifyJob(original, emitted, written, data, plan, target, loss, options, known))
    measured = run.measured.model_copy(update={"size_bytes": written.size_bytes})
    layers = layer_rows(plan, written, run.realisation, run.macs)
    bits = bit_summary(plan, layers)
    speedup = run.latency.speedup if run.latency else None
    checks += [*run.checks, *budget_checks(plan, measured, speedup, bits)]
    predicted = plan.predicted
    return Report(
        tool_version=TOOL_VERSION,
        source=ModelFile(
            name=original.name if isinstance(original, Path) else original.graph.name or "model in memory",
            sha256=plan.source_sha256,
            size_bytes=source.size_bytes,
        ),
        emitted=ModelFile(
            name=known.emitted_name or emitted.name, sha256=sha256_of(emitted), size_bytes=written.size_bytes
        ),
        plan_sha256=plan.sha256(),
        target=target.name,
        budgets=plan.budgets,
        objective=plan.objective,
        environment=Environment(
            onnxruntime=runtime_version(),
            threads=options.threads,
            cpu_count=os.cpu_count() or 1,
            machine=platform.machine(),
        ),
        calibration=data.description,
        samples=run.samples,
        loss_name=run.loss_name,
        promised=Totals(
            size_bytes=predicted.size_bytes,
            latency_us=predicted.latency_us,
            bops=predicted.bops,
            peak_memory_bytes=predicted.peak_memory_bytes,
            loss=predicted.loss,
            relative_error=predicted.relative_error,
        ),
        measured=measured,
        float_promised=Totals(
            size_bytes=predicted.float_size_bytes,
            latency_us=predicted.float_latency_us,
            bops=predicted.float_bops,
            peak_memory_bytes=predicted.float_peak_memory_bytes,
        ),
        float_measured=run.float_measured.model_copy(update={"size_bytes": source.size_bytes}),
        latency=run.latency,
        kernels=kernel_summary(plan, run.realisation, run.macs),
        bits=bits,
        checks=tuple(checks),
        warnings=(*run.warnings, *_warnings(plan, run)),
        layers=layers,
        activations=activation_rows(plan),
        proof=plan.proof,
        sensitivity=known.sensitivity,
        rounding_samples=plan.rounding_samples,
        rewrites=plan.rewrites,
        loss_without_rewrites=known.loss_without_rewrites,
    )


def _warnings(plan: Plan, run: ModelRun) -> list[str]:
    """What no check fails on, but the user should know."""
    warnings = []
    if run.latency is not None and run.latency.speedup < 1:
        times = f"{run.latency.median_us:,.0f} us against {run.latency.float_median_us:,.0f} us per sample"
        warnings.append(f"slower than the float model: {times}")
    found, promised = run.measured.relative_error, plan.predicted.relative_error
    if found is not None and promised is not None and found > max(_NEGLIGIBLE_ERROR, _SUSPICIOUS_FACTOR * promised):
        warnings.append(
            f"measured error is {found:.2%} of the output's range where {promised:.2%} was predicted;"
            " use more calibration samples, or an error budget"
        )
    unknown = [layer.name for layer in plan.layers if run.realisation and layer.name not in run.realisation.kernels]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        warnings.append(f"layer '{unknown[0]}'{more} not found in the optimised graph; counted as float")
    return warnings
