"""Every model at hand is read and written without change: the benchmark models and onnx's own thousands."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import onnx
import onnx.backend.test
import onnxruntime as ort
import pytest
from assets import assets_root
from model_equality import canonical
from onnx import numpy_helper
from onnx.backend.test.case.test_case import TestCase

from lcpaq_onnx.graph import graph_io

ASSETS = sorted(assets_root().rglob("*.onnx")) if assets_root() else []
BACKEND_DATA = Path(onnx.backend.test.__file__).parent / "data"
# Field headers with an empty text, and lengths with a needless byte, are not written again.
SLACK_BYTES = 16
# Every n-th operator model runs by default; all of them in the slow test.
STRIDE = 10

Feeds = Mapping[str, object]


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of saves, and none of these tests is about power cuts."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def round_trip(path: Path, folder: Path) -> tuple[onnx.ModelProto, onnx.ModelProto, Path]:
    """Original, model as read from the saved file, and that file; what can be compared without running them is."""
    original, saved = onnx.load(path), folder / "saved.onnx"
    graph = graph_io.load(path)
    graph_io.save(graph, saved)
    again = onnx.load(saved)
    assert canonical(again) == canonical(original)
    assert canonical(graph_io.to_proto(graph_io.copy(graph))) == canonical(original)
    size = saved.stat().st_size
    assert size == graph_io.serialized_size(graph)
    assert abs(size - path.stat().st_size) <= 0.01 * path.stat().st_size + SLACK_BYTES
    assert verdict(saved) == verdict(path)
    return original, again, saved


def verdict(path: Path) -> str:
    """First line of what the checker says."""
    try:
        onnx.checker.check_model(path)
    except onnx.checker.ValidationError as error:
        return str(error).splitlines()[0].replace(path.name, "")
    return "valid"


def session(path: Path) -> ort.InferenceSession | None:
    """None if ONNX Runtime does not run the model."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception:  # the runtime's exceptions have no base class of their own
        return None


def outputs(runner: ort.InferenceSession, feeds: Feeds) -> list[object] | None:
    """None if the run fails."""
    try:
        return list(runner.run(None, dict(feeds)))
    except Exception:  # as above
        return None


def assert_same_outputs(original: Path, saved: Path, feeds: Iterable[Feeds]) -> int:
    """Number of runs compared; outputs must be bit-exact, since it is the same graph."""
    before, after = session(original), session(saved)
    assert (before is None) == (after is None)
    compared = 0
    for feed in feeds if before and after else ():
        wanted, got = outputs(before, feed), outputs(after, feed)
        assert (wanted is None) == (got is None)
        if wanted is not None and got is not None:
            assert_same(got, wanted)
            compared += 1
    return compared


def assert_same(got: object, wanted: object) -> None:
    if isinstance(wanted, (list, tuple)):
        assert isinstance(got, (list, tuple))
        for one, other in zip(got, wanted, strict=True):
            assert_same(one, other)
    elif isinstance(wanted, np.ndarray):
        np.testing.assert_array_equal(got, wanted)
    else:
        assert got == wanted


# ---- benchmark models -----------------------------------------------------------------------------------------------
KINDS = {
    "float": np.float32,
    "float16": np.float16,
    "double": np.float64,
    "int8": np.int8,
    "uint8": np.uint8,
    "int32": np.int32,
    "int64": np.int64,
    "bool": np.bool_,
}


def random_feeds(runner: ort.InferenceSession) -> dict[str, object]:
    """Seeded values by type; unknown extents are 1, but 32 behind the first axis of 4-D inputs."""
    generator = np.random.default_rng(0)
    feeds: dict[str, object] = {}
    for value in runner.get_inputs():
        unknown = [1, 32, 32, 32] if len(value.shape) == 4 else [1] * len(value.shape)
        shape = [n if isinstance(n, int) else u for n, u in zip(value.shape, unknown, strict=True)]
        dtype = KINDS[value.type.removeprefix("tensor(").removesuffix(")")]
        whole = np.issubdtype(dtype, np.integer) or dtype == np.bool_
        values = generator.integers(0, 2, shape) if whole else generator.standard_normal(shape)
        feeds[value.name] = values.astype(dtype)
    return feeds


@pytest.mark.skipif(not ASSETS, reason="no benchmark assets (LCPAQ_ASSETS)")
@pytest.mark.parametrize("path", ASSETS, ids=lambda path: path.stem)
def test_benchmark_model_survives(path: Path, tmp_path: Path) -> None:
    _, _, saved = round_trip(path, tmp_path)
    runner = session(path)
    assert_same_outputs(path, saved, [random_feeds(runner)] if runner else [])


# ---- onnx's own test models -----------------------------------------------------------------------------------------
def stored_feeds(folder: Path, model: onnx.ModelProto) -> Iterator[Feeds]:
    names = [value.name for value in model.graph.input]
    for data in sorted(folder.glob("test_data_set_*")):
        files = sorted(data.glob("input_*.pb"), key=lambda file: int(file.stem.removeprefix("input_")))
        tensors = [onnx.TensorProto.FromString(file.read_bytes()) for file in files]
        yield dict(zip(names, map(numpy_helper.to_array, tensors), strict=False))


def test_stored_backend_models_survive(tmp_path: Path) -> None:
    paths = sorted(BACKEND_DATA.rglob("*.onnx"))
    compared = 0
    for path in paths:
        original, _, saved = round_trip(path, tmp_path)
        compared += assert_same_outputs(path, saved, stored_feeds(path.parent, original))
    # onnx 1.23: 149 files, of which all with data but a few experimental ones run.
    assert len(paths) > 100
    assert compared > 80


@cache
def operator_cases() -> list[TestCase]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reference code overflows on purpose
        from onnx.backend.test.case.node import collect_testcases

        return [case for case in collect_testcases(None) if case.model is not None]


def sweep(cases: Iterable[TestCase], folder: Path) -> int:
    compared = 0
    for case in cases:
        path = folder / "original.onnx"
        path.write_bytes(case.model.SerializeToString())
        _, _, saved = round_trip(path, folder)
        names = [value.name for value in case.model.graph.input]
        feeds = [dict(zip(names, inputs, strict=False)) for inputs, _ in case.data_sets or ()]
        compared += assert_same_outputs(path, saved, feeds)
    return compared


def test_operator_models_survive(tmp_path: Path) -> None:
    assert sweep(islice(operator_cases(), 0, None, STRIDE), tmp_path) > 100


@pytest.mark.slow
def test_all_operator_models_survive(tmp_path: Path) -> None:
    cases = operator_cases()
    assert len(cases) > 1500
    assert sweep(cases, tmp_path) > 1000
