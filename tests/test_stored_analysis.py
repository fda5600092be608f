"""A whole analysis in the store: what its key holds, and that declared inputs are those of a session."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from lcpaq_onnx import Execution, Settings, compiler
from lcpaq_onnx.errors import CalibrationError
from lcpaq_onnx.graph import graph_io
from lcpaq_onnx.manager.analysis import SilentProgress
from lcpaq_onnx.numeric.losses import SquaredError
from lcpaq_onnx.planning.stored_analysis import analysis_key, remembered
from lcpaq_onnx.runtime.calibration import CalibrationData, open_calibration
from lcpaq_onnx.runtime.declared import declared_inputs
from lcpaq_onnx.runtime.resources import Resources
from lcpaq_onnx.runtime.session import Session
from lcpaq_onnx.store import STORE_FILE, DiskStore, MemoryStore
from lcpaq_onnx.tables import ActivationRange, ErrorEntry, ErrorTable, Measurements

MODELS = Path(__file__).resolve().parents[1] / "models"
MODEL, CALIBRATION = MODELS / "digits_resnet.onnx", MODELS / "digits_calibration.npz"


def some_data(samples: int = 4) -> CalibrationData:
    return open_calibration(CALIBRATION, declared_inputs(graph_io.load(MODEL)), samples=samples)


def some_measurements() -> Measurements:
    table = ErrorTable({"conv": {4: ErrorEntry(0.1 + 0.2, 1e-300, float("inf"))}})
    ranges = {"x": ActivationRange(-1.0, 1.5, -2.0, 1.5, "mse")}
    return Measurements(1, "0.1.0", "00", 12, "npz x.npz (2 samples)", "kl-logits", {}, ranges, {}, table)


# ---- the key --------------------------------------------------------------------------------------------------------
def test_key_holds_all_that_decides_the_analysis() -> None:
    base = analysis_key("00", some_data(), Settings(), Resources())
    assert base == analysis_key("00", some_data(), Settings(), Resources(max_memory_bytes=1 << 20, subject="x"))
    others = [
        analysis_key("01", some_data(), Settings(), Resources()),
        analysis_key("00", some_data(5), Settings(), Resources()),
        analysis_key("00", some_data(), Settings(), Resources(providers=("CUDAExecutionProvider",))),
        *(
            analysis_key("00", some_data(), settings, Resources())
            for settings in (
                Settings(loss="squared-error"),
                Settings(range_method="minmax"),
                Settings(estimator="rounding-error"),
                Settings(sensitivity_samples=8),
                Settings(probes=2),
                Settings(seed=1),
            )
        ),
    ]
    assert None not in others
    assert len({base, *others}) == 1 + len(others)


def test_a_loss_of_the_users_own_has_no_key() -> None:
    assert analysis_key("00", some_data(), Settings(loss=SquaredError((("y", 1.0),))), Resources()) is None


# ---- there and back -------------------------------------------------------------------------------------------------
def test_what_is_remembered_is_equal_to_the_bit_and_made_once() -> None:
    """Infinite standard errors too; the data go by the name that they have now."""
    resources, made = Resources(store=MemoryStore()), []

    def make() -> Measurements:
        made.append(1)
        return some_measurements()

    first = remembered("key", some_data(), resources, SilentProgress(), make)
    again = remembered("key", some_data(), resources, SilentProgress(), make)
    assert len(made) == 1
    assert first == some_measurements()
    assert again == replace(first, calibration=some_data().description)


def test_analyze_with_a_cache_runs_once_and_takes_what_can_be_read_once(tmp_path: Path) -> None:
    execution = Execution(cache=tmp_path, workers="serial")
    settings = Settings(sensitivity_samples=4)
    first = compiler.analyze(MODEL, iter(list(some_data(8))), settings=settings, execution=execution)
    with DiskStore(tmp_path / STORE_FILE) as store:
        assert [(h.subject, h.what, h.entries) for h in store.contents() if h.what == "analysis"] == [
            (MODEL.name, "analysis", 1)
        ]
        before = {h.what: h.entries for h in store.contents()}
    again = compiler.analyze(MODEL, CALIBRATION, samples=8, settings=settings, execution=execution)
    assert replace(again, calibration=first.calibration) == first
    with DiskStore(tmp_path / STORE_FILE) as store:
        assert {h.what: h.entries for h in store.contents()} == before


def test_nothing_is_kept_without_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LCPAQ_CACHE", str(tmp_path / "cache"))
    compiler.analyze(MODEL, some_data(8), settings=Settings(sensitivity_samples=4))
    assert list(tmp_path.iterdir()) == []


# ---- declared inputs ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", sorted(MODELS.glob("*.onnx")), ids=lambda path: path.name)
def test_declared_inputs_of_real_models(path: Path) -> None:
    assert same_inputs(onnx.load(str(path)))


@pytest.mark.parametrize(
    "element",
    [t for t in TensorProto.DataType.values() if 0 < t <= TensorProto.BFLOAT16 and t not in (14, 15)],  # not complex
    ids=TensorProto.DataType.Name,
)
def test_declared_types(element: int) -> None:
    assert same_inputs(model_of([helper.make_tensor_value_info("x", element, ["n", 3])]))


@pytest.mark.parametrize("shape", [[], None, [-1, 0, "", None, "a"]])
def test_declared_shapes(shape: list[int | str | None] | None) -> None:
    assert same_inputs(model_of([helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]))


@pytest.mark.parametrize("ir_version", [3, 8])
def test_initializers_among_the_inputs_need_no_data(ir_version: int) -> None:
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "unused", "w")]
    model = model_of(inputs, [helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0])], ir_version)
    assert [spec.name for spec in declared_inputs(graph_io.load(model))] == ["x", "unused"]
    assert same_inputs(model)


def test_an_input_that_is_no_tensor_is_refused() -> None:
    node = helper.make_node("SequenceLength", ["s"], ["y"])
    inputs = [helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, [1])]
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("y", TensorProto.INT64, [])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    with pytest.raises(CalibrationError, match="input 's' is a sequence, map or optional"):
        open_calibration(CALIBRATION, declared_inputs(graph_io.load(model)))


def model_of(
    inputs: Sequence[onnx.ValueInfoProto], initializers: Sequence[onnx.TensorProto] = (), ir_version: int = 8
) -> onnx.ModelProto:
    output = helper.make_tensor_value_info("y", TensorProto.INT64, None)
    graph = helper.make_graph([helper.make_node("Shape", ["x"], ["y"])], "g", inputs, [output], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=ir_version)


def same_inputs(model: onnx.ModelProto) -> bool:
    """What a session says, but for its text of the type."""
    declared = declared_inputs(graph_io.load(model))
    return declared == tuple(replace(spec, type_name="") for spec in Session(model).inputs)
