"""Ranges chosen tensor by tensor: which are worth measuring, and which measured one is taken."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from analysing import analyses_of, model_of, singles

from lcpaq_onnx.formats import QFormat
from lcpaq_onnx.graph import graph_io
from lcpaq_onnx.manager.analysis import AnalysisManager
from lcpaq_onnx.numeric.ranges import StreamingHistogram, range_candidates
from lcpaq_onnx.passes import ActivationRanges, RangeCandidates
from lcpaq_onnx.passes.analysis.activation_errors import ActivationErrors
from lcpaq_onnx.passes.analysis.prober import Prober
from lcpaq_onnx.passes.analysis.quantizing_probes import QuantizingProbes
from lcpaq_onnx.planning.bench import Settings
from lcpaq_onnx.planning.opening import open_bench
from lcpaq_onnx.runtime.resources import Resources
from lcpaq_onnx.runtime.workers import SERIAL, Workers, open_workers
from lcpaq_onnx.store import MemoryStore
from lcpaq_onnx.store.packing import Arrays

EIGHT = QFormat(bits=8, signed=False, symmetric=False)
SAMPLES = 24


def histogram_of(values: np.ndarray) -> StreamingHistogram:
    histogram = StreamingHistogram()
    histogram.update(np.asarray(values, np.float32))
    return histogram


# ---- what a histogram says ------------------------------------------------------------------------------------------
def test_a_histogram_without_a_choice_has_one_candidate() -> None:
    values = np.random.default_rng(3).uniform(-1, 3, size=30_000)
    assert [one.method for one in range_candidates(histogram_of(values), EIGHT)] == ["mse"]
    assert len(range_candidates(StreamingHistogram(), EIGHT)) == 1


def test_outliers_are_worth_a_question() -> None:
    values = np.random.default_rng(4).normal(size=30_000)
    values[7] = 40
    found = range_candidates(histogram_of(values), EIGHT)
    assert [one.method for one in found] == ["mse", "percentile 99.99"]
    # One value in 30,000 more than makes up for the finer steps of all others: by itself the histogram keeps it.
    assert found[0].high > 30
    assert found[1].high < 5


# ---- what the output says -------------------------------------------------------------------------------------------
def network(outlier: float) -> tuple[onnx.ModelProto, np.ndarray]:
    """Sums of 8 normal features at 12 x 12 places. One sample has a value of 40 in feature 5, which counts ``outlier``
    times as much as others do.
    """
    rng = np.random.default_rng(5)
    x = rng.normal(size=(SAMPLES, 8, 12, 12)).astype(np.float32)
    x[9, 5, 3, 4] = 40
    weight = rng.normal(size=(4, 8, 1, 1)).astype(np.float32)
    weight[:, 5] *= outlier
    text = "g (float[n, 8, 12, 12] x) => (float[n, 4, 12, 12] y) { [conv] y = Conv(x, w) }"
    return model_of(text, {"w": weight}), x


def of(outlier: float, workers: Workers = SERIAL) -> AnalysisManager:
    model, x = network(outlier)
    analyses = analyses_of(model, singles("x", x))
    return AnalysisManager(analyses.graph, replace(analyses.inputs, resources=Resources(workers)))


def errors_by_method(analyses: AnalysisManager, group: str) -> dict[str, float]:
    probes = QuantizingProbes(analyses.graph, analyses)
    asked = {one.method: probes.of(group, one) for one in analyses.get(RangeCandidates("auto"))[group]}
    found = Prober(analyses.graph, analyses, SAMPLES).measure(list(asked.values()))
    return {method: found[probe].entry().squared_error for method, probe in asked.items()}


@pytest.mark.parametrize(("outlier", "taken"), [(0.0, "percentile 99.99"), (1.0, "mse")])
def test_outliers_are_clipped_where_the_output_does_not_read_them(outlier: float, taken: str) -> None:
    analyses = of(outlier)
    measured = errors_by_method(analyses, "x")
    assert len(measured) > 1
    assert analyses.get(ActivationRanges("auto", samples=SAMPLES))["x"].method == taken
    assert taken == min(measured, key=lambda method: measured[method])


def test_the_error_of_a_group_is_that_of_the_range_it_gets() -> None:
    analyses = of(0.0)
    entry = analyses.get(ActivationErrors(SAMPLES, "auto"))["x"][8]
    chosen = analyses.get(ActivationRanges("auto", samples=SAMPLES))["x"].method
    assert entry.squared_error == errors_by_method(analyses, "x")[chosen]
    plain = analyses.get(ActivationErrors(SAMPLES, "mse"))["x"][8]
    # Steps of 8 standard deviations instead of 44.
    assert entry.squared_error < 0.1 * plain.squared_error


def test_a_difference_within_noise_changes_nothing() -> None:
    """Two samples that disagree are no reason to clip."""
    analyses = of(0.0)
    found = analyses.get(ActivationRanges("auto", samples=1))["x"]
    assert found.method == "mse"


def test_probabilities_keep_all_their_values() -> None:
    analyses = analyses_of(
        model_of("g (float[n, 8] x) => (float[n, 8] z) { [soft] y = Softmax(x) [two] z = Add(y, x) }", {}),
        singles("x", np.random.default_rng(7).normal(scale=4, size=(40, 8)).astype(np.float32)),
    )
    found = analyses.get(ActivationRanges("auto", samples=16))["y"]
    assert (found.low, found.high, found.method) == (found.minimum, found.maximum, "minmax")


def test_workers_do_not_change_what_is_chosen() -> None:
    with open_workers("threads:2") as workers:
        threaded = of(0.0, workers).get(ActivationRanges("auto", samples=SAMPLES))
    assert threaded == of(0.0).get(ActivationRanges("auto", samples=SAMPLES))


class Counting(MemoryStore):
    """How many results came in."""

    results = 0

    def put(self, key: str, arrays: Arrays, *, subject: str, what: str) -> None:
        self.results += 1
        super().put(key, arrays, subject=subject, what=what)


def test_without_sensitivities_the_first_candidates_are_taken_and_nothing_is_probed() -> None:
    model, x = network(0.0)
    store = Counting()
    bench = open_bench(graph_io.load(model), singles("x", x), None, Settings(), None, Resources(store=store))
    assert {one.method for one in bench.ranges_only().ranges.values()} == {"mse"}
    assert store.results == 0
    assert bench.with_errors((), SAMPLES).ranges["x"].method == "percentile 99.99"
