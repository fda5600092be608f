"""The public surface: what ``lcpaq_onnx`` offers, and that offering it costs nothing."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest

import lcpaq_onnx
from lcpaq_onnx.artefacts import read_measurements, write_measurements
from lcpaq_onnx.errors import LcpaqError, UsageError
from lcpaq_onnx.tables import (
    ActivationRange,
    ErrorEntry,
    ErrorTable,
    HessianDiagonal,
    Measurements,
    RecordedTensor,
)

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("numpy", "onnx", "onnxruntime", "onnx_graphsurgeon", "ortools", "pydantic", "rich", "scipy", "networkx")


def run_python(code: str, *, cwd: Path | None = None) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=cwd, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_nothing_heavy() -> None:
    loaded = run_python("import sys, lcpaq_onnx; print(*sys.modules)").split()
    assert not set(HEAVY) & set(loaded)


def test_every_public_name_is_there_and_is_no_module() -> None:
    assert sorted(lcpaq_onnx.__all__) == sorted(set(lcpaq_onnx.__all__))
    for name in lcpaq_onnx.__all__:
        assert not isinstance(getattr(lcpaq_onnx, name), ModuleType), name
    assert set(lcpaq_onnx.__all__) <= set(dir(lcpaq_onnx))


def test_public_names_are_those_that_type_checkers_see() -> None:
    tree = ast.parse(Path(lcpaq_onnx.__file__).read_text(encoding="utf-8"))
    checked = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname or alias.name
        for node in ast.walk(checked)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen | {"__version__"} == set(lcpaq_onnx.__all__)


def test_importing_submodules_first_hides_no_public_name() -> None:
    """A submodule named like a function would take its place as an attribute of the package."""
    run_python(
        """
        import importlib, pkgutil, types
        import lcpaq_onnx
        for module in pkgutil.walk_packages(lcpaq_onnx.__path__, "lcpaq_onnx."):
            if "__main__" not in module.name:
                importlib.import_module(module.name)
        for name in lcpaq_onnx.__all__:
            assert not isinstance(getattr(lcpaq_onnx, name), types.ModuleType), name
        """
    )


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        lcpaq_onnx.quantise  # noqa: B018


def test_version_is_that_of_the_package() -> None:
    assert lcpaq_onnx.__version__ == importlib.metadata.version("lcpaq-onnx")


def test_all_errors_are_public() -> None:
    from lcpaq_onnx import errors

    assert set(errors.__all__) <= set(lcpaq_onnx.__all__)


def test_example_runs(tmp_path: Path) -> None:
    code = (ROOT / "examples" / "quantize_digits.py").read_text(encoding="utf-8")
    (tmp_path / "models").symlink_to(ROOT / "models")
    printed = run_python(code, cwd=tmp_path)
    assert (tmp_path / "digits_small.onnx").stat().st_size <= 0.3 * (
        ROOT / "models" / "digits_resnet.onnx"
    ).stat().st_size
    assert "passed: True" in printed


def test_example_of_an_executor_runs(tmp_path: Path) -> None:
    (tmp_path / "models").symlink_to(ROOT / "models")
    printed = run_python((ROOT / "examples" / "own_executor.py").read_text(encoding="utf-8"), cwd=tmp_path)
    jobs, _, worst = printed.partition(" jobs; most sensitive to 4 bits: ")
    assert int(jobs) >= 11  # a job for each layer at least
    assert worst.startswith("/")


# ---- the measurements' file -----------------------------------------------------------------------------------------
def some_measurements() -> Measurements:
    return Measurements(
        schema=1,
        tool_version="0.1.0",
        source_sha256="00",
        source_size_bytes=1234,
        calibration="npz x.npz (2 samples)",
        loss="kl-logits",
        tensors={"x": RecordedTensor("float32", (1, 3))},
        ranges={"x": ActivationRange(-1.0, 1.5, -2.0, 1.5, "mse")},
        hessian={"conv": HessianDiagonal(3.0, 0.1, 0.03, 2.5, (1.0, 2.0), (0.1, 0.1), 2)},
        errors=ErrorTable({"conv": {4: ErrorEntry(0.1, 0.2, 0.01)}}, {"x": {8: ErrorEntry(1e-300, 0.0)}}),
    )


def test_measurements_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "a.analysis.json"
    write_measurements(some_measurements(), path)
    assert read_measurements(path) == some_measurements()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "is not JSON"),
        ("[]", "analysis schema None"),
        ('{"schema": 2}', "analysis schema 2, this lcpaq reads 1"),
        ('{"schema": 1}', "Field required"),
    ],
)
def test_bad_measurements_are_usage_errors(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "a.analysis.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=expected) as caught:
        read_measurements(path)
    assert "a.analysis.json" in caught.value.message
    assert "lcpaq analyze" in caught.value.hint


def test_wrong_field_of_measurements_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.analysis.json"
    write_measurements(some_measurements(), path)
    data = json.loads(path.read_text(encoding="utf-8"))
    data["errors"]["layers"]["conv"]["4"]["loss"] = "much"
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(UsageError, match=r"errors\.layers\.conv\.4\.loss"):
        read_measurements(path)


def test_missing_measurements_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(LcpaqError, match="No such file"):
        read_measurements(tmp_path / "none.json")
