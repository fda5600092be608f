"""Probes against whole-model runs, in segments and rounds, and what the store saves of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from analysing import Feed, analyses_of, model_of, rounding_error, singles
from onnx import numpy_helper

from lcpaq_onnx.formats import QFormat
from lcpaq_onnx.graph.query import Layer, nodes_by_name, weight_values
from lcpaq_onnx.graph.subgraph import with_outputs
from lcpaq_onnx.manager.analysis import AnalysisManager
from lcpaq_onnx.numeric.directions import BlockSigns, Direction, Quantizing, Rounding, Signs
from lcpaq_onnx.numeric.hutchinson import LayerProbe
from lcpaq_onnx.numeric.interactions import interactions_of
from lcpaq_onnx.numeric.losses import LossName, relative_squared_error
from lcpaq_onnx.numeric.rounding import activation_parameters, fake_quantize
from lcpaq_onnx.passes import ActivationRanges, BatchSize, GraphStructure
from lcpaq_onnx.passes.analysis.activation_errors import ActivationErrors
from lcpaq_onnx.passes.analysis.prober import Probe, Prober
from lcpaq_onnx.passes.analysis.teacher import teacher_of
from lcpaq_onnx.runtime.calibration import open_calibration
from lcpaq_onnx.runtime.probe import ProbeResult
from lcpaq_onnx.runtime.probe_batches import ProbeBatches
from lcpaq_onnx.runtime.resources import Resources
from lcpaq_onnx.runtime.session import Session
from lcpaq_onnx.runtime.workers import Workers
from lcpaq_onnx.store import MemoryStore

RNG = np.random.default_rng(7)
SAMPLES = 40
UINT8 = QFormat(bits=8, signed=False, symmetric=False)
X = RNG.normal(size=(SAMPLES, 3, 6, 6)).astype(np.float32)


def floats(*shape: int) -> np.ndarray:
    return (RNG.normal(size=shape) / np.sqrt(max(1, np.prod(shape[1:])))).astype(np.float32)


# A residual, a branch with another way round it, a layer in a branch of its own, and three outputs.
NETWORK = """g (float[n, 3, 6, 6] x) => (float[n, 4] y, float[n, 8, 6, 6] e, float[n, 5] z) {
    [one] a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1) [relu] b = Relu(a)
    [two] c = Conv <pads = [1, 1, 1, 1]> (b, w2) [add] d = Add(c, b) [clip] e = Clip(d, low, high)
    [sig] s = Sigmoid(a) [dw] t = Conv <group = 8, pads = [1, 1, 1, 1]> (s, w4) [mul] m = Mul(e, t)
    [pool] p = GlobalAveragePool(m) [flat] f = Flatten(p) [fc] y = Gemm <transB = 1> (f, w3, b3)
    [pool2] q = GlobalAveragePool(x) [flat2] r = Flatten(q) [head] z = MatMul(r, w5)
}"""
WEIGHTS = {
    "w1": floats(8, 3, 3, 3),
    "b1": floats(8),
    "w2": floats(8, 8, 3, 3),
    "low": np.float32(0),
    "high": np.float32(6),
    "w4": 2 * floats(8, 1, 3, 3),
    "w3": 4 * floats(4, 8),
    "b3": floats(4),
    "w5": floats(3, 5),
}
MODEL = model_of(NETWORK, WEIGHTS)
LAYERS = ("one", "two", "dw", "fc", "head")


class Inline(Executor):
    """Runs each job at once, counts them, and fails from job number ``fails_at`` on."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.jobs = 0
        self.fails_at = fails_at
        self._answers: list[object] = []

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        if self.jobs == self.fails_at:
            raise KeyboardInterrupt
        self.jobs += 1
        self._answers.extend(batch.outputs for batch in args[0].batches)
        future: Future[Any] = Future()
        future.set_result(function(*args, **kwargs))
        return future

    @property
    def float_runs(self) -> int:
        """Runs of the float model on a batch: jobs of one run share its outputs."""
        return len({id(outputs) for outputs in self._answers})


def network(
    *,
    loss: LossName = "auto",
    seed: int = 0,
    store: MemoryStore | None = None,
    executor: Inline | None = None,
    memory_bytes: int | None = None,
    x: np.ndarray = X,
    model: onnx.ModelProto = MODEL,
) -> AnalysisManager:
    analyses = analyses_of(model, singles("x", x), loss=loss, seed=seed)
    # With one waiting at most, what has run is what has been handed over.
    workers = Workers(executor, 0) if executor is not None else Workers()
    resources = Resources(workers, store if store is not None else MemoryStore(), memory_bytes)
    return AnalysisManager(analyses.graph, replace(analyses.inputs, resources=resources))


def layers_of(analyses: AnalysisManager) -> dict[str, Layer]:
    return {layer.name: layer for layer in analyses.get(GraphStructure).layers}


def every_probe(analyses: AnalysisManager) -> list[Probe]:
    """Of all kinds, at all layers and groups."""
    seed = analyses.inputs.seed
    directions: tuple[Direction, ...] = (
        Rounding(2),
        Rounding(5),
        Signs(seed, 0),
        Signs(seed, 1),
        BlockSigns(seed, 0, 3),
    )
    weights = [Probe(layer.raw_output, d) for layer in layers_of(analyses).values() for d in directions]
    return [*weights, *ActivationErrors(SAMPLES).probes(analyses.graph, analyses).values()]


def measured(analyses: AnalysisManager, probes: Sequence[Probe], samples: int = SAMPLES) -> dict[Probe, ProbeResult]:
    return Prober(analyses.graph, analyses, samples).measure(probes)


def assert_same(first: dict[Probe, ProbeResult], second: dict[Probe, ProbeResult], *, rtol: float = 0.0) -> None:
    """Equal to the bit, or to within ``rtol`` of the largest."""
    assert first.keys() == second.keys()
    for probe, result in first.items():
        for name, values in vars(result).items():
            other = getattr(second[probe], name)
            if rtol:
                np.testing.assert_allclose(
                    other, values, rtol=0, atol=rtol * np.abs(values).max(initial=0), err_msg=name
                )
            else:
                np.testing.assert_array_equal(other, values, err_msg=f"{name} of {probe}")


def whole_model(analyses: AnalysisManager, layer: str, change: np.ndarray, x: np.ndarray) -> dict[str, np.ndarray]:
    """Outputs of the whole model in which ``layer``'s weight is ``change`` more."""
    found = layers_of(analyses)[layer]
    weight = weight_values(nodes_by_name(analyses.graph)[layer], found)
    changed = onnx.ModelProto()
    changed.CopyFrom(MODEL)
    for tensor in changed.graph.initializer:
        if tensor.name == found.weight:
            tensor.CopyFrom(numpy_helper.from_array(weight + change, tensor.name))
    return Session(changed).run({"x": x})


# ---- against the whole model ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("bits", [2, 6])
def test_rounding_probes_are_whole_model_runs_with_rounded_weights(layer: str, bits: int) -> None:
    analyses = network()
    found = layers_of(analyses)[layer]
    weight = weight_values(nodes_by_name(analyses.graph)[layer], found)
    probe = Probe(found.raw_output, Rounding(bits))
    result = measured(analyses, [probe])[probe]
    teacher = teacher_of(analyses)
    before = Session(MODEL).run({"x": X})
    after = whole_model(analyses, layer, rounding_error(weight, bits, found.channel_axis), X)
    expected = teacher.loss(before, after)
    # Outputs of size 1 differ by float32's 1e-6 in another order of sums; rounding to 6 bits moves them by 1e-3.
    np.testing.assert_allclose(result.loss, expected, rtol=0.02, atol=1e-9)
    assert result.loss.mean() == pytest.approx(expected.mean(), rel=2e-3)
    squared = relative_squared_error(before, after, teacher.scale)
    assert result.squared_error.mean() == pytest.approx(squared.mean(), rel=2e-3)
    assert result.draw.tolist() == list(range(SAMPLES))
    assert expected.min() > 0


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("direction", [Signs(0, 0), BlockSigns(0, 1, 3)])
def test_random_probes_give_every_sample_a_whole_model_of_its_own(layer: str, direction: Signs | BlockSigns) -> None:
    analyses = network()
    found = layers_of(analyses)[layer]
    weight = weight_values(nodes_by_name(analyses.graph)[layer], found)
    probe = Probe(found.raw_output, direction)
    result = measured(analyses, [probe])[probe]
    draws = direction.draws(LayerProbe(weight, found.channel_axis), layer, range(SAMPLES))
    teacher = teacher_of(analyses)
    before = Session(MODEL).run({"x": X})
    for sample in (0, 1, 31, 32, 39):
        one = slice(sample, sample + 1)
        after = whole_model(analyses, layer, draws[sample], X[one])
        (expected,) = teacher.loss({name: value[one] for name, value in before.items()}, after)
        # A quarter of a 4-bit rounding error moves outputs by some 1e-3 of their size, float32 by 1e-6.
        assert result.loss[sample] == pytest.approx(expected, rel=0.02, abs=1e-10)
    assert result.draw.tolist() == list(range(SAMPLES))
    assert result.embedding.shape == (SAMPLES, 0)


@pytest.mark.parametrize("group", ["x", "a", "b", "c", "e", "s", "t", "m", "y", "z"])
def test_quantizing_probes_are_whole_model_runs_with_that_tensor_quantized(group: str) -> None:
    """Behind a Relu or Clip the probe starts before it, where the layer's own probes start: the same figures."""
    analyses = network()
    probes = ActivationErrors(SAMPLES).probes(analyses.graph, analyses)
    result = measured(analyses, [probes[group]])[probes[group]]
    interval = analyses.get(ActivationRanges())[group]
    scale, zero_point = activation_parameters(interval.low, interval.high, UINT8)
    values = X if group == "x" else Session(with_outputs(MODEL, [group])).run({"x": X})[group]
    quantized = fake_quantize(values, scale, zero_point, UINT8)
    # The whole model whose other nodes read the quantized tensor.
    rest = onnx.ModelProto()
    rest.CopyFrom(MODEL)
    del rest.graph.node[:]
    for node in MODEL.graph.node:
        added = rest.graph.node.add()
        added.CopyFrom(node)
        added.input[:] = ["moved" if name == group else name for name in node.input]
    rest.graph.input.append(onnx.helper.make_tensor_value_info("moved", onnx.TensorProto.FLOAT, [None] * values.ndim))
    session = Session(rest)
    teacher = teacher_of(analyses)
    plain, changed = (
        {name: value if name != group else moved for name, value in session.run({"x": X, "moved": moved}).items()}
        for moved in (values, quantized)
    )
    expected = teacher.loss(plain, changed)
    assert result.loss.mean() == pytest.approx(expected.mean(), rel=0.02)
    assert expected.mean() > 0


def test_behind_a_layers_own_relu_the_probe_starts_at_the_layer() -> None:
    """``c`` feeds a sum, ``a`` a Sigmoid too: only what follows a layer alone is moved before its Relu."""
    model = model_of(
        """g (float[n, 3, 6, 6] x) => (float[n, 4, 6, 6] y) {
            [one] a = Conv(x, w1) [relu] b = Relu(a) [two] c = Conv(b, w2) [clip] d = Clip(c, low, high)
            [three] y = Conv(d, w3)
        }""",
        {
            "w1": floats(4, 3, 1, 1),
            "w2": floats(4, 4, 1, 1),
            "w3": floats(4, 4, 1, 1),
            "low": np.float32(-0.2),
            "high": np.float32(0.4),
        },
    )
    analyses = network(model=model)
    probes = ActivationErrors(SAMPLES).probes(analyses.graph, analyses)
    assert {name: probe.start for name, probe in probes.items()} == {"x": "x", "b": "a", "d": "c", "y": "y"}
    plain = {name: Probe(name, probe.direction) for name, probe in probes.items()}
    found = measured(analyses, [*probes.values(), *plain.values()])
    for name in ("b", "d"):
        assert isinstance(probes[name].direction, Quantizing)
        assert found[probes[name]].loss.mean() > 0
        # The same figures go into the next kernel; float32's 1e-6 of outputs that move by 1e-3.
        np.testing.assert_allclose(found[probes[name]].loss, found[plain[name]].loss, rtol=1e-3)


def test_draws_are_bounded_in_memory_and_stay_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    probes = [Probe(layer.raw_output, Signs(0, 0)) for layer in layers_of(network()).values()]
    together = measured(network(), probes)
    # Room for the draws of three samples of the largest layer.
    monkeypatch.setattr("lcpaq_onnx.runtime.probe._DRAW_BYTES", 3 * 4 * WEIGHTS["w2"].size)
    # Kernels sum in another order for another number of groups.
    assert_same(together, measured(network(), probes), rtol=1e-3)


def test_rows_that_do_not_stand_sample_by_sample_share_their_batchs_draw() -> None:
    """Turned round before the layer, a batch of n is n columns of its input."""
    text = """g (float[n, 6, 4] x) => (float[n, 5] y) {
        [turn] t = Transpose <perm = [1, 0, 2]> (x) [fc] h = MatMul(t, w) [sig] s = Sigmoid(h)
        [back] u = Transpose <perm = [1, 0, 2]> (s) [mean] y = ReduceMean <keepdims = 0> (u, axes)
    }"""
    weights = {"w": floats(4, 5), "axes": np.array([1])}
    x = np.random.default_rng(3).normal(size=(40, 6, 4)).astype(np.float32)
    analyses = network(model=model_of(text, weights), x=x, loss="squared-error")
    probe = Probe("h", Signs(0, 0))
    result = measured(analyses, [probe])[probe]
    # Batches of 32 and 8.
    assert result.draw.tolist() == [0] * 32 + [32] * 8
    loss = teacher_of(analyses).loss
    for rows, first in ((slice(0, 32), 0), (slice(32, 40), 32)):
        (draw,) = Signs(0, 0).draws(LayerProbe(weights["w"], 1), "fc", [first])
        before, after = (
            Session(model_of(text, {**weights, "w": w})).run({"x": x[rows]})
            for w in (weights["w"], weights["w"] + draw)
        )
        np.testing.assert_allclose(result.loss[rows], loss(before, after), rtol=0.02)


# ---- memory ---------------------------------------------------------------------------------------------------------
def in_batches_of(
    size: int, memory_bytes: int | None, probes: Sequence[Probe]
) -> tuple[dict[Probe, ProbeResult], Inline]:
    executor = Inline()
    analyses = network(executor=executor, memory_bytes=memory_bytes)
    analyses.put(BatchSize(), size)
    return measured(analyses, probes), executor


def test_segments_give_what_one_segment_gives() -> None:
    probes = every_probe(network())
    starts = {probe.start for probe in probes}
    whole, at_once = in_batches_of(8, None, probes)
    # Chunks of 32 and of 8 samples: the float model runs four batches and one; a start runs on both in one job.
    assert (at_once.jobs, at_once.float_runs) == (len(starts), 5)
    # All tensors of a sample take 16 kB; a third of 600 kB holds what some starts read of 32 samples, but not of all.
    found, limited = in_batches_of(8, 600_000, probes)
    assert limited.jobs == at_once.jobs
    assert limited.float_runs >= 8 + 1
    # The same batches, draws and suffixes. But where the float model also returns an inner tensor, its kernels are
    # fused otherwise and sum in another order: float32 outputs move in their last digit, by 1e-6 of changes of 1e-3.
    assert_same(whole, found, rtol=5e-3)


def test_rounds_give_what_one_round_gives() -> None:
    probes = every_probe(network())
    starts = {probe.start for probe in probes}
    whole, _ = in_batches_of(8, None, probes)
    # Room for one batch with what one start reads.
    found, limited = in_batches_of(8, 100_000, probes)
    assert limited.jobs > 3 * len(starts)
    assert_same(whole, found, rtol=5e-3)


def test_one_batch_is_always_run() -> None:
    probes = [Probe("a", Rounding(3)), Probe("c", Signs(0, 0))]
    assert_same(measured(network(), probes), measured(network(memory_bytes=1), probes), rtol=5e-3)


# ---- the store ------------------------------------------------------------------------------------------------------
def test_what_was_measured_is_not_measured_again() -> None:
    store, executor = MemoryStore(), Inline()
    first = network(store=store, executor=executor)
    probes = every_probe(first)
    found = measured(first, probes)
    jobs = executor.jobs
    again = network(store=store, executor=executor)
    assert_same(found, measured(again, probes))
    assert executor.jobs == jobs > 0


def test_more_samples_measure_only_the_new_chunk() -> None:
    store, executor = MemoryStore(), Inline()
    probes = every_probe(network())
    starts = len({probe.start for probe in probes})
    few = measured(network(store=store, executor=executor), probes, 32)
    assert executor.jobs == starts
    many = measured(network(store=store, executor=executor), probes, 40)
    assert executor.jobs == 2 * starts
    for probe, result in few.items():
        np.testing.assert_array_equal(many[probe].loss[:32], result.loss)
        assert len(many[probe].loss) == 40
    assert_same(many, measured(network(), probes, 40))


def test_another_direction_at_a_start_measures_that_one_only() -> None:
    store = MemoryStore()
    measured(network(store=store), [Probe("a", Rounding(4))])
    executor = Inline()
    found = measured(network(store=store, executor=executor), [Probe("a", Rounding(4)), Probe("a", Rounding(3))], 32)
    assert executor.jobs == 1
    assert_same(found, measured(network(), list(found), 32))


def test_what_was_measured_in_other_batches_is_found() -> None:
    """How many samples run at once depends on the memory that is free just now."""
    store, executor = MemoryStore(), Inline()
    probes = [probe for probe in every_probe(network()) if isinstance(probe.direction, Rounding | Quantizing)]
    for loss in ("auto", "squared-error"):
        first = network(store=store, loss=loss)
        found = measured(first, probes)
        again = network(store=store, executor=executor, memory_bytes=200_000, loss=loss)
        assert again.get(BatchSize) < first.get(BatchSize)
        assert_same(found, measured(again, probes))
    assert executor.jobs == 0


def changed_weight() -> onnx.ModelProto:
    w2 = WEIGHTS["w2"].copy()
    w2.flat[5] = np.nextafter(w2.flat[5], np.float32(9))
    return model_of(NETWORK, {**WEIGHTS, "w2": w2})


def changed_sample() -> np.ndarray:
    x = X.copy()
    x.flat[77] = np.nextafter(x.flat[77], np.float32(9))
    return x


@pytest.mark.parametrize(
    "change",
    [{"model": changed_weight()}, {"x": changed_sample()}, {"loss": "squared-error"}, {"x": X[::-1].copy()}],
    ids=["weight", "sample", "loss", "order"],
)
def test_another_question_is_never_answered_from_old_entries(change: dict[str, Any]) -> None:
    store, executor = MemoryStore(), Inline()
    probes = every_probe(network(loss="kl-logits"))
    measured(network(loss="kl-logits", store=store), probes, 32)
    asked = {"loss": "kl-logits", **change}
    found = measured(network(**asked, store=store, executor=executor), probes, 32)
    assert executor.jobs == len({probe.start for probe in probes})
    assert_same(found, measured(network(**asked), probes, 32))


def test_another_seed_draws_and_measures_again() -> None:
    store = MemoryStore()
    first, second = (
        measured(network(seed=seed, store=store), [Probe("a", Signs(seed, 0)), Probe("a", Rounding(4))])
        for seed in (0, 1)
    )
    assert not np.array_equal(first[Probe("a", Signs(0, 0))].loss, second[Probe("a", Signs(1, 0))].loss)
    np.testing.assert_array_equal(first[Probe("a", Rounding(4))].loss, second[Probe("a", Rounding(4))].loss)


def test_losses_of_the_users_own_are_never_mixed_up() -> None:
    """Two functions look alike from outside; one that is gone can even leave its address to the next."""
    store, probe = MemoryStore(), Probe("a", Rounding(4))

    def scaled(factor: float) -> float:
        analyses = network(store=store)

        def own(teacher: Feed, changed: Feed) -> np.ndarray:
            return factor * np.abs(changed["y"] - teacher["y"]).mean(axis=1)

        inputs = replace(analyses.inputs, loss=own)  # type: ignore[arg-type]
        result = measured(AnalysisManager(analyses.graph, inputs), [probe])[probe]
        assert result.embedding.shape == (SAMPLES, 0)
        return float(result.loss.mean())

    assert [scaled(2.0), scaled(3.0)] == pytest.approx([2 * scaled(1.0), 3 * scaled(1.0)])


@pytest.mark.parametrize("finished", [1, 5, 9])
def test_an_interruption_keeps_what_is_finished(finished: int) -> None:
    store, executor = MemoryStore(), Inline(fails_at=finished)
    probes = every_probe(network())
    jobs = len({probe.start for probe in probes})
    with pytest.raises(KeyboardInterrupt):
        measured(network(store=store, executor=executor), probes)
    assert executor.jobs == finished
    rest = Inline()
    found = measured(network(store=store, executor=rest), probes)
    assert rest.jobs == jobs - finished
    # The rest is cut into other segments of the same graph.
    assert_same(measured(network(), probes), found, rtol=1e-3)


# ---- chunks ---------------------------------------------------------------------------------------------------------
def test_chunks_double_and_do_not_depend_on_how_many_samples_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.arange(200, dtype=np.float32)[:, None]
    data = open_calibration(
        singles("x", x), Session(model_of("g (float[n, 1] x) => (float[n, 1] y) { y = Relu(x) }", {})).inputs
    )
    all_of_them = ProbeBatches(data, 1000, 20)
    assert [(chunk.first, chunk.samples) for chunk in all_of_them.chunks] == [(0, 32), (32, 32), (64, 64), (128, 72)]
    assert all_of_them.samples == 200
    assert ProbeBatches(data, 64, 7).chunks == all_of_them.chunks[:2]
    assert ProbeBatches(data, 63, 20).chunks[1] != all_of_them.chunks[1]
    # Large data are read again.
    monkeypatch.setattr("lcpaq_onnx.runtime.probe_batches._KEPT_BYTES", 4 * 40)
    again = ProbeBatches(data, 1000, 20)
    for chunk in all_of_them.chunks:
        batches = again.of(chunk)
        assert [(batch.first, batch.samples) for batch in batches] == [
            (batch.first, batch.samples) for batch in all_of_them.of(chunk)
        ]
        rows = np.concatenate([batch.feed["x"] for batch in batches])
        np.testing.assert_array_equal(rows, x[chunk.first : chunk.first + chunk.samples])
        assert max(batch.samples for batch in batches) <= 20


# ---- draws ----------------------------------------------------------------------------------------------------------
def test_draws_depend_neither_on_chunks_nor_on_batches() -> None:
    probes = [Probe(start, d) for start in ("a", "c", "t", "z") for d in (Signs(0, 0), BlockSigns(0, 0, 4))]
    whole = measured(network(), probes, 40)
    in_small_batches = measured(network(memory_bytes=200_000), probes, 40)
    fewer = measured(network(), probes, 7)
    for probe, result in whole.items():
        assert result.draw.tolist() == in_small_batches[probe].draw.tolist() == list(range(40))
        # Another draw would be another figure altogether.
        np.testing.assert_allclose(in_small_batches[probe].loss, result.loss, rtol=0.02, atol=1e-10)
        np.testing.assert_allclose(fewer[probe].loss, result.loss[:7], rtol=0.02, atol=1e-10)
    assert len({result.loss[0] for result in whole.values()}) == len(whole)


# ---- embeddings -----------------------------------------------------------------------------------------------------
# A head of 200 classes is projected to 128 numbers.
WIDE = model_of(
    """g (float[n, 3, 6, 6] x) => (float[n, 200] y) {
        [one] a = Conv <pads = [1, 1, 1, 1]> (x, w1) [relu] b = Relu(a) [two] c = Conv <pads = [1, 1, 1, 1]> (b, w2)
        [add] d = Add(c, b) [relu2] e = Relu(d) [pool] p = GlobalAveragePool(e) [flat] f = Flatten(p)
        [fc] y = Gemm <transB = 1> (f, w3)
    }""",
    {"w1": floats(8, 3, 3, 3), "w2": floats(8, 8, 3, 3), "w3": 4 * floats(200, 8)},
)
SMALL = model_of(
    """g (float[n, 3, 6, 6] x) => (float[n, 6] y) {
        [one] a = Conv <pads = [1, 1, 1, 1]> (x, w1) [sig] b = Sigmoid(a) [two] c = Conv <pads = [1, 1, 1, 1]> (b, w2)
        [add] d = Add(c, b) [sig2] e = Sigmoid(d) [pool] p = GlobalAveragePool(e) [flat] f = Flatten(p)
        [fc] y = Gemm <transB = 1> (f, w3)
    }""",
    {"w1": floats(8, 3, 3, 3), "w2": floats(8, 8, 3, 3), "w3": 4 * floats(6, 8)},
)


@pytest.mark.parametrize("model", [MODEL, WIDE, SMALL], ids=["three outputs", "wide", "small"])
@pytest.mark.parametrize("loss", ["auto", "kl-logits", "squared-error"])
def test_half_an_embeddings_square_is_the_loss_of_a_small_change(model: onnx.ModelProto, loss: LossName) -> None:
    analyses = network(model=model, loss=loss)
    probes = [Probe(layer.raw_output, Rounding(8)) for layer in layers_of(analyses).values()]
    # Second order: what is left at 8 bits. A squared error is its own second order. More than 128 numbers are projected
    # and right on average (standard deviation of one sample's square: sqrt(2 / 128) = 12 %).
    tolerance = {id(WIDE): 0.3, id(MODEL): 0.05, id(SMALL): 1e-4 if loss == "squared-error" else 0.05}[id(model)]
    for result in measured(analyses, probes).values():
        half = 0.5 * (result.embedding.astype(np.float64) ** 2).sum(axis=1)
        assert half.mean() == pytest.approx(result.loss.mean(), rel=tolerance)
        assert result.embedding.shape[1] <= 128


@pytest.mark.parametrize(("model", "tolerance"), [(SMALL, 0.02), (WIDE, 0.1)], ids=["small", "projected"])
def test_cross_terms_predict_the_loss_of_two_layers_together(model: onnx.ModelProto, tolerance: float) -> None:
    """Smooth and exact: within 2 % (design.md: 1.3 %). With Relus and 200 classes in 128 numbers: within 10 %."""
    analyses = network(model=model, loss="kl-logits", x=X)
    layers = layers_of(analyses)
    nodes = nodes_by_name(analyses.graph)
    direction = Rounding(6)
    probes = {name: Probe(layer.raw_output, direction) for name, layer in layers.items()}
    found = measured(analyses, list(probes.values()))
    gram = interactions_of({(name, "w6"): found[probe].embedding for name, probe in probes.items()})
    teacher = teacher_of(analyses)
    before = Session(model).run({"x": X})
    changed = {
        name: weight_values(nodes[name], layer)
        + rounding_error(weight_values(nodes[name], layer), direction.bits, layer.channel_axis)
        for name, layer in layers.items()
    }
    for pair in (("one", "two"), ("two", "fc"), ("one", "fc"), ("one", "two", "fc")):
        both = onnx.ModelProto()
        both.CopyFrom(model)
        for tensor in both.graph.initializer:
            owner = next((name for name in pair if layers[name].weight == tensor.name), None)
            if owner is not None:
                tensor.CopyFrom(numpy_helper.from_array(changed[owner], tensor.name))
        loss = teacher.loss(before, Session(both).run({"x": X})).mean()
        predicted = gram.loss_of([(name, "w6") for name in pair])
        assert predicted == pytest.approx(loss, rel=tolerance), pair
