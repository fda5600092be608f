"""Pipelines as text, and where passes are found by name."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcpaq_onnx.errors import LcpaqError, PassError
from lcpaq_onnx.formats import FLOAT_LAYER, LayerFormat
from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.manager.analysis import Analysis, AnalysisManager
from lcpaq_onnx.manager.pass_base import PassContext, PassResult, RewritePass
from lcpaq_onnx.manager.pipeline import check_names, parse_pipeline, pipeline_text, stop_after
from lcpaq_onnx.manager.registry import Entry, Registry, builtin_registry, installed_registry

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Counting(Analysis[int]):
    name: ClassVar[str] = "counting"
    limit: int = 10

    def run(self, graph: Graph, analyses: AnalysisManager) -> int:
        return min(self.limit, len(graph.nodes))


@dataclass(frozen=True)
class Plain(RewritePass):
    name: ClassVar[str] = "plain"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        return PassResult(modified=False)


@dataclass(frozen=True)
class EveryKind(Plain):
    name: ClassVar[str] = "every-kind"
    count: int
    ratio: float = 0.5
    weights_only: bool = False
    mode: str = "nearest"
    method: Literal["minmax", "mse", "true", 3] = "mse"
    bits: int | None = None
    words: tuple[str, ...] = ("a",)
    axes: tuple[int, ...] = ()
    pair: tuple[int, float] = (1, 2.0)
    maybe_axes: tuple[int, ...] | None = (1,)
    flags: tuple[bool, ...] = (True,)
    text_or_number: int | float | str = 0
    layer: LayerFormat = FLOAT_LAYER
    layers: tuple[LayerFormat, ...] = (LayerFormat(8, 8),)
    source: Counting = field(default_factory=Counting)
    hidden: int = field(default=7, init=False)


REGISTRY = Registry.of(Entry(cls.name, f"{__name__}:{cls.__name__}", "tests") for cls in (Counting, EveryKind, Plain))

LAYER_FORMATS = (
    st.builds(LayerFormat, st.integers(2, 16), st.none() | st.integers(2, 16))
    | st.builds(LayerFormat, st.integers(2, 16), block=st.integers(1, 256))
    | st.just(FLOAT_LAYER)
)
FLOATS = st.floats(allow_nan=False)
EVERY_KIND = st.builds(
    EveryKind,
    count=st.integers(),
    ratio=FLOATS,
    weights_only=st.booleans(),
    mode=st.text(),
    method=st.sampled_from(["minmax", "mse", "true", 3]),
    bits=st.none() | st.integers(),
    words=st.lists(st.text() | st.sampled_from(["none", "true", "1", "1e3", "inf", "", '"', "{}", "a=b", ","])).map(
        tuple
    ),
    axes=st.lists(st.integers()).map(tuple),
    pair=st.tuples(st.integers(), FLOATS),
    maybe_axes=st.none() | st.lists(st.integers()).map(tuple),
    flags=st.lists(st.booleans()).map(tuple),
    text_or_number=st.integers() | FLOATS | st.text(),
    layer=LAYER_FORMATS,
    layers=st.lists(LAYER_FORMATS).map(tuple),
    source=st.builds(Counting, st.integers()),
)


# ---- text and back --------------------------------------------------------------------------------------------------
@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.lists(EVERY_KIND | st.builds(Counting, st.integers()) | st.just(Plain()), max_size=4).map(tuple))
def test_every_pipeline_reads_back(steps: tuple[EveryKind | Counting | Plain, ...]) -> None:
    assert parse_pipeline(pipeline_text(steps), REGISTRY) == steps


@pytest.mark.parametrize("name", list(builtin_registry().entries))
@settings(deadline=None, derandomize=True, max_examples=50)
@given(data=st.data())
def test_every_registered_pass_reads_back(name: str, data: st.DataObject) -> None:
    cls: Any = builtin_registry().load(name)
    hints = get_type_hints(cls)
    values = {f.name: data.draw(st.from_type(hints[f.name]).filter(_has_no_nan), f.name) for f in fields(cls) if f.init}
    try:
        step = cls(**values)
    except LcpaqError:
        return  # the pass itself refuses these options
    assert parse_pipeline(str(step), builtin_registry()) == (step,)


def _has_no_nan(value: object) -> bool:
    values = value if isinstance(value, tuple) else (value,)
    return not any(isinstance(v, float) and math.isnan(v) for v in values)


def test_text_is_short_and_shell_friendly() -> None:
    step = EveryKind(
        3,
        weights_only=True,
        mode="a b",
        axes=(1, 2, 3),
        maybe_axes=None,
        flags=(),
        layer=LayerFormat(4, 8),
        words=("a", "1"),
    )
    assert str(step) == (
        'every-kind{count=3 weights-only=true mode="a b" words=a,"1" axes=1,2,3 maybe-axes=none flags layer=w4a8}'
    )
    assert pipeline_text((Plain(), Counting(), Counting(3))) == "plain,counting,counting{limit=3}"
    assert str(EveryKind(0, source=Counting(2))) == 'every-kind{count=0 source="counting{limit=2}"}'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ()),
        (" plain , plain{ } ", (Plain(), Plain())),
        ("every-kind{count=-1 weights-only}", (EveryKind(-1, weights_only=True),)),
        ("every-kind{ratio=1 count = 2}", (EveryKind(2, ratio=1.0),)),
        ("every-kind{count=1 words=x}", (EveryKind(1, words=("x",)),)),
        ("every-kind{count=1 text-or-number=1e3 axes}", (EveryKind(1, text_or_number=1000.0),)),
        ('every-kind{count=1 mode="\\u00e9\\n}"}', (EveryKind(1, mode="é\n}"),)),
    ],
)
def test_what_may_be_written(text: str, expected: tuple[object, ...]) -> None:
    assert parse_pipeline(text, REGISTRY) == expected


# ---- refusals -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("plian", "no pass or analysis is named 'plian'", "did you mean 'plain'? known: counting, every-kind, plain"),
        ("every-kind", "'every-kind' needs the option count", "every-kind{count=1}"),
        (
            "every-kind{count=1 weight-only=true}",
            "'every-kind' has no option 'weight-only'",
            "did you mean 'weights-only'? known: axes, bits, count, flags, layer, layers, maybe-axes, method, mode",
        ),
        ("every-kind{hidden=1}", "has no option 'hidden'", "known: axes"),
        ("plain{x=1}", "'plain' has no option 'x'", "known: (none)"),
        ("every-kind{count=1.5}", "option 'count' of 'every-kind' is int, but got '1.5'", "every-kind{count=1}"),
        ("every-kind{count=true}", "is int, but got 'true'", ""),
        ("every-kind{count=1,2}", "is int, but got '1,2'", ""),
        ("every-kind{count}", "is int, but got ''", ""),
        ("every-kind{count=none}", "is int, but got 'none'", ""),
        ("every-kind{count=1 ratio=half}", "option 'ratio' of 'every-kind' is float, but got 'half'", ""),
        ("every-kind{count=1 mode=3}", "option 'mode' of 'every-kind' is str, but got '3'", "mode=word"),
        ("every-kind{count=1 weights-only=1}", "is bool, but got '1'", "weights-only=true"),
        ("every-kind{count=1 method=entropy}", "is typing.Literal['minmax', 'mse', 'true', 3], but got 'entropy'", ""),
        ("every-kind{count=1 axes=1,a}", "is tuple[int, ...], but got '1,a'", "axes=1}"),
        ("every-kind{count=1 pair=1}", "is tuple[int, float], but got '1'", ""),
        ("every-kind{count=1 layer=w4c8}", "'w4c8' is not a layer format", "w4a8"),
        ('every-kind{count=1 source="plain"}', "is Counting, but got 'plain'", ""),
    ],
)
def test_options_that_do_not_fit(text: str, message: str, hint: str) -> None:
    with pytest.raises(LcpaqError) as caught:
        parse_pipeline(text, REGISTRY)
    assert message in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("text", "wanted", "column"),
    [
        ("Plain", "a kebab-case name", 1),
        ("plain,", "a kebab-case name", 7),
        ("plain plain", "',' or the end", 7),
        ("plain{a=1", "a kebab-case option or '}'", 10),
        ("plain{a=}", "a value", 9),
        ("plain{a=1,}", "a value", 11),
        ("plain{a_b=1}", "a kebab-case option or '}'", 8),
        ("plain{a=1 a=2}", "option 'a' only once", 12),
        ('plain{a="x}', "a value", 9),
        ('plain{a="\\x"}', "a string in JSON's escapes", 13),
    ],
)
def test_bad_syntax_is_pointed_at(text: str, wanted: str, column: int) -> None:
    with pytest.raises(PassError) as caught:
        parse_pipeline(text, REGISTRY)
    headline, shown, caret = caught.value.message.split("\n")
    assert headline == f"pipeline text: expected {wanted} at column {column}"
    assert shown == f"    {text}"
    assert caret.index("^") - 4 == column - 1


@pytest.mark.parametrize("options", [{"axes": [1]}, {"count": "1"}, {"ratio": math.nan}, {"source": Plain()}])
def test_a_value_without_text_is_refused(options: dict[str, Any]) -> None:
    step = EveryKind(**{"count": 1, **options})
    with pytest.raises(PassError, match=r"of 'every-kind' holds .*, which is not"):
        str(step)


# ---- selecting steps ------------------------------------------------------------------------------------------------
def test_stop_after_cuts_at_the_first_of_that_name() -> None:
    steps = (Plain(), Counting(1), Counting(2), Plain())
    assert stop_after(steps, "counting") == (Plain(), Counting(1))
    with pytest.raises(PassError, match="no step of this pipeline is named 'countin'") as caught:
        stop_after(steps, "countin")
    assert caught.value.hint == "did you mean 'counting'? known: counting, plain"


def test_check_names_accepts_what_is_there() -> None:
    check_names((Plain(),), ["plain"])


# ---- registry -------------------------------------------------------------------------------------------------------
def test_builtin_passes_all_load_and_print() -> None:
    registry = builtin_registry()
    assert {registry.load(name).name for name in registry.entries} == set(registry.entries)


def test_no_builtin_pass_is_forgotten() -> None:
    known = {entry.reference for entry in builtin_registry().entries.values()}
    for path in sorted((ROOT / "passes").glob("*/*.py")):
        module = importlib.import_module(f"lcpaq_onnx.passes.{path.parent.name}.{path.stem}")
        for cls in vars(module).values():
            is_step = isinstance(cls, type) and issubclass(cls, RewritePass | Analysis)
            # With a leading underscore: a module's own intermediate result, which nobody else asks for.
            is_public = is_step and not cls.__name__.startswith("_") and "name" in vars(cls)
            if is_public and cls.__module__ == module.__name__:
                assert f"{module.__name__}:{cls.__name__}" in known, "add it to passes/__init__.py"


def install(folder: Path, package: str, source: str, entry_points: str) -> None:
    """An installed distribution as pip leaves it: a module and a dist-info folder."""
    module = package.replace("-", "_")
    (folder / f"{module}.py").write_text(source, encoding="utf-8")
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[lcpaq_onnx.passes]\n{entry_points}\n", encoding="utf-8")


THIRD_PARTY = """
from dataclasses import dataclass
from typing import ClassVar
from lcpaq_onnx.manager.analysis import Analysis
from lcpaq_onnx.manager.pass_base import PassResult, RewritePass

@dataclass(frozen=True)
class DropDropout(RewritePass):
    name: ClassVar[str] = "drop-dropout"
    ratio: float = 0.0
    def run(self, graph, context):
        return PassResult(modified=False)

@dataclass(frozen=True)
class NodeCount(Analysis[int]):
    name: ClassVar[str] = "node-count"
    def run(self, graph, analyses):
        return len(graph.nodes)

@dataclass
class Thawed(RewritePass):
    name: ClassVar[str] = "thawed"
    def run(self, graph, context):
        return PassResult(modified=False)

@dataclass(frozen=True)
class Abstract(RewritePass):
    name: ClassVar[str] = "abstract"

class Undecorated(DropDropout):
    name: ClassVar[str] = "undecorated"
    more: int = 1

ANSWER = 42
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that Python finds modules and distributions in."""
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_passes_and_analyses_of_an_installed_package(site: Path) -> None:
    install(
        site,
        "third-party",
        THIRD_PARTY,
        "drop-dropout = third_party:DropDropout\nnode-count = third_party:NodeCount",
    )
    registry = installed_registry()
    assert "third_party" not in sys.modules, "looking passes up must not import them"
    steps = parse_pipeline("drop-dropout{ratio=0.25},node-count", registry)
    assert pipeline_text(steps) == "drop-dropout{ratio=0.25},node-count"
    assert isinstance(steps[0], RewritePass)
    assert isinstance(steps[1], Analysis)
    assert set(registry.entries) - set(builtin_registry().entries) == {"drop-dropout", "node-count"}


def test_a_name_clash_names_both_sides(site: Path) -> None:
    builtin = builtin_registry().entries["insert-qdq"]
    install(site, "third-party", THIRD_PARTY, "insert-qdq = third_party:DropDropout")
    with pytest.raises(PassError) as caught:
        installed_registry()
    assert f"two passes are named 'insert-qdq': {builtin.reference} of lcpaq-onnx and " in caught.value.message
    assert caught.value.message.endswith("third_party:DropDropout of third-party")


def test_two_packages_with_one_pass_name(site: Path) -> None:
    for package in ("first-party", "second-party"):
        install(site, package, THIRD_PARTY, f"drop-dropout = {package.replace('-', '_')}:DropDropout")
    with pytest.raises(
        PassError, match="first_party:DropDropout of first-party and second_party:DropDropout of second-"
    ):
        installed_registry()


@pytest.mark.parametrize(
    ("entry_point", "reason"),
    [
        ("drop = third_party:DropDropout", "calls itself 'drop-dropout'; the names must agree"),
        ("thawed = third_party:Thawed", "is not a frozen dataclass"),
        ("undecorated = third_party:Undecorated", "is not a frozen dataclass"),
        ("abstract = third_party:Abstract", "does not define run"),
        ("answer = third_party:ANSWER", "is neither a RewritePass nor an Analysis"),
        ("gone = third_party:Gone", "AttributeError"),
        ("nowhere = no_such_module:Gone", "ModuleNotFoundError"),
    ],
)
def test_what_is_no_pass_is_refused_with_its_package(site: Path, entry_point: str, reason: str) -> None:
    install(site, "third-party", THIRD_PARTY, entry_point)
    registry = installed_registry()
    with pytest.raises(PassError) as caught:
        registry.load(entry_point.split(" ")[0])
    assert reason in caught.value.message
    assert "of third-party" in caught.value.message


def test_names_are_kebab_case() -> None:
    with pytest.raises(PassError, match=r"pass name 'drop_dropout' \(x:Y of tests\) is not kebab-case"):
        Registry.of([Entry("drop_dropout", "x:Y", "tests")])
