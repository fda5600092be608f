"""The error table's ranking of layers against single-layer KL measured directly on other images, width by width."""

from __future__ import annotations

import time
from pathlib import Path

from assets_tasks import Assets, Task
from claims import Claim, table
from curvature_engine import Subject, opened
from curvature_part import Part
from curvature_truth import Truth

import lcpaq_onnx
from lcpaq_onnx.numeric.ranking import rank_correlation
from lcpaq_onnx.passes import ErrorTables
from lcpaq_onnx.runtime.resources import Execution
from lcpaq_onnx.tables import ErrorTable

__all__ = ["run_ranking"]

_TASK = "resnet20"
_WIDTHS = (2, 3, 4, 5, 6, 7, 8)
_LIMITS = {bits: 0.85 if bits == 2 else 0.95 for bits in _WIDTHS}
_SAMPLES, _QUICK_SAMPLES = (32, 64, 128, 256, 1024), (32, 64, 128)
_USUAL = 256


def run_ranking(assets: Assets, store: Path, *, truth_images: int, quick: bool) -> Part:
    """``store``: folder where probes are kept. The claim is for the table of all calibration images; ``quick``: 128."""
    samples = _QUICK_SAMPLES if quick else _SAMPLES
    task = assets.task(_TASK, samples[-1], truth_images)
    subject = Subject.of(task.model, task.calibration)
    truth = _truth(subject, task)
    found: dict[str, dict[int, float]] = {}
    lines = []
    with opened(subject.graph, task.calibration, Execution(cache=store)) as analyses:
        for count in samples:
            start = time.perf_counter()
            errors = analyses.get(ErrorTables(subject.entries(_WIDTHS), count))
            name = f"every entry, {count} images"
            found[name] = _correlations(subject, errors, truth)
            lines.append(_line(name, found[name], time.perf_counter() - start))
    claimed = found[name]
    start = time.perf_counter()
    measurements = lcpaq_onnx.analyze(task.model, task.calibration[:_USUAL])
    name = f"analyze's default, {_images(measurements)} of {_USUAL} images"
    found[name] = _correlations(subject, measurements.errors, truth)
    lines.append(_line(name, found[name], time.perf_counter() - start))
    detail = f"table of every entry from {samples[-1]} images; KL of rounded models on {truth_images} other images"
    claims = [
        Claim(f"{_TASK}: rank correlation of layers at {bits} bits", claimed[bits], ">=", _LIMITS[bits], detail)
        for bits in _WIDTHS
    ]
    header = ("table", *(f"{bits} bits" for bits in _WIDTHS), "s more")
    rows: dict[str, object] = {"correlations": found, "truth": {f"{n} {b}": kl for (n, b), kl in truth.items()}}
    return Part(table(header, lines), rows, claims)


def _truth(subject: Subject, task: Task) -> dict[tuple[str, int], float]:
    entries = sorted(subject.entries(_WIDTHS))
    losses = Truth(subject, task, task.evaluation).kl_of_each([{name: bits} for name, bits in entries])
    return dict(zip(entries, losses, strict=True))


def _correlations(subject: Subject, errors: ErrorTable, truth: dict[tuple[str, int], float]) -> dict[int, float]:
    names = [layer.name for layer in subject.layers]
    return {
        bits: rank_correlation([errors.layers[n][bits].loss for n in names], [truth[n, bits] for n in names])
        for bits in _WIDTHS
    }


def _images(measurements: lcpaq_onnx.Measurements) -> int:
    return measurements.sensitivity.samples if measurements.sensitivity else 0


def _line(name: str, correlations: dict[int, float], seconds: float) -> tuple[str, ...]:
    return (name, *(f"{value:.3f}" for value in correlations.values()), f"{seconds:.1f}")
