"""Imports follow the layers: a file imports from its own layer or from those above it, never from below."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Top to bottom. A folder stands for all its files that no longer name lists; "(api)" is lcpaq_onnx/__init__.py.
LAYERS: tuple[frozenset[str], ...] = (
    # L0: values and arithmetic on arrays
    frozenset(
        {
            "budget",
            "errors",
            "formats",
            "manager.options",
            "manager.spec_text",
            "numeric",
            "provenance",
            "signature",
            "store",
            "tables",
        }
    ),
    # L1: the only builders of protobufs, the only importer of onnxruntime
    frozenset({"graph", "runtime"}),
    # L2: data with a schema
    frozenset({"planning.plan", "targets"}),
    # L3
    frozenset({"manager.analysis"}),
    # L4: the machinery of passes
    frozenset({"manager", "manager.registry"}),
    # built on L0 to L4 only, like the passes of third parties
    frozenset({"passes"}),
    # L5: decisions and checks
    frozenset({"allocation", "planning", "verification"}),
    # L6
    frozenset({"(api)", "artefacts", "compiler"}),
    # L7
    frozenset({"__main__", "cli"}),
)
RANK = {module: rank for rank, layer in enumerate(LAYERS) for module in layer}

# The registry reads the two tables of names in passes/__init__.py, which itself imports nothing (tested below).
EXCEPTIONS = {("manager.registry", "passes")}


@dataclass(frozen=True)
class Import:
    """``module``: absolute dotted name; ``typing_only``: under ``if TYPE_CHECKING``."""

    module: str
    line: int
    is_relative: bool
    typing_only: bool


def source_files() -> list[Path]:
    return sorted([*(ROOT / "lcpaq_onnx").rglob("*.py"), *(ROOT / "passes").rglob("*.py")])


def dotted(path: Path) -> str:
    """lcpaq_onnx/graph/ops.py -> lcpaq_onnx.graph.ops; passes/… -> lcpaq_onnx.passes.…"""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "lcpaq_onnx" else ("lcpaq_onnx", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[Import]:
    package = dotted(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guards = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    typing_only = {id(inner) for guard in guards for statement in guard.body for inner in ast.walk(statement)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, False, id(node) in typing_only)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                # "from lcpaq_onnx import compiler" names a module, "from lcpaq_onnx.tables import Cost" does not.
                name = f"{prefix}.{alias.name}" if prefix == "lcpaq_onnx" and alias.name in RANK else prefix
                yield Import(name, node.lineno, node.level > 0, id(node) in typing_only)


def layer_member(module: str) -> str | None:
    """Name of ``module`` in the table; None for what is not ours."""
    parts = module.split(".")
    if parts[0] != "lcpaq_onnx":
        return None
    names = [".".join(parts[1:end]) for end in range(len(parts), 1, -1)]
    return next((name for name in names if name in RANK), names[-1] if names else "(api)")


def violations(path: Path) -> Iterator[str]:
    member = str(layer_member(dotted(path)))
    where = path.relative_to(ROOT)
    for found in imports(path):
        at = f"{where}:{found.line} imports {found.module}"
        imported = str(layer_member(found.module))
        known = member in RANK and imported in RANK and (member, imported) not in EXCEPTIONS
        if known and RANK[imported] > RANK[member]:
            yield f"{at}, which is in a lower layer"
        if found.module.split(".")[0] == "onnxruntime" and member != "runtime":
            yield f"{at}; only lcpaq_onnx/runtime/ may"
        if found.module.split(".")[0] == "onnx" and member not in ("graph", "runtime") and not found.typing_only:
            yield f"{at}; only lcpaq_onnx/graph/ and runtime/ build protobufs"
        if found.module.split(".")[0] == "passes" or (member == "passes" == imported and not found.is_relative):
            yield f"{at}; passes/ is lcpaq_onnx.passes, and its files import each other relatively"
        if found.is_relative and member != "passes":
            yield f"{at}; only files of passes/ import each other relatively"


def test_every_module_is_in_the_table() -> None:
    members = {layer_member(dotted(path)) for path in source_files()}
    missing = sorted(str(member) for member in members - set(RANK))
    assert not missing, (
        f"put the new module(s) {missing} into LAYERS of tests/test_layers.py, in the layer they belong to"
    )


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_layers(path: Path) -> None:
    assert list(violations(path)) == []


def test_the_table_of_passes_imports_nothing() -> None:
    imported = imports(ROOT / "passes" / "__init__.py")
    assert {found.module for found in imported if not found.typing_only} == {"__future__", "importlib", "typing"}


@pytest.mark.parametrize(
    ("file", "text", "complaint"),
    [
        ("lcpaq_onnx/errors.py", "from lcpaq_onnx.planning.plan import Plan", "lower layer"),
        ("lcpaq_onnx/errors.py", "from lcpaq_onnx import compiler", "lower layer"),
        ("lcpaq_onnx/graph/x.py", "def f():\n    import lcpaq_onnx.cli.main", "lower layer"),
        ("passes/rewrite/x.py", "from lcpaq_onnx.allocation.allocate import allocate", "lower layer"),
        ("passes/rewrite/x.py", "from lcpaq_onnx.passes.rewrite.y import Y", "relatively"),
        ("passes/rewrite/x.py", "import onnxruntime as ort", "only lcpaq_onnx/runtime/"),
        ("lcpaq_onnx/planning/plan.py", "from onnx import helper", "build protobufs"),
        ("lcpaq_onnx/errors.py", "from .budget import Budget", "import each other relatively"),
        ("lcpaq_onnx/cli/x.py", "from passes import BUILTIN_PASSES", "lcpaq_onnx.passes"),
    ],
)
def test_the_check_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, text: str, complaint: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="utf-8")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (message,) = violations(path)
    assert complaint in message
    assert file in message


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("lcpaq_onnx/planning/plan.py", "if TYPE_CHECKING:\n    import onnx"),
        ("lcpaq_onnx/planning/plan.py", "import onnx_graphsurgeon as gs"),
        ("lcpaq_onnx/manager/registry.py", "from lcpaq_onnx.passes import BUILTIN_PASSES"),
        (
            "passes/rewrite/x.py",
            "from ..analysis.y import Y\nfrom .z import Z\nfrom lcpaq_onnx.manager.pass_base import Note",
        ),
    ],
)
def test_the_check_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, text: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="utf-8")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert list(violations(path)) == []
