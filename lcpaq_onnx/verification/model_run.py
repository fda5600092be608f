"""Runs the emitted model beside the float one: numerics, kernels, measured error, paired timing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lcpaq_onnx.errors import CalibrationError, LcpaqError, ModelError
from lcpaq_onnx.graph.written import WrittenModel
from lcpaq_onnx.numeric.losses import LossName, TeacherLoss
from lcpaq_onnx.planning.plan import Plan
from lcpaq_onnx.runtime.calibration import CalibrationData, is_batchable
from lcpaq_onnx.runtime.kernels import Realisation, open_observed, realised_kernels
from lcpaq_onnx.runtime.session import Session, SessionOptions
from lcpaq_onnx.runtime.stopwatch import PairedTiming, time_once_each, time_pair
from lcpaq_onnx.tables import Sensitivity
from lcpaq_onnx.targets.target import Target
from lcpaq_onnx.verification.measure import MeasuredError, Reference, measure_error
from lcpaq_onnx.verification.report import FLOAT_BITS, INTEGER_BITS, Check, LatencyMeasure, Totals
from lcpaq_onnx.verification.run_checks import fusion_check, kernel_checks, macs_of
from lcpaq_onnx.verification.teacher import Answers, reference_of, tensor_outputs

if TYPE_CHECKING:
    import onnx

__all__ = ["Known", "ModelRun", "VerifyJob", "VerifyOptions", "run_model"]

_FEW_SAMPLES = 4
_MOST_SAMPLES = 64
_BATCH = 16


@dataclass(frozen=True)
class VerifyOptions:
    """``samples``: calibration samples for the measured error; None: all where the plan has an error budget, else at
    most 64. ``timing_s``: seconds for the paired timing, and as many for loading, 0 for none. ``threads``: of all
    sessions.
    """

    samples: int | None = None
    timing_s: float = 1.0
    threads: int = 1


@dataclass(frozen=True, eq=False)
class Known:
    """What the caller has already, so that it need not be measured again. ``macs``: by layer, one sample.
    ``measured``: error of the very model that is emitted, against ``reference`` with the loss ``loss_name`` (all three
    or none). ``sensitivity``: how the plan's errors were found. ``loss_without_rewrites``: measured for the best plan
    that has none. ``base_dir``: folder of the external data of an original given as proto. ``emitted_name``: file name
    for the report, where the emitted file is a temporary one.
    """

    macs: Mapping[str, int] | None = None
    measured: MeasuredError | None = None
    reference: Reference | None = None
    loss_name: str = ""
    base_dir: Path | None = None
    emitted_name: str = ""
    sensitivity: Sensitivity | None = None
    loss_without_rewrites: float | None = None


@dataclass(frozen=True, eq=False)
class VerifyJob:
    """All that verification works on; ``written`` is the file ``emitted``, read back."""

    original: Path | onnx.ModelProto
    emitted: Path
    written: WrittenModel
    data: CalibrationData
    plan: Plan
    target: Target
    loss: LossName | TeacherLoss
    options: VerifyOptions
    known: Known


@dataclass(frozen=True, eq=False)
class ModelRun:
    """What running showed. Where the emitted model does not run, only ``checks`` is filled. Sizes are not measured."""

    checks: tuple[Check, ...]
    warnings: tuple[str, ...] = ()
    measured: Totals = field(default_factory=Totals)
    float_measured: Totals = field(default_factory=Totals)
    latency: LatencyMeasure | None = None
    realisation: Realisation | None = None
    macs: Mapping[str, int] = field(default_factory=dict)
    loss_name: str = ""
    samples: int = 0


def run_model(job: VerifyJob) -> ModelRun:
    """Raises ModelError or CalibrationError where the float model does not run; a failure of the emitted one is a
    failed check.
    """
    options = SessionOptions(threads=job.options.threads)
    base_dir = None if isinstance(job.original, Path) else job.known.base_dir
    reference = Session(job.original, options, base_dir=base_dir)
    first = next(iter(job.data))
    reference.run(first, tensor_outputs(reference))
    try:
        session, optimized = open_observed(job.emitted, options)
        # A feed that the float model takes and this one refuses is this one's fault.
        session.run(first, tensor_outputs(session))
    except (ModelError, CalibrationError) as error:
        return _failed(error)
    try:
        unfused = Session(job.emitted, SessionOptions("none", threads=job.options.threads))
        return _measure(job, reference, session, unfused, optimized)
    except ModelError as error:
        return _failed(error)


def _failed(error: LcpaqError) -> ModelRun:
    return ModelRun((Check(name="loads-and-runs", passed=False, detail=error.message),))


def _measure(
    job: VerifyJob, reference: Session, session: Session, unfused: Session, optimized: WrittenModel
) -> ModelRun:
    first = next(iter(job.data))
    batch_size = _BATCH if is_batchable(reference, job.data) and is_batchable(session, job.data) else 1
    few = next(job.data.batches(min(_FEW_SAMPLES, batch_size)))
    error, compare, loss_name = _error(job, reference, session, batch_size)
    names = tensor_outputs(reference)
    expected, fused, plain = (s.run(few, names) for s in (reference, session, unfused))
    layers = {layer.name: layer.weight for layer in job.plan.layers}
    realisation = realised_kernels(optimized, job.written, layers)
    macs = job.known.macs
    macs = macs_of(job.emitted, job.written, job.plan, first) if macs is None else macs
    kernels = kernel_checks(job.plan, realisation, job.written, macs)
    is_target = job.target.runtime.name == "onnxruntime"
    timing = load_ms = None
    if job.options.timing_s > 0:
        timing = time_pair(lambda: reference.run(first, names), lambda: session.run(first, names), job.options.timing_s)
        load_ms = _load_ms(job)
    return ModelRun(
        checks=(
            Check(name="loads-and-runs", passed=True, detail=f"{error.samples} calibration samples"),
            fusion_check(expected, fused, plain, decides=compare.decides),
            *(kernels if is_target else ()),
        ),
        # What ONNX Runtime does with a file for another runtime is no failure of the file.
        warnings=()
        if is_target
        else tuple(f"in ONNX Runtime, which is not the target: {c.detail}" for c in kernels if not c.passed),
        measured=Totals(
            latency_us=timing.second_median_us if timing else None,
            load_ms=load_ms[1] if load_ms else None,
            bops=_bops(realisation, macs),
            loss=error.loss,
            loss_stderr=error.loss_stderr,
            relative_error=error.relative_error,
            agreement=error.agreement,
        ),
        float_measured=Totals(
            latency_us=timing.first_median_us if timing else None,
            load_ms=load_ms[0] if load_ms else None,
            bops=float(sum(macs.values()) * FLOAT_BITS**2),
        ),
        latency=_latency(timing) if timing else None,
        realisation=realisation,
        macs=macs,
        loss_name=loss_name,
        samples=error.samples,
    )


def _error(
    job: VerifyJob, reference: Session, session: Session, batch_size: int
) -> tuple[MeasuredError, Reference, str]:
    known = job.known
    if known.measured is not None and known.reference is not None:
        return known.measured, known.reference, known.loss_name
    has_error_budget = any(text.startswith("error") for text in job.plan.budgets)
    samples = job.options.samples or (None if has_error_budget else _MOST_SAMPLES)
    answers = Answers(reference, job.data.take(samples), batch_size)
    compare, loss_name = reference_of(answers, job.loss)
    return measure_error(session, answers, compare), compare, loss_name


def _load_ms(job: VerifyJob) -> tuple[float, float]:
    """Of the float and of the emitted model, each from the form it is given in."""
    options = SessionOptions(threads=job.options.threads)
    base_dir = None if isinstance(job.original, Path) else job.known.base_dir

    def original() -> None:
        Session(job.original, options, base_dir=base_dir)

    def emitted() -> None:
        Session(job.emitted, options)

    return time_once_each(original, emitted, job.options.timing_s)


def _bops(realisation: Realisation, macs: Mapping[str, int]) -> float:
    """Bit operations of the kernels that really run: integer ones multiply 8 × 8 bits, all others 32 × 32."""
    bits = {name: INTEGER_BITS if realisation.is_integer(name) else FLOAT_BITS for name in macs}
    return float(sum(count * bits[name] ** 2 for name, count in macs.items()))


def _latency(timing: PairedTiming) -> LatencyMeasure:
    return LatencyMeasure(
        rounds=timing.rounds,
        float_median_us=timing.first_median_us,
        float_minimum_us=timing.first_minimum_us,
        median_us=timing.second_median_us,
        minimum_us=timing.second_minimum_us,
        speedup=timing.speedup,
        speedup_low=1 / timing.ratio_high,
        speedup_high=1 / timing.ratio_low,
    )
