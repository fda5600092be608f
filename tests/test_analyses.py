"""Structure of graphs and the analyses that look at them: groups, layers, calibration, errors, costs, memory."""

from __future__ import annotations

import functools
from dataclasses import replace
from itertools import pairwise

import numpy as np
import onnx
import pytest
from analysing import Feed, analyses_of, model_of, singles

from lcpaq_onnx.errors import CalibrationError, PassError, TargetError
from lcpaq_onnx.formats import QFormat
from lcpaq_onnx.graph import graph_io
from lcpaq_onnx.manager.analysis import AnalysisInputs, AnalysisManager
from lcpaq_onnx.numeric.losses import KullbackLeibler, LossName, fitting_loss, relative_squared_error, teacher_loss
from lcpaq_onnx.numeric.rounding import activation_parameters, fake_quantize, round_nearest
from lcpaq_onnx.passes import (
    ActivationRanges,
    BatchSize,
    CalibrationRun,
    CostTables,
    ErrorTables,
    GraphStructure,
    MemoryTimeline,
    RecordedTensors,
)
from lcpaq_onnx.passes.analysis.activation_errors import ActivationErrors
from lcpaq_onnx.passes.analysis.rounding_errors import RoundingErrors, every_entry
from lcpaq_onnx.runtime.session import Session

RNG = np.random.default_rng(0)
UINT8 = QFormat(bits=8, signed=False, symmetric=False)


def floats(*shape: int) -> np.ndarray:
    return (RNG.normal(size=shape) / np.sqrt(max(1, np.prod(shape[1:])))).astype(np.float32)


X = RNG.normal(size=(12, 3, 6, 6)).astype(np.float32)


def of(text: str, x: np.ndarray = X, **constants: np.ndarray) -> AnalysisManager:
    return analyses_of(model_of(text, constants), singles("x", x))


def groups(analyses: AnalysisManager) -> list[tuple[str, ...]]:
    return [group.tensors for group in analyses.get(GraphStructure).groups]


# ---- structure ------------------------------------------------------------------------------------------------------
def test_data_movement_shares_a_group_and_sums_and_concat_do_not() -> None:
    analyses = of(
        """g (float[n, 3, 6, 6] x) => (float[n, 72] y) {
            [add] a = Add(x, x) [cat] b = Concat <axis = 1> (a, x)
            [pool] c = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (b) [cut] d = Slice(c, zero, four, one)
            [flat] e = Flatten(d) [turn] f = Transpose <perm = [1, 0]> (e) [back] h = Transpose <perm = [1, 0]> (f)
            [pad] i = Pad(h, pads, zero_fill) [join] y = Concat <axis = 1> (i, i)
        }""",
        zero=np.array([0]),
        four=np.array([4]),
        one=np.array([1]),
        pads=np.array([0, 0, 0, 0]),
        zero_fill=np.float32(0),
    )
    assert groups(analyses) == [("x",), ("a",), ("b", "c", "d", "e", "f", "h", "i"), ("y",)]


def test_padding_with_another_value_ends_a_group() -> None:
    analyses = of(
        "g (float[n, 3, 6, 6] x) => (float[n, 3, 7, 6] y) { [pad] y = Pad(x, pads, one) }",
        pads=np.array([0, 0, 1, 0, 0, 0, 0, 0]),
        one=np.float32(1),
    )
    assert groups(analyses) == [("x",), ("y",)]


def test_integers_have_no_group() -> None:
    analyses = of("g (float[n, 3, 6, 6] x) => (int64[n, 1, 6, 6] y) { [best] y = ArgMax <axis = 1> (x) }")
    assert groups(analyses) == [("x",)]


@pytest.mark.parametrize(
    ("tail", "fused"),
    [
        ("[act] y = Relu(a)", {"a"}),
        ("[act] y = Clip(a, low, high)", {"a"}),
        ("[act] b = Relu(a) [second] y = Relu(b)", {"a"}),
        ("[act] b = Relu(a) [other] y = Add(a, b)", set()),
        ("[moving] low2 = ReduceMin <keepdims = 0> (x) [act] y = Clip(a, low2)", set()),
        ("[act] y = Sigmoid(a)", set()),
    ],
    ids=["relu", "clip", "twice", "two-readers", "moving-bound", "sigmoid"],
)
def test_only_a_sole_reader_with_fixed_bounds_fuses(tail: str, fused: set[str]) -> None:
    analyses = of(
        f"g (float[n, 3, 6, 6] x) => (float[n, 3, 6, 6] y) {{ [conv] a = Conv(x, w) {tail} }}",
        w=floats(3, 3, 1, 1),
        low=np.float32(0),
        high=np.float32(6),
    )
    structure = analyses.get(GraphStructure)
    assert structure.fused == fused
    (layer,) = structure.layers
    assert layer.raw_output == "a"
    assert layer.output == ("a" if not fused else "b" if "b" in tail else "y")


def test_an_activation_behind_a_graph_output_does_not_fuse() -> None:
    analyses = of(
        "g (float[n, 3, 6, 6] x) => (float[n, 3, 6, 6] a, float[n, 3, 6, 6] y) { [c] a = Conv(x, w) [r] y = Relu(a) }",
        w=floats(3, 3, 1, 1),
    )
    assert analyses.get(GraphStructure).fused == frozenset()


def test_an_activation_inside_a_body_does_not_fuse() -> None:
    model = model_of(
        """g (float[n, 3, 6, 6] x, bool c) => (float[n, 3, 6, 6] y) {
            [conv] a = Conv(x, w)
            [if] y = If (c) <
                then_branch = yes () => (float[n, 3, 6, 6] u) { [i0] u0 = Relu(a) [i1] u = Neg(u0) },
                else_branch = no () => (float[n, 3, 6, 6] v) { [i2] v = Identity(x) }
            >
        }""",
        {"w": floats(3, 3, 1, 1)},
    )
    analyses = analyses_of(model, [{"x": X[:1], "c": np.array(True)}])
    structure = analyses.get(GraphStructure)
    assert structure.fused == frozenset()
    assert structure.layers[0].output == "a"
    assert groups(analyses) == [("x",), ("a",), ("y",)]
    # The conditional reads both: they live until it runs.
    assert [set(step.groups) for step in analyses.get(MemoryTimeline)] == [{"x", "a"}, {"x", "a", "y"}]


def test_layers_name_their_operands() -> None:
    analyses = of(
        """g (float[n, 3, 6, 6] x) => (float[n, 4] y) {
            [conv] a = Conv(x, w, b) [up] c = ConvTranspose <group = 3> (a, wt) [pool] p = GlobalAveragePool(c)
            [flat] f = Flatten(p) [fc] h = Gemm <transB = 1> (f, wg) [product] y = MatMul(h, wm)
        }""",
        w=floats(3, 3, 1, 1),
        b=floats(3),
        wt=floats(3, 2, 1, 1),
        wg=floats(5, 6),
        wm=floats(5, 4),
    )
    layers = {layer.name: layer for layer in analyses.get(GraphStructure).layers}
    assert {name: layer.channel_axis for name, layer in layers.items()} == {
        "conv": 0,
        "up": None,
        "fc": 0,
        "product": 1,
    }
    assert {name: layer.bias for name, layer in layers.items()} == {
        "conv": "b",
        "up": None,
        "fc": None,
        "product": None,
    }
    assert layers["conv"].weight_shape == (3, 3, 1, 1)


def test_a_product_of_two_activations_is_no_layer() -> None:
    analyses = of(
        "g (float[n, 3, 6, 6] x) => (float[n, 3, 6, 6] y) { [mix] t = Transpose(x) [b] u = Transpose(t)"
        " [mm] y = MatMul(x, u) }"
    )
    assert analyses.get(GraphStructure).layers == ()


# ---- recorded tensors and calibration -------------------------------------------------------------------------------
NETWORK = """g (float[n, 3, 6, 6] x) => (float[n, 4] y) {
    [one] a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1) [relu] b = Relu(a)
    [two] c = Conv <pads = [1, 1, 1, 1]> (b, w2) [add] d = Add(c, b) [relu2] e = Relu(d)
    [pool] p = GlobalAveragePool(e) [flat] f = Flatten(p) [fc] y = Gemm <transB = 1> (f, w3, b3)
}"""
WEIGHTS = {
    "w1": floats(8, 3, 3, 3),
    "b1": floats(8),
    "w2": floats(8, 8, 3, 3),
    "w3": 4 * floats(4, 8),
    "b3": floats(4),
}


@functools.cache
def network_with(loss: LossName) -> AnalysisManager:
    return analyses_of(model_of(NETWORK, WEIGHTS), singles("x", X), loss=loss)


@pytest.fixture(scope="module")
def network() -> AnalysisManager:
    return network_with("auto")


def run(feed: Feed, **changed: np.ndarray) -> dict[str, np.ndarray]:
    return Session(model_of(NETWORK, {**WEIGHTS, **changed})).run(feed)


def test_types_and_shapes_are_those_of_one_sample(network: AnalysisManager) -> None:
    recorded = network.get(RecordedTensors)
    assert recorded["x"].shape == (1, 3, 6, 6)
    assert recorded["b"].shape == (1, 8, 6, 6)
    assert recorded["y"].elements == 4
    assert {tensor.dtype for tensor in recorded.values()} == {"float32"}


def test_calibration_sees_every_sample_once(network: AnalysisManager) -> None:
    statistics = network.get(CalibrationRun)
    assert statistics.samples == len(X)
    y = run({"x": X})["y"]
    fitting = fitting_loss([{"y": y}], statistics.output_scale)
    assert isinstance(statistics.loss, KullbackLeibler)
    assert isinstance(fitting, KullbackLeibler)
    assert not statistics.loss.of_probabilities
    # Logits differ in their last digit between batches, the temperature in its second decimal.
    assert statistics.loss.temperature == pytest.approx(fitting.temperature, abs=0.011)
    assert statistics.histograms["y"].minimum == pytest.approx(y.min(), abs=1e-5)
    assert statistics.histograms["x"].maximum == X.max()
    assert statistics.output_scale.range["y"] == pytest.approx(np.ptp(y), rel=1e-5)
    np.testing.assert_allclose(np.concatenate([a["y"] for a in statistics.answers]), y, atol=1e-5)


def test_batches_grow_where_samples_stack_and_not_where_they_do_not(network: AnalysisManager) -> None:
    assert network.get(BatchSize) > 1
    mixing = of("g (float[n, 3, 6, 6] x) => (float[n, 3, 6, 6] y) { [s] s = ReduceSum(x) [a] y = Add(x, s) }")
    assert mixing.get(BatchSize) == 1
    assert mixing.get(CalibrationRun).samples == len(X)


def test_groups_with_infinities_are_left_in_float() -> None:
    analyses = of(
        "g (float[n, 3, 6, 6] x) => (float[n, 3, 6, 6] y) { [mask] m = Mul(x, inf) [low] y = Max(m, x) }",
        inf=np.float32(np.inf),
    )
    assert set(analyses.get(ActivationRanges)) == {"x"}


def test_without_data_or_target_the_error_says_what_to_give() -> None:
    graph = graph_io.load(model_of(NETWORK, WEIGHTS))
    with pytest.raises(CalibrationError, match="needs calibration data"):
        AnalysisManager(graph, AnalysisInputs()).get(RecordedTensors)
    analyses = analyses_of(model_of(NETWORK, WEIGHTS), singles("x", X), target=None)
    with pytest.raises(TargetError, match="needs a hardware target"):
        analyses.get(CostTables)


# ---- errors ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("layer", "weight"), [("one", "w1"), ("two", "w2"), ("fc", "w3")])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("loss", ["auto", "kl-logits", "squared-error"])
def test_rounding_errors_are_those_of_a_model_with_rounded_weights(
    layer: str, weight: str, bits: int, loss: LossName
) -> None:
    network = network_with(loss)
    entry = network.get(RoundingErrors(every_entry(network, (2, 4)), 64))[layer, bits]
    rounded = round_nearest(WEIGHTS[weight], QFormat(bits=bits, axis=0)).dequantized()
    teacher, changed = run({"x": X}), run({"x": X}, **{weight: rounded})
    scale = network.get(CalibrationRun).output_scale
    asked = network.get(CalibrationRun).loss if loss == "auto" else teacher_loss(loss, scale)
    losses = asked(teacher, changed)
    # Sums in another order: 1e-6 of outputs of size 1, which the loss squares.
    assert entry.loss == pytest.approx(losses.mean(), rel=1e-3)
    assert entry.loss_stderr == pytest.approx(losses.std(ddof=1) / np.sqrt(len(X)), rel=1e-3)
    assert entry.squared_error == pytest.approx(relative_squared_error(teacher, changed, scale).mean(), rel=1e-3)


def test_a_loss_that_fails_is_named_with_its_cause() -> None:
    analyses = network_with("auto")

    def broken(teacher: Feed, changed: Feed) -> np.ndarray:
        raise ValueError("no such output")

    inputs = replace(analyses.inputs, loss=broken)  # type: ignore[arg-type]
    entries = every_entry(analyses, (4,))
    with pytest.raises(PassError, match=r"analysis rounding-errors\{.*\} failed: ValueError: no such output"):
        AnalysisManager(analyses.graph, inputs).get(RoundingErrors(entries, 8))


def test_activation_errors_are_those_of_quantizing_that_tensor_alone(network: AnalysisManager) -> None:
    entry = network.get(ActivationErrors(64))["b"][8]
    interval = network.get(ActivationRanges())["b"]
    model = model_of(NETWORK, WEIGHTS)
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    whole.graph.output.append(onnx.ValueInfoProto(name="b"))
    b = Session(whole).run({"x": X})["b"]
    quantized = fake_quantize(b, *activation_parameters(interval.low, interval.high, UINT8), UINT8)
    rest = model_of(
        NETWORK.replace("float[n, 3, 6, 6] x", "float[n, 8, 6, 6] b").replace(
            "[one] a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1) [relu] b = Relu(a)", ""
        ),
        {name: value for name, value in WEIGHTS.items() if name not in ("w1", "b1")},
    )
    session = Session(rest)
    teacher, changed = session.run({"b": b}), session.run({"b": quantized})
    scale = network.get(CalibrationRun).output_scale
    assert entry.squared_error == pytest.approx(relative_squared_error(teacher, changed, scale).mean(), rel=0.02)


@pytest.mark.parametrize("bits", [(), (2, 4), (2, 3, 4, 5, 6, 7, 8)])
def test_error_tables_never_grow_with_bits_and_keep_measured_levels(
    network: AnalysisManager, bits: tuple[int, ...]
) -> None:
    asked = every_entry(network, bits)
    table = network.get(ErrorTables(asked, samples=64))
    assert set(table.layers) == {"one", "two", "fc"}
    for entries in (*table.layers.values(), *table.activations.values()):
        by_width = [entries[bits] for bits in sorted(entries)]
        assert all(a.loss >= b.loss >= 0 for a, b in pairwise(by_width))
        assert all(a.squared_error >= b.squared_error >= 0 for a, b in pairwise(by_width))
        assert by_width[0].loss > 0
    # Each bit halves the step, so errors fall about fourfold; a factor of two either way for the shape of the weights.
    for name, entries in table.layers.items():
        assert 2**2 < entries[6].squared_error / entries[8].squared_error < 2**7, name
    measured = network.get(RoundingErrors(asked, 64))
    for name, width in measured:
        # A width that happens to lose less than a wider one is raised to it.
        level = max(entry.loss for (other, wider), entry in measured.items() if other == name and wider >= width)
        # What twelve samples show is steadied by the other widths and layers, not replaced.
        assert table.layers[name][width].loss == pytest.approx(level, rel=0.25)


@pytest.mark.parametrize("bits", [5, 6])
def test_second_order_predicts_what_was_not_measured(network: AnalysisManager, bits: int) -> None:
    """All layers at one width: the table's sum against the whole model with rounded weights."""
    table = network.get(ErrorTables(samples=64))
    rounded = {
        name: round_nearest(WEIGHTS[name], QFormat(bits=bits, axis=0)).dequantized() for name in ("w1", "w2", "w3")
    }
    scale = network.get(CalibrationRun).output_scale
    measured = relative_squared_error(run({"x": X}), run({"x": X}, **rounded), scale).mean()
    predicted = sum(entries[bits].squared_error for entries in table.layers.values())
    # First order in each layer, no cross terms, twelve samples: the level, not the digit.
    assert 0.25 < predicted / measured < 4


# ---- costs and memory -----------------------------------------------------------------------------------------------
def test_costs_cover_every_legal_format(network: AnalysisManager) -> None:
    costs = network.get(CostTables)
    target = network.target
    for layer in network.get(GraphStructure).layers:
        legal = {str(f) for f in target.layer_formats(layer.op) if f.is_float or f.stored in costs.storage}
        # No layer here is a plain product with a matrix [K, N].
        assert set(costs.layers[layer.name]) == {text for text in legal if "b" not in text}
        assert all(cost.latency_us > 0 for cost in costs.layers[layer.name].values())
    # Multiply-accumulates × 32 × 32 of the float model, and × 8 × 8 in integer kernels.
    macs = {"one": 8 * 27 * 36, "two": 8 * 72 * 36, "fc": 32}
    for name, count in macs.items():
        assert costs.layers[name]["f32"].bops == count * 1024
        assert costs.layers[name]["w4a8"].bops == count * 64
    assert costs.reference.bops == sum(macs.values()) * 1024


def test_stored_bytes_fall_with_bits(network: AnalysisManager) -> None:
    costs = network.get(CostTables)
    sizes = [costs.layers["two"][f"w{bits}a8"].size_bytes for bits in (8, 6, 5, 4, 3)]
    assert sizes == sorted(sizes, reverse=True)
    # 576 weights: an eighth of a byte less each for every bit, give or take nodes and names.
    assert costs.layers["two"]["f32"].size_bytes - costs.layers["two"]["w8a8"].size_bytes > 576 * 3 - 250


def test_float_reference_is_the_file_and_its_stamp(network: AnalysisManager) -> None:
    size = graph_io.serialized_size(network.graph)
    assert 0 < network.get(CostTables).reference.size_bytes - size < 400


def test_memory_steps_hold_what_is_alive(network: AnalysisManager) -> None:
    steps = network.get(MemoryTimeline)
    alive = {step.node: step.groups for step in steps}
    image, maps = 3 * 36, 8 * 36
    # The fused activations' inputs a and d never exist.
    assert alive["one"] == {"x": image}
    assert alive["relu"] == {"b": maps}
    assert alive["two"] == {"b": maps, "c": maps}
    assert alive["fc"] == {"p": 8, "y": 4}
    assert all(step.fixed_bytes == 0 for step in steps)
