"""What setuptools puts into the wheel: a sub-package missing from the list would vanish without an error."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
SETUPTOOLS: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
MOUNTS: dict[str, str] = SETUPTOOLS["package-dir"]


def tree() -> dict[str, Path]:
    """Package name -> folder, for every folder with Python files under the mounted ones."""
    folders = {
        package: [path for path in (ROOT / folder).rglob("*") if path.suffix == ".py"]
        for package, folder in MOUNTS.items()
    }
    return {
        ".".join([package, *file.parent.relative_to(ROOT / MOUNTS[package]).parts]): file.parent
        for package, files in folders.items()
        for file in files
    }


def test_listed_packages_are_the_tree() -> None:
    assert sorted(SETUPTOOLS["packages"]) == sorted(tree()), "update 'packages' in pyproject.toml"


def test_every_folder_is_a_package() -> None:
    assert [name for name, folder in tree().items() if not (folder / "__init__.py").is_file()] == []


@pytest.mark.parametrize("package", sorted(SETUPTOOLS["packages"]))
def test_packages_are_importable_from_their_folder(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__file__ is not None
    assert Path(module.__file__).parent == tree()[package]


def test_data_files_are_declared() -> None:
    declared = SETUPTOOLS["package-data"]
    for package, folder in tree().items():
        present = {path for path in folder.iterdir() if path.suffix in (".toml", ".csv", ".typed")}
        matched = {path for pattern in declared.get(package, ()) for path in folder.glob(pattern)}
        assert present <= matched, f"add {sorted(p.name for p in present - matched)} to package-data of {package}"


def test_the_stub_for_type_checkers_stays_out_of_the_wheel() -> None:
    """Installed, passes.pyi would hide the package lcpaq_onnx.passes; setuptools adds stubs unless told not to."""
    stub = ROOT / "lcpaq_onnx" / "passes.pyi"
    assert stub.is_file()
    assert not any(stub.match(pattern) for pattern in SETUPTOOLS["package-data"]["lcpaq_onnx"])
    assert any(stub.match(pattern) for pattern in SETUPTOOLS["exclude-package-data"]["lcpaq_onnx"])
