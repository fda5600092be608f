"""Which errors to measure: those that the answer depends on.

Second order is a cheap first table. The plan made from it names a width for each layer; the errors at that width and at
the next ones decide whether the plan stands, so they are measured, and planning goes round until nothing new is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lcpaq_onnx.passes import WeightEntry
from lcpaq_onnx.planning.bench import MEASURABLE_BITS, Bench
from lcpaq_onnx.tables import ErrorTable, Measurements, Sensitivity

__all__ = ["Refined", "frontier_entries", "full_analysis", "next_to", "refined"]

# A bound; it ends when nothing new is asked for.
_ROUNDS = 4
_PRICES = 64
# Of the ranking of single errors.
_RELIABLE = 0.8
# Rank correlation of predicted and measured losses of random plans. Of eight plans, where the truth is 0.9, less than
# 0.5 comes by accident 3 times in 100 (drawn from normal pairs); a table of 0.3 is found out 70 times.
_PASSED = 0.5

Chosen = Callable[[Measurements], Collection[WeightEntry]]
"""Measurements → layers with the widths that an answer from them takes."""


@dataclass(frozen=True, eq=False)
class Refined:
    """Measurements, and what of them was measured singly: ``entries``, on ``samples`` samples."""

    measurements: Measurements
    entries: frozenset[WeightEntry]
    samples: int


def refined(bench: Bench, widths: Sequence[int], chosen: Chosen) -> Refined:
    """Measurements by the estimator of the bench's settings, for plans of ``widths``. With ``auto``: measured where
    ``chosen`` says that the answer lies, and next to it; more samples are taken until they rank the measured errors
    reliably. The table is audited at the end, and where it fails every entry is measured.
    """
    estimator, everything = bench.settings.estimator, bench.every_entry(widths)
    counts = bench.sample_counts()
    entries = everything if estimator == "rounding-error" else frozenset[WeightEntry]()
    samples = counts[-1]
    if estimator != "hessian-diagonal":
        for samples in counts:
            if estimator == "auto":
                entries = _settled_entries(bench, widths, chosen, entries, samples)
            if bench.reliability(entries, samples) >= _RELIABLE:
                break
    measurements = bench.with_errors(entries, samples)
    audit = bench.audit(measurements.errors, entries, samples)
    note = ""
    if audit is not None and audit.rank_correlation < _PASSED and entries < everything:
        note = f"the audit of {estimator} gave a rank correlation of {audit.rank_correlation:.2f}, below {_PASSED}"
        estimator, entries = "rounding-error", everything
        measurements = bench.with_errors(entries, samples)
        audit = bench.audit(measurements.errors, entries, samples)
    sensitivity = Sensitivity(estimator, samples, len(entries), len(everything), audit, note)
    return Refined(replace(measurements, sensitivity=sensitivity), entries, samples)


def _settled_entries(
    bench: Bench, widths: Sequence[int], chosen: Chosen, entries: frozenset[WeightEntry], samples: int
) -> frozenset[WeightEntry]:
    """``entries`` and what the answer turns on besides, until it asks for nothing new."""
    everything = bench.every_entry(widths)
    for _ in range(_ROUNDS):
        wanted = next_to(chosen(bench.with_errors(entries, samples)), widths) & everything
        if wanted <= entries:
            break
        entries |= wanted
    return entries


def full_analysis(bench: Bench) -> Measurements:
    """Measurements for plans of any target and budget: with ``auto``, measured along the frontier of error against
    stored bits.
    """
    weights = bench.weights_of_layers()
    found = refined(bench, MEASURABLE_BITS, lambda m: frontier_entries(m.errors, weights, MEASURABLE_BITS))
    return found.measurements


def next_to(chosen: Collection[WeightEntry], widths: Sequence[int]) -> frozenset[WeightEntry]:
    """``chosen`` and for each the next narrower and wider of ``widths``."""
    ordered = sorted(widths)
    return frozenset(
        (layer, ordered[place])
        for layer, bits in chosen
        if bits in ordered
        for place in range(max(0, ordered.index(bits) - 1), min(len(ordered), ordered.index(bits) + 2))
    )


def frontier_entries(errors: ErrorTable, weights: Mapping[str, int], widths: Sequence[int]) -> frozenset[WeightEntry]:
    """What some plan on the frontier of error against stored bits takes: each layer's width of least
    ``error + price · bits`` at any price. ``weights``: number of weights by layer.
    """
    names = [name for name in weights if name in errors.layers]
    if not names:
        return frozenset()
    loss = np.array([[errors.layers[name][bits].loss for bits in widths] for name in names])
    bits = np.array([[weights[name] * width for width in widths] for name in names], np.float64)
    per_bit = (loss / bits)[loss > 0]
    if not per_bit.size:
        return frozenset()
    prices = np.geomspace(per_bit.min() / 16, per_bit.max() * 16, _PRICES)
    taken = (loss[None] + prices[:, None, None] * bits[None]).argmin(axis=2)
    return frozenset((names[layer], widths[column]) for row in taken for layer, column in enumerate(row))
