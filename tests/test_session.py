"""Session: what a model declares, runs, and the errors that name ONNX Runtime's reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from lcpaq_onnx.errors import CalibrationError, ModelError, UsageError
from lcpaq_onnx.runtime import session as session_module
from lcpaq_onnx.runtime.session import Session, SessionOptions

HEAD = '<ir_version: 8, opset_import: ["":17]>'


def relu() -> onnx.ModelProto:
    return parser.parse_model(f"{HEAD} g (float[N,3] x) => (float[N,3] y, float[N,3] z) {{ y = Relu(x) z = Neg(x) }}")


def test_inputs_and_outputs_are_typed() -> None:
    model = parser.parse_model(
        f"""{HEAD} g (float[N,3] x, float16[2,?] h, int64 k, string[N] s, float[1] w = {{2}}) => (float[N,3] y)
        {{ y = Mul(x, w) }}"""
    )
    session = Session(model)
    assert [(s.name, s.dtype, s.shape) for s in session.inputs] == [
        ("x", np.dtype(np.float32), ("N", 3)),
        ("h", np.dtype(np.float16), (2, None)),
        ("k", np.dtype(np.int64), ()),
        ("s", np.dtype(np.str_), ("N",)),
    ]
    assert [s.name for s in session.overridable] == ["w"]
    assert str(session.outputs[0]) == "y: float32[N,3]"


def test_types_beyond_numpy() -> None:
    model = parser.parse_model(
        f"""{HEAD} g (bfloat16[N] b, seq(float[N]) q) => (bfloat16[N] c, int64 n)
        {{ c = Identity(b) n = SequenceLength(q) }}"""
    )
    session = Session(model)
    assert session.inputs[0].dtype.name == "bfloat16"
    assert session.inputs[0].is_tensor
    assert not session.inputs[1].is_tensor
    assert session.inputs[1].type_name == "seq(tensor(float))"


def test_run_all_or_some_outputs() -> None:
    session = Session(relu())
    x = np.array([[-1, 0, 2]], np.float32)
    everything = session.run({"x": x})
    assert list(everything) == ["y", "z"]
    np.testing.assert_array_equal(everything["y"], [[0, 0, 2]])
    assert list(session.run({"x": x}, ["z"])) == ["z"]


def test_overridable_initializer_may_be_fed() -> None:
    model = parser.parse_model(f"{HEAD} g (float[N] x, float[1] w = {{2}}) => (float[N] y) {{ y = Mul(x, w) }}")
    session = Session(model)
    x = np.ones(2, np.float32)
    np.testing.assert_array_equal(session.run({"x": x})["y"], [2, 2])
    np.testing.assert_array_equal(session.run({"x": x, "w": np.full(1, 5, np.float32)})["y"], [5, 5])


@pytest.mark.parametrize(
    ("feed", "part"),
    [
        ({}, r"lacks \['x'\]"),
        ({"x": np.zeros((1, 3), np.float32), "q": np.zeros(1)}, r"unknown \['q'\]"),
        ({"x": np.zeros((1, 3))}, r"x: float64\[1, 3\].*expected: \(tensor\(float\)\)"),
        ({"x": np.zeros((1, 4), np.float32)}, r"index: 1 Got: 4 Expected: 3"),
    ],
)
def test_unfit_feeds_are_calibration_errors(
    feed: dict[str, np.ndarray], part: str, capfd: pytest.CaptureFixture[str]
) -> None:
    session = Session(relu())
    with pytest.raises(CalibrationError, match=part):
        session.run(feed)
    assert capfd.readouterr() == ("", "")


def test_unknown_output_and_failing_run_are_model_errors(capfd: pytest.CaptureFixture[str]) -> None:
    session = Session(relu())
    with pytest.raises(ModelError, match=r"no output \['nope'\]"):
        session.run({"x": np.zeros((1, 3), np.float32)}, ["nope"])
    fails = parser.parse_model(
        f"{HEAD} g (float[N] x) => (float[M,2] y) <int64[2] s = {{3, 2}}> {{ y = Reshape(x, s) }}"
    )
    with pytest.raises(ModelError, match="cannot be reshaped"):
        Session(fails).run({"x": np.zeros(5, np.float32)})
    assert capfd.readouterr() == ("", "")


def test_sequence_output_is_refused_by_name() -> None:
    model = parser.parse_model(
        f"{HEAD} g (float[4] x) => (seq(float[2]) q, float[4] y) {{ q = SplitToSequence(x) y = Relu(x) }}"
    )
    session = Session(model)
    x = np.zeros(4, np.float32)
    with pytest.raises(ModelError, match=r"output 'q'.*not a tensor"):
        session.run({"x": x})
    assert list(session.run({"x": x}, ["y"])) == ["y"]


@pytest.mark.parametrize("content", [b"garbage", b""])
def test_unreadable_models(tmp_path: Path, content: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    for source in (path, content):
        with pytest.raises(ModelError, match="ONNX Runtime cannot load") as caught:
            Session(source)
        assert "[ONNXRuntimeError]" not in str(caught.value)
        assert caught.value.hint
    with pytest.raises(ModelError, match="there is no model file"):
        Session(tmp_path / "absent.onnx")
    assert capfd.readouterr() == ("", "")


def test_unknown_operator_names_it() -> None:
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["":17, "vendor":1]> g (float[N] x) => (float[N] y) { y = vendor.Twist(x) }'
    )
    with pytest.raises(ModelError, match=r"vendor:Twist.*\n  try: custom operators"):
        Session(model)


def test_unknown_provider_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="no NopeExecutionProvider"):
        Session(relu(), SessionOptions(providers=("NopeExecutionProvider",)))


def external_model(folder: Path) -> onnx.ModelProto:
    """y = x @ w with w in ``folder/weights.bin``; the proto returned holds the reference only."""
    model = parser.parse_model(f"{HEAD} g (float[N,64] x) => (float[N,64] y) {{ y = MatMul(x, w) }}")
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    onnx.save_model(model, folder / "m.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    return onnx.load(folder / "m.onnx", load_external_data=False)


def test_external_data_by_path_and_by_base_dir(tmp_path: Path) -> None:
    model = external_model(tmp_path)
    assert model.ByteSize() < 1000
    x = np.eye(64, dtype=np.float32)
    by_path = Session(tmp_path / "m.onnx").run({"x": x})["y"]
    by_proto = Session(model, base_dir=tmp_path).run({"x": x})["y"]
    by_bytes = Session(model.SerializeToString(), base_dir=tmp_path).run({"x": x})["y"]
    np.testing.assert_array_equal(by_path, by_proto)
    np.testing.assert_array_equal(by_path, by_bytes)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ModelError, match="external data files beside"):
        Session(tmp_path / "m.onnx")
    with pytest.raises(UsageError, match="base_dir"):
        Session(tmp_path / "m.onnx", base_dir=tmp_path)


def test_proto_above_protobufs_limit_is_never_serialized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "_PROTOBUF_LIMIT_BYTES", 64 * 64 * 4 - 1)
    external_model(tmp_path)
    with pytest.raises(ModelError, match=r"16384 bytes of weights.*\n  try: save it with external data"):
        Session(onnx.load(tmp_path / "m.onnx"))
    Session(tmp_path / "m.onnx")  # a path is read by ONNX Runtime itself


def test_options_reach_onnx_runtime(tmp_path: Path) -> None:
    model = parser.parse_model(f"{HEAD} g (float[N] x) => (float[N] y) {{ a = Neg(x) b = Identity(a) y = Relu(b) }}")
    kept, folded = tmp_path / "none.onnx", tmp_path / "all.onnx"
    Session(model, SessionOptions("none", threads=1, optimized_model_path=kept))
    Session(model, SessionOptions(optimized_model_path=folded, config=(("session.intra_op.allow_spinning", "0"),)))
    unfolded = tmp_path / "off.onnx"
    Session(model, SessionOptions(optimized_model_path=unfolded, disabled_optimizers=("EliminateIdentity",)))
    operators = {path.name: [n.op_type for n in onnx.load(path).graph.node] for path in (kept, folded, unfolded)}
    assert operators == {
        "none.onnx": ["Neg", "Identity", "Relu"],
        "all.onnx": ["Neg", "Relu"],
        "off.onnx": ["Neg", "Identity", "Relu"],
    }
