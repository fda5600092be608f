"""Model files: external data, atomic writing, and the errors for files that cannot be read or written."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from lcpaq_onnx.errors import ModelError
from lcpaq_onnx.graph import graph_io

ROWS, COLUMNS = 40, 30


def weights() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype(np.float32)


def model() -> onnx.ModelProto:
    """y = x·w + b, b too small for external data."""
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w", "b"], ["y"])],
        "gemm",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, ROWS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, COLUMNS])],
        [numpy_helper.from_array(weights(), "w"), numpy_helper.from_array(np.ones(COLUMNS, np.float32), "b")],
    )
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)])


def external_model(folder: Path, data_name: str = "weights.bin") -> Path:
    """The same, written by onnx with its weights in a file of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    onnx.save(model(), path, save_as_external_data=True, location=data_name, size_threshold=1024)
    return path


def run(path: Path) -> np.ndarray:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"x": np.ones((2, ROWS), np.float32)})
    return np.asarray(result)


def expected() -> np.ndarray:
    return np.ones((2, ROWS), np.float32) @ weights() + 1


def edit_location(path: Path, key: str, value: str) -> None:
    proto = onnx.load(path, load_external_data=False)
    for entry in proto.graph.initializer[0].external_data:
        if entry.key == key:
            entry.value = value
    path.write_bytes(proto.SerializeToString())


# ---- external data --------------------------------------------------------------------------------------------------
def test_external_data_are_not_opened_at_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = external_model(tmp_path)
    opened: list[str] = []

    def record(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open":
            opened.append(str(arguments[0]))

    sys.addaudithook(record)
    graph = graph_io.load(path)
    proto = graph_io.to_proto(graph_io.copy(graph))
    assert not [name for name in opened if name.endswith("weights.bin")]
    np.testing.assert_array_equal(graph.nodes[0].inputs[1].values, weights())
    assert [name for name in opened if name.endswith("weights.bin")]
    opened.clear()
    assert proto.graph.initializer[0].external_data[0].value == "weights.bin"
    assert graph.base_dir == tmp_path


def test_external_data_come_inside_when_they_fit(tmp_path: Path) -> None:
    graph = graph_io.load(external_model(tmp_path / "in"))
    out = tmp_path / "out" / "model.onnx"
    out.parent.mkdir()
    graph_io.save(graph, out)
    assert [file.name for file in out.parent.iterdir()] == ["model.onnx"]
    assert out.stat().st_size == graph_io.serialized_size(graph)
    onnx.checker.check_model(out, full_check=True)
    np.testing.assert_allclose(run(out), expected(), rtol=1e-5)  # summation order only


@pytest.mark.parametrize("source", [lambda folder: model(), external_model])
def test_large_model_becomes_a_pair_of_files(source: Callable[[Path], Path | onnx.ModelProto], tmp_path: Path) -> None:
    graph = graph_io.load(source(tmp_path / "in"))
    graph.nodes[0].inputs[2].values = np.ones((COLUMNS,), np.float32)
    out = tmp_path / "out" / "large.onnx"
    out.parent.mkdir()
    graph_io.save(graph, out, external_data_above_bytes=1000)
    assert sorted(file.name for file in out.parent.iterdir()) == ["large.onnx", "large.onnx.data"]
    assert out.stat().st_size == graph_io.serialized_size(graph, external_data_above_bytes=1000) + len("large") - len(
        "model"
    )
    assert (out.parent / "large.onnx.data").read_bytes() == weights().tobytes()
    onnx.checker.check_model(out, full_check=True)
    os.rename(out.parent, tmp_path / "moved")
    np.testing.assert_allclose(run(tmp_path / "moved" / "large.onnx"), expected(), rtol=1e-5)  # summation order only


def test_tensors_of_a_pair_are_aligned_and_packed(tmp_path: Path) -> None:
    graph = graph_io.load(model())
    nibbles = np.arange(3001).astype(ml_dtypes.int4)
    graph.nodes[0].inputs.append(graph_io.constant("nibbles", nibbles))
    path = tmp_path / "pair.onnx"
    graph_io.save(graph, path, external_data_above_bytes=0)
    stored = {tensor.name: tensor for tensor in onnx.load(path, load_external_data=False).graph.initializer}
    places = {entry.key: entry.value for entry in stored["nibbles"].external_data}
    assert places == {"location": "pair.onnx.data", "offset": "8192", "length": "1501"}
    again = graph_io.load(path)
    np.testing.assert_array_equal(again.nodes[0].inputs[3].values, nibbles)
    np.testing.assert_array_equal(numpy_helper.to_array(onnx.load(path).graph.initializer[2]), nibbles)
    graph_io.save(again, tmp_path / "pair2.onnx", external_data_above_bytes=0)
    assert (tmp_path / "pair2.onnx.data").read_bytes() == (tmp_path / "pair.onnx.data").read_bytes()


def test_overwriting_ones_own_external_data(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    graph_io.save(graph_io.load(model()), path, external_data_above_bytes=0)
    graph = graph_io.load(path)
    graph.nodes[0].inputs[1].name = "renamed"
    graph_io.save(graph, path, external_data_above_bytes=0)
    np.testing.assert_allclose(run(path), expected(), rtol=1e-5)  # summation order only
    # The graph still refers to the file that is gone now.
    with pytest.raises(ModelError, match="'w', has changed since the model was loaded"):
        graph.nodes[0].inputs[1].values  # noqa: B018 - reading is the point
    with pytest.raises(ModelError, match="has changed"):
        graph_io.to_proto(graph)


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/hostname", "a/../../weights.bin", "C:\\x", "..\\x", ""])
def test_external_data_outside_the_folder_are_refused(location: str, tmp_path: Path) -> None:
    path = external_model(tmp_path / "in")
    (tmp_path / "weights.bin").write_bytes(bytes(ROWS * COLUMNS * 4))
    edit_location(path, "location", location)
    with pytest.raises(ModelError, match=r"tensor 'w' has its data in .*, outside the model's folder"):
        graph_io.load(path)


def test_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    path = external_model(tmp_path / "in")
    os.replace(tmp_path / "in" / "weights.bin", tmp_path / "elsewhere.bin")
    (tmp_path / "in" / "weights.bin").symlink_to(tmp_path / "elsewhere.bin")
    with pytest.raises(ModelError, match="outside the model's folder"):
        graph_io.load(path)


def test_model_linked_from_a_cache_brings_its_linked_data(tmp_path: Path) -> None:
    blobs = external_model(tmp_path / "blobs").parent
    (tmp_path / "snapshot").mkdir()
    for name in ("model.onnx", "weights.bin"):
        (tmp_path / "snapshot" / name).symlink_to(blobs / name)
    graph = graph_io.load(tmp_path / "snapshot" / "model.onnx")
    np.testing.assert_array_equal(graph.nodes[0].inputs[1].values, weights())


def test_missing_external_data_name_file_and_tensor(tmp_path: Path) -> None:
    path = external_model(tmp_path)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ModelError, match=r"tensor 'w' should be in .*weights\.bin") as error:
        graph_io.load(path)
    assert "put the file weights.bin next to the model" in error.value.hint


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("offset", "4096", "ends at byte"),
        ("length", "8", "needs 4800 bytes, its external data say 8"),
        ("offset", "-4", "have the offset '-4'"),
    ],
)
def test_external_data_that_do_not_fit_are_refused(key: str, value: str, message: str, tmp_path: Path) -> None:
    path = external_model(tmp_path)
    edit_location(path, key, value)
    with pytest.raises(ModelError, match=message):
        graph_io.load(path)


def test_external_data_need_a_folder(tmp_path: Path) -> None:
    proto = onnx.load(external_model(tmp_path), load_external_data=False)
    with pytest.raises(ModelError, match="given without a folder"):
        graph_io.load(proto)


# ---- reading --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("content", [b"", b"no model at all", b"\x08\x0a", model().SerializeToString()[:-100]])
def test_file_that_is_no_model_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"broken\.onnx \(\d+ bytes\)") as error:
        graph_io.load(path)
    assert error.value.hint


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="No such file"):
        graph_io.load(tmp_path / "none.onnx")
    with pytest.raises(ModelError, match="directory"):
        graph_io.load(str(tmp_path))


def test_unknown_types_are_refused() -> None:
    proto = model()
    proto.graph.initializer[0].data_type = 99
    with pytest.raises(ModelError, match="tensor 'w' has the data type 99"):
        graph_io.load(proto)
    proto = model()
    proto.graph.input[0].type.tensor_type.elem_type = 99
    with pytest.raises(ModelError, match="tensor 'x' has the data type 99"):
        graph_io.load(proto)


def test_payload_of_the_wrong_length_is_an_error_when_read() -> None:
    proto = model()
    proto.graph.initializer[0].raw_data = b"\0" * 12
    graph = graph_io.load(proto)
    with pytest.raises(ModelError, match=r"'w' of shape .* cannot be decoded"):
        graph.nodes[0].inputs[1].values  # noqa: B018 - reading is the point


# ---- writing --------------------------------------------------------------------------------------------------------
def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("failing_call", [1, 2, 3])  # old data aside, new data, new model
def test_failed_renaming_leaves_the_old_pair(
    failing_call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.onnx"
    graph = graph_io.load(model())
    graph_io.save(graph, path, external_data_above_bytes=0)
    before = content(tmp_path)
    graph.nodes[0].inputs[1].values = weights() * 2
    calls = 0
    replace = os.replace

    def failing(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == failing_call:
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(ModelError, match=r"model\.onnx cannot be written: Permission denied"):
            graph_io.save(graph, path, external_data_above_bytes=0)
    assert calls >= failing_call
    assert content(tmp_path) == before
    graph_io.save(graph, path, external_data_above_bytes=0)
    assert set(content(tmp_path)) == set(before)


def test_failed_renaming_of_a_new_pair_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def failing(source: Path, target: Path) -> None:
        if str(target).endswith(".onnx"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(ModelError, match="No space left"):
        graph_io.save(graph_io.load(model()), tmp_path / "model.onnx", external_data_above_bytes=0)
    assert not content(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="needs file size limits")
@pytest.mark.parametrize("external_data_above_bytes", [0, 10**9])
def test_full_disk_leaves_the_old_file(external_data_above_bytes: int, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    graph_io.save(graph_io.load(model()), path)
    before = content(tmp_path)
    script = f"""
import resource
from lcpaq_onnx.errors import ModelError
from lcpaq_onnx.graph import graph_io
graph = graph_io.load({str(path)!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
try:
    graph_io.save(graph, {str(path)!r}, external_data_above_bytes={external_data_above_bytes})
except ModelError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "model.onnx cannot be written: File too large" in result.stdout
    assert content(tmp_path) == before


def test_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="No such file or directory") as error:
        graph_io.save(graph_io.load(model()), tmp_path / "none" / "model.onnx")
    assert "existing folder" in error.value.hint


def test_graph_that_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    graph = graph_io.load(model())
    graph_io.save(graph, path)
    before = content(tmp_path)
    graph.nodes[0].attrs["alpha"] = object()
    with pytest.raises(ModelError, match="attribute 'alpha' cannot be written"):
        graph_io.save(graph, path)
    assert content(tmp_path) == before
