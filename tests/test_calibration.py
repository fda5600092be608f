"""Calibration data: every source on a real model, what is refused and how, memory, batching."""

from __future__ import annotations

import gc
import io
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from lcpaq_onnx.errors import CalibrationError, UsageError
from lcpaq_onnx.runtime.calibration import CalibrationData, Feed, is_batchable, open_calibration, random_data
from lcpaq_onnx.runtime.session import Session, TensorSpec

HEAD = '<ir_version: 8, opset_import: ["":17]>'
F32 = np.dtype(np.float32)


def session(signature: str) -> Session:
    return Session(parser.parse_model(f"{HEAD} g {signature}"))


@pytest.fixture(scope="module")
def single() -> Session:
    """y = Relu(x), x of 3 features, any number of rows."""
    return session("(float[N,3] x) => (float[N,3] y) { y = Relu(x) }")


@pytest.fixture(scope="module")
def scaled() -> Session:
    """y = x * gain[index]: a tensor of any length, a scalar float, a scalar index."""
    return session(
        """(float[N,T] x, float gain, int64 power) => (float[N,T] y)
        { p = Cast<to=1>(power) g = Pow(gain, p) y = Mul(x, g) }"""
    )


def rows(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 3)).astype(np.float32)


def assert_feeds_equal(data: CalibrationData, expected: list[Feed]) -> None:
    found = list(data)
    assert len(found) == len(expected)
    for feed, want in zip(found, expected, strict=True):
        assert list(feed) == list(want)
        for name in want:
            np.testing.assert_array_equal(feed[name], want[name], strict=True)


# ---- one .npz -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npz_keeps_the_sample_axis(tmp_path: Path, single: Session, save: object, order: str) -> None:
    x = np.array(rows(5), order=order)
    assert callable(save)
    save(tmp_path / "d.npz", x=x, label=np.arange(5))
    data = open_calibration(tmp_path / "d.npz", single.inputs)
    assert data.description == "npz d.npz (5 samples; ignored: label)"
    assert data.sample_count == 5
    for _ in range(2):  # can be read again
        assert_feeds_equal(data, [{"x": x[i : i + 1]} for i in range(5)])
    for feed in data:
        single.run(feed)


def test_take_and_samples(tmp_path: Path, single: Session) -> None:
    x = rows(5)
    np.savez(tmp_path / "d.npz", x=x)
    data = open_calibration(tmp_path / "d.npz", single.inputs, samples=4)
    assert data.description == "npz d.npz (first 4 of 5 samples)"
    assert_feeds_equal(data.take(2), [{"x": x[:1]}, {"x": x[1:2]}])
    assert data.take(None) is data
    assert data.take(100).sample_count == 4
    with pytest.raises(UsageError, match="0 calibration samples"):
        data.take(0)


def test_npz_scalar_goes_with_every_sample(tmp_path: Path, scaled: Session) -> None:
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    np.savez(tmp_path / "d.npz", x=x, gain=np.float32(2), power=np.int64(3))
    data = open_calibration(tmp_path / "d.npz", scaled.inputs)
    assert data.sample_count == 3
    np.testing.assert_array_equal(np.concatenate([scaled.run(feed)["y"] for feed in data]), x * 8)


def test_sole_array_may_have_another_name(tmp_path: Path, single: Session) -> None:
    np.savez(tmp_path / "d.npz", images=rows(2))
    data = open_calibration(tmp_path / "d.npz", single.inputs)
    assert data.description == "npz d.npz (2 samples; 'images' feeds 'x')"
    assert_feeds_equal(data, [{"x": rows(2)[:1]}, {"x": rows(2)[1:]}])


def test_safe_casts_only(tmp_path: Path) -> None:
    model = session("(float[N] f, int64[N] i, uint8[N] u) => (float[N] y) { y = Relu(f) }")
    good = {"f": np.ones(2, ">f8"), "i": np.ones(2, np.int32), "u": np.full(2, 255, np.int64)}
    np.savez(tmp_path / "d.npz", **good)
    feed = next(iter(open_calibration(tmp_path / "d.npz", model.inputs)))
    assert {name: array.dtype.name for name, array in feed.items()} == {"f": "float32", "i": "int64", "u": "uint8"}
    assert all(array.dtype.isnative for array in feed.values())
    bad = [
        ({"f": np.ones(2, np.uint8)}, r"input 'f': uint8 values where the model takes float32\n  try: .*preprocessing"),
        ({"i": np.ones(2, np.float32)}, "input 'i': float32 values where the model takes int64"),
        ({"u": np.full(2, 256)}, "input 'u': values from 256 to 256 do not fit uint8"),
        ({"f": np.full(2, 1e300)}, "1 of 1 values are NaN or infinite in float32"),
        ({"f": np.ones(2, bool)}, "input 'f': bool values"),
        ({"f": np.array(["a", "b"])}, "input 'f': str"),
    ]
    for change, message in bad:
        np.savez(tmp_path / "bad.npz", **{**good, **change})
        with pytest.raises(CalibrationError, match=message):
            list(open_calibration(tmp_path / "bad.npz", model.inputs))


def test_refused_npz(tmp_path: Path, single: Session) -> None:
    def error(**arrays: np.ndarray) -> str:
        np.savez(tmp_path / "d.npz", **arrays)
        with pytest.raises(CalibrationError) as caught:
            list(open_calibration(tmp_path / "d.npz", single.inputs))
        assert caught.value.hint
        return str(caught.value)

    nan = rows(3)
    nan[1, 2] = np.nan
    assert "d.npz', sample 1, input 'x': 1 of 3 values are NaN" in error(x=nan)
    assert "has no array for input 'x'; it has ['X', 'label']" in error(X=nan, label=nan)
    assert "Python objects" in error(x=np.array([{}], object))
    assert "shape [1, 4] where the model takes x: float32[N,3]" in error(x=np.ones((2, 4), np.float32))
    assert "x[None]" in error(x=np.ones(3, np.float32))
    assert "one axis too many" in error(x=np.ones((2, 1, 3), np.float32))
    assert "no samples in npz d.npz" in error(x=np.ones((0, 3), np.float32))
    assert "has no array for input 'x'; it has none" in error()


def test_npz_arrays_must_have_as_many_rows(tmp_path: Path) -> None:
    model = session("(float[N] a, float[N] b) => (float[N] y) { y = Add(a, b) }")
    np.savez(tmp_path / "d.npz", a=np.ones(3, np.float32), b=np.ones(2, np.float32))
    with pytest.raises(CalibrationError, match=r"unlike numbers of samples on axis 0: \{'a': 3, 'b': 2\}"):
        open_calibration(tmp_path / "d.npz", model.inputs)


def test_fixed_batch_is_explained(tmp_path: Path) -> None:
    model = session("(float[8,3] x) => (float[8,3] y) { y = Relu(x) }")
    np.savez(tmp_path / "d.npz", x=rows(16))
    with pytest.raises(CalibrationError, match="fixed batch of 8"):
        list(open_calibration(tmp_path / "d.npz", model.inputs))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_corrupted_npz(tmp_path: Path, single: Session, save: object) -> None:
    buffer = io.BytesIO()
    assert callable(save)
    save(buffer, x=rows(2000))
    content = bytearray(buffer.getvalue())
    content[len(content) // 2] ^= 0xFF
    damaged = {"flipped": bytes(content), "cut": bytes(content[: len(content) // 2]), "text": b"hello", "empty": b""}
    for name, data in damaged.items():
        path = tmp_path / f"{name}.npz"
        path.write_bytes(data)
        with pytest.raises(CalibrationError, match=f"cannot read .*{name}.npz"):
            list(open_calibration(path, single.inputs))


# ---- folders of arrays ----------------------------------------------------------------------------------------------


def test_npz_folder_with_scalars_and_unlike_shapes(tmp_path: Path, scaled: Session) -> None:
    feeds = [
        {"x": np.full((1, i + 1), i, np.float32), "gain": np.array(2, np.float32), "power": np.array(i)}
        for i in range(11)
    ]
    for i, feed in enumerate(feeds):
        np.savez(tmp_path / f"s{i}.npz", **feed, note=np.array("hello"))
    data = open_calibration(tmp_path, scaled.inputs)
    assert data.description == f"npz folder {tmp_path.name} (11 samples; ignored: note)"
    assert_feeds_equal(data, feeds)  # s2 before s10
    np.testing.assert_array_equal(scaled.run(list(data)[3])["y"], np.full((1, 4), 3 * 2**3))
    (tmp_path / "s4.npz").write_bytes(b"")
    with pytest.raises(CalibrationError, match=r"cannot read '.*s4.npz'"):
        list(data)
    np.savez(tmp_path / "s4.npz", x=feeds[0]["x"])
    with pytest.raises(CalibrationError, match=r"s4.npz' has no array for input 'gain', 'power'; it has \['x'\]"):
        list(data)


def test_npy_folder(tmp_path: Path, single: Session, scaled: Session) -> None:
    for i in range(3):
        np.save(tmp_path / f"{i}.npy", rows(i + 1))
    data = open_calibration(tmp_path, single.inputs)
    assert data.description == f"npy folder {tmp_path.name} (3 samples)"
    assert_feeds_equal(data, [{"x": rows(i + 1)} for i in range(3)])
    with pytest.raises(CalibrationError, match=r"one array and the model has 3 inputs"):
        list(open_calibration(tmp_path, scaled.inputs))
    np.save(tmp_path / "1.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(CalibrationError, match="Python objects"):
        list(data)
    (tmp_path / "1.npy").write_bytes(b"text")
    with pytest.raises(CalibrationError, match=r"1.npy': it is not a .npy file"):
        list(data)
    np.savez(tmp_path / "1.npz", x=rows(1))
    with pytest.raises(CalibrationError, match="keep one kind"):
        open_calibration(tmp_path, single.inputs)


def test_paths_that_are_no_data(tmp_path: Path, single: Session) -> None:
    (tmp_path / "a.csv").write_text("1,2")
    for path in (tmp_path, tmp_path / "a.csv", tmp_path / "absent.npz"):
        with pytest.raises(CalibrationError, match=r"try: give a \.npz file"):
            open_calibration(path, single.inputs)


# ---- ONNX test data -------------------------------------------------------------------------------------------------


def test_onnx_test_data(tmp_path: Path, scaled: Session) -> None:
    feeds = [
        {"x": np.full((1, 2), i, np.float32), "gain": np.array(2, np.float32), "power": np.array(i)} for i in range(11)
    ]
    for i, feed in enumerate(feeds):
        (tmp_path / f"test_data_set_{i}").mkdir()
        for k, array in enumerate(feed.values()):
            onnx.save_tensor(numpy_helper.from_array(array), tmp_path / f"test_data_set_{i}/input_{k}.pb")
    data = open_calibration(tmp_path, scaled.inputs)
    assert data.description == f"ONNX test data {tmp_path.name} (11 samples)"
    assert_feeds_equal(data, feeds)
    one = open_calibration(str(tmp_path / "test_data_set_7"), scaled.inputs)
    assert_feeds_equal(one, feeds[7:8])
    (tmp_path / "test_data_set_7/input_1.pb").write_bytes(b"garbage")
    with pytest.raises(CalibrationError, match=r"input_1.pb' is not a TensorProto"):
        list(one)
    (tmp_path / "test_data_set_7/input_1.pb").unlink()
    with pytest.raises(CalibrationError, match=r"holds \['input_0.pb', 'input_2.pb'\]"):
        list(one)


def test_sequence_input_is_refused(tmp_path: Path) -> None:
    model = session("(seq(float[N]) q) => (int64 n) { n = SequenceLength(q) }")
    with pytest.raises(CalibrationError, match=r"input 'q' is a seq\(tensor\(float\)\)"):
        open_calibration(tmp_path, model.inputs)


# ---- Python ---------------------------------------------------------------------------------------------------------


def test_iterables_and_callables(single: Session) -> None:
    feeds = [{"x": rows(i + 1)} for i in range(3)]
    listed = open_calibration(feeds, single.inputs)
    called = open_calibration(lambda: (dict(f, extra=np.zeros(1)) for f in feeds), single.inputs)
    for data in (listed, called, called):
        assert_feeds_equal(data, feeds)
    assert listed.description == "list (3 samples)"
    assert (listed.sample_count, called.sample_count) == (3, None)
    assert listed.fingerprint() == called.fingerprint()
    assert_feeds_equal(open_calibration(listed, single.inputs, samples=2), feeds[:2])
    np.testing.assert_array_equal(next(iter(open_calibration([{"x": [[1.0, 2, 3]]}], single.inputs)))["x"], [[1, 2, 3]])


def test_one_shot_generator_is_spooled(single: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    feeds = [{"x": rows(i + 1)} for i in range(4)]

    def endless() -> Iterator[Feed]:
        while True:
            yield from feeds

    data = open_calibration(endless(), single.inputs, samples=4)
    assert data.description == "generator (4 samples)"
    for _ in range(2):
        assert_feeds_equal(data, feeds)
    assert len(list(tmp_path.iterdir())) == 1
    del data
    gc.collect()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CalibrationError, match="the generator, sample 1, input 'x'"):
        open_calibration((f for f in [feeds[0], {"x": np.ones((1, 4), np.float32)}]), single.inputs)
    with pytest.raises(CalibrationError, match="no samples in tuple_iterator"):
        open_calibration(iter(()), single.inputs)
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_spool_keeps_bfloat16() -> None:
    bf16 = session("(bfloat16[N] x) => (bfloat16[N] y) { y = Identity(x) }")
    data = open_calibration(iter([{"x": np.float32([1, 2.5])}]), bf16.inputs)
    feed = next(iter(data))
    assert feed["x"].dtype.name == "bfloat16"
    np.testing.assert_array_equal(feed["x"].astype(np.float32), [1, 2.5])


def test_refused_python_sources(single: Session) -> None:
    with pytest.raises(CalibrationError, match="a single mapping"):
        open_calibration({"x": rows(2)}, single.inputs)
    with pytest.raises(CalibrationError, match="sample 0 of the list is a ndarray, not a mapping"):
        list(open_calibration([rows(2)], single.inputs))
    with pytest.raises(CalibrationError, match="a int is not calibration data"):
        open_calibration(3, single.inputs)
    with pytest.raises(CalibrationError, match="sample 0 is not an array"):
        list(open_calibration([{"x": [[1.0], [2.0, 3.0]]}], single.inputs))
    exhausted = iter([{"x": rows(1)}])
    data = open_calibration(lambda: exhausted, single.inputs)
    list(data)
    with pytest.raises(CalibrationError, match="a callable must return a fresh iterator"):
        list(data)


def test_fingerprint_sees_every_change(single: Session) -> None:
    def digest(*arrays: np.ndarray) -> str:
        return open_calibration([{"x": a} for a in arrays], single.inputs).fingerprint()

    x = rows(2)
    assert digest(x[:1], x[1:]) == digest(x[:1].copy(), np.asfortranarray(x[1:]))
    assert len({digest(x[:1], x[1:]), digest(x), digest(x[1:], x[:1]), digest(x[:1]), digest(-x)}) == 5


def test_random_data_warns_and_repeats(scaled: Session) -> None:
    inputs = session("(float[N,4] x, int64[2] ids, bool b) => (float[N,4] y) { y = Relu(x) }").inputs
    with pytest.warns(UserWarning, match="random data"):
        data = random_data(inputs, 3, seed=7)
    assert data.description == "random data (seed 7) (3 samples)"
    assert [(f["x"].shape, f["ids"].shape, f["b"].shape) for f in data] == [((1, 4), (2,), ())] * 3
    assert data.fingerprint() == data.fingerprint()
    with pytest.warns(UserWarning, match="random data"):
        assert random_data(inputs, 3, seed=8).fingerprint() != data.fingerprint()
    with pytest.raises(CalibrationError, match=r"x: float32\[N,T\]"):
        random_data(scaled.inputs, 1, 0)


# ---- memory ---------------------------------------------------------------------------------------------------------

PEAK = """
import resource, sys
import numpy as np
from pathlib import Path
from lcpaq_onnx.runtime.calibration import open_calibration
from lcpaq_onnx.runtime.session import TensorSpec
spec = TensorSpec("x", np.dtype(np.float32), (None, 1 << 18))
few = sum(1 for _ in open_calibration(Path(sys.argv[1]), [spec], samples=2))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
many = sum(float(feed["x"][0, 0]) for feed in open_calibration(Path(sys.argv[1]), [spec]))
print(many, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux only")
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_memory_does_not_grow_with_samples(tmp_path: Path, save: object) -> None:
    assert callable(save)
    x = np.zeros((200, 1 << 18), np.float32)  # 1 MB per sample, 200 MB
    x[:, 0] = np.arange(200)
    save(tmp_path / "big.npz", x=x)
    result = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "big.npz")], capture_output=True, text=True, check=True
    )
    total, growth_kilobytes = result.stdout.split()
    assert float(total) == 199 * 200 / 2
    assert int(growth_kilobytes) < 16_000  # two samples had been read before; 200 more would be 200,000


# ---- batches --------------------------------------------------------------------------------------------------------


def test_batches_join_neighbours_of_one_shape_in_order(single: Session) -> None:
    sizes = [1, 1, 1, 2, 2, 1, 1]
    feeds = [{"x": rows(n, seed)} for seed, n in enumerate(sizes)]
    data = open_calibration(feeds, single.inputs)
    batches = list(data.batches(2))
    assert [batch["x"].shape[0] for batch in batches] == [2, 1, 4, 2]
    np.testing.assert_array_equal(
        np.concatenate([batch["x"] for batch in batches]), np.concatenate([f["x"] for f in feeds])
    )
    assert [batch["x"].shape[0] for batch in data.batches(1)] == sizes


def test_samples_with_scalars_stay_alone(scaled: Session) -> None:
    feed = {"x": np.ones((1, 2), np.float32), "gain": np.float32(1), "power": np.int64(1)}
    data = open_calibration([feed] * 3, scaled.inputs)
    assert [batch["x"].shape for batch in data.batches(8)] == [(1, 2)] * 3


@pytest.mark.parametrize(
    ("signature", "expected"),
    [
        ("(float[N,3] x) => (float[N,3] y) { y = Relu(x) }", True),
        ("(float[N,3] x) => (int64[N,1] y) { y = ArgMax<axis=1>(x) }", True),
        ("(float[1,3] x) => (float[1,3] y) { y = Relu(x) }", False),
        ("(float[N,3] x) => (float[A,B] y) <int64[2] s = {1, 3}> { y = Reshape(x, s) }", False),
        ("(float[N,3] x) => (float[A,B] y) <int64[2] s = {-1, 1}> { y = Reshape(x, s) }", True),
        ("(float[N,3] x) => (float[N,3] y) { y = Softmax<axis=0>(x) }", False),
        ("(float[N,3] x) => (float y) { y = ReduceSum<keepdims=0>(x) }", False),
        ("(float[N,3] x) => (float[3,N] y) { y = Transpose(x) }", False),
    ],
)
def test_is_batchable(signature: str, expected: bool, capfd: pytest.CaptureFixture[str]) -> None:
    model = session(signature)
    two = open_calibration([{"x": rows(1, seed)} for seed in range(2)], model.inputs)
    alike = open_calibration([{"x": np.ones((1, 3), np.float32)}] * 3, model.inputs)
    for data in (two, two.take(1), alike):
        assert is_batchable(model, data) is expected
    assert capfd.readouterr() == ("", "")  # trying prints nothing


def test_is_batchable_looks_for_two_of_one_shape(scaled: Session) -> None:
    model = session("(float[N,T] x) => (float[N,T] y) { y = Relu(x) }")
    feeds = [{"x": np.full((1, width), width, np.float32)} for width in (2, 3, 4)]
    assert is_batchable(model, open_calibration(feeds, model.inputs))
    feed = {"x": np.ones((1, 2), np.float32), "gain": np.float32(1), "power": np.int64(1)}
    assert not is_batchable(scaled, open_calibration([feed], scaled.inputs))


def test_spec_of_unknown_rank_takes_any_shape() -> None:
    data = open_calibration([{"x": rows(2)}, {"x": np.float32(1)}], [TensorSpec("x", F32, ())])
    assert [feed["x"].shape for feed in data] == [(2, 3), ()]
