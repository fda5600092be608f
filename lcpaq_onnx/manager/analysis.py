"""Analyses: pure questions about a graph, pulled by type, answered once, forgotten when a rewrite changes the graph.

After MLIR's analysis manager: whoever needs a result asks for it (``analyses.get(ActivationRanges)``), so nobody
declares an order. The options of an analysis are its fields, and an instance is the key of its cached result.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar, cast

from lcpaq_onnx.errors import CalibrationError, LcpaqError, PassError, TargetError
from lcpaq_onnx.manager.options import options_text
from lcpaq_onnx.runtime.resources import Resources

if TYPE_CHECKING:
    from lcpaq_onnx.graph.graph_io import Graph
    from lcpaq_onnx.numeric.losses import LossName, TeacherLoss
    from lcpaq_onnx.runtime.calibration import CalibrationData
    from lcpaq_onnx.tables import RoundingMethod
    from lcpaq_onnx.targets.target import Target

__all__ = ["Analysis", "AnalysisInputs", "AnalysisManager", "AnyAnalysis", "Progress", "SilentProgress"]

R = TypeVar("R")


class Analysis(ABC, Generic[R]):
    """Base of all analyses. A subclass is a frozen dataclass; its fields are its options and must be hashable.

    ``run`` is pure: it does not change the graph, and its result names nodes and tensors instead of holding them, so
    that it stays good for a copy of the graph and can be saved.
    """

    name: ClassVar[str]
    """Unique, kebab-case."""

    @abstractmethod
    def run(self, graph: Graph, analyses: AnalysisManager) -> R:
        """Answer for ``graph``; other analyses are pulled from ``analyses``, data and settings from its ``inputs``."""

    def __str__(self) -> str:
        return options_text(self)


AnyAnalysis = Analysis[Any]


class Progress(Protocol):
    """Where long work reports to; the command line draws a bar."""

    def track(self, label: str, total: int | None) -> AbstractContextManager[Callable[[int], None]]:
        """Open a stretch of ``total`` steps (None: nobody knows); call the value with the number of steps just done."""


class SilentProgress:
    """No reports."""

    @contextmanager
    def track(self, label: str, total: int | None) -> Iterator[Callable[[int], None]]:
        yield lambda steps: None


@dataclass(frozen=True)
class AnalysisInputs:
    """What an analysis may look at besides the graph. ``seed`` starts every random generator. ``rounding``: of weights
    below 8 bits, where their errors are measured. ``resources`` change how fast an analysis is, not what it finds.
    """

    calibration: CalibrationData | None = None
    target: Target | None = None
    loss: LossName | TeacherLoss = "auto"
    seed: int = 0
    rounding: RoundingMethod = "nearest"
    progress: Progress = field(default_factory=SilentProgress, compare=False)
    resources: Resources = field(default_factory=Resources, compare=False)

    def samples(self) -> CalibrationData:
        """The calibration data. Raises CalibrationError when there are none."""
        if self.calibration is None:
            raise CalibrationError("this needs calibration data, and none were given", hint="add --calibration DATA")
        return self.calibration

    def sample_count(self) -> int | None:
        """Number of calibration samples; None where only a reading can tell. Raises CalibrationError as ``samples``."""
        return self.samples().sample_count


@dataclass(frozen=True)
class _Cached:
    """A result and the analyses that it was made from."""

    result: object
    dependencies: frozenset[AnyAnalysis]


class AnalysisManager:
    """Computes analyses of one graph when asked, and keeps the results until ``invalidate``."""

    def __init__(self, graph: Graph, inputs: AnalysisInputs) -> None:
        self.graph = graph
        self.inputs = inputs
        # In order of completion: what an analysis depends on stands before it.
        self._cache: dict[AnyAnalysis, _Cached] = {}
        # What runs now, outermost first, each with what it has asked for so far.
        self._running: dict[AnyAnalysis, set[AnyAnalysis]] = {}

    @property
    def target(self) -> Target:
        """The hardware target. Raises TargetError when there is none."""
        if self.inputs.target is None:
            raise TargetError("this needs a hardware target, and none was given", hint="add --target NAME")
        return self.inputs.target

    @property
    def cached(self) -> tuple[AnyAnalysis, ...]:
        """Analyses whose results are valid now."""
        return tuple(self._cache)

    def get(self, analysis: Analysis[R] | type[Analysis[R]]) -> R:
        """The result of ``analysis``; a class means its instance with default options.

        Raises PassError when the analysis needs options, asks for itself in a circle, or fails; LcpaqErrors of the
        analysis pass through.
        """
        key = _default_instance(analysis) if isinstance(analysis, type) else analysis
        for asking in self._running.values():
            asking.add(key)
        if key not in self._cache:
            self._cache[key] = self._compute(key)
        else:
            # The one who asks depends on all that its answer was made from, too.
            for asking in self._running.values():
                asking.update(self._cache[key].dependencies)
        return cast("R", self._cache[key].result)

    def put(self, analysis: Analysis[R], result: R) -> None:
        """Seed a result that was saved earlier. Cached results that were made from another one fall."""
        self._drop({analysis})
        self._cache[analysis] = _Cached(result, frozenset())

    def invalidate(self, preserves: Collection[type[AnyAnalysis]] = ()) -> None:
        """After a rewrite: all results fall but those of ``preserves`` whose dependencies are all preserved as well."""
        self._drop({key for key in self._cache if type(key) not in preserves})

    def fork(self, graph: Graph) -> AnalysisManager:
        """A manager for ``graph``, a copy of this one's; it starts with all results cached here."""
        other = AnalysisManager(graph, self.inputs)
        other._cache = dict(self._cache)
        return other

    def recompute(self, analysis: Analysis[R]) -> R:
        """What ``analysis`` gives without any cached result; the cache stays as it is. For checking ``preserves``."""
        return AnalysisManager(self.graph, self.inputs).get(analysis)

    def _compute(self, key: AnyAnalysis) -> _Cached:
        if key in self._running:
            running = list(self._running)
            circle = [*running[running.index(key) :], key]
            raise PassError(
                f"analyses ask for each other in a circle: {' -> '.join(map(_text, circle))}",
                hint="one of them must work without the result of the next",
            )
        self._running[key] = set()
        try:
            result = key.run(self.graph, self)
            return _Cached(result, frozenset(self._running[key]))
        except LcpaqError:
            raise
        except Exception as error:
            # Any bug in an analysis, third-party ones included: say which one, keep the cause.
            chain = " -> ".join(map(_text, self._running))
            raise PassError(
                f"analysis {chain} failed: {type(error).__name__}: {error}",
                hint="this is a bug in the analysis; report it with the traceback of the cause (-vv)",
            ) from error
        finally:
            del self._running[key]

    def _drop(self, fallen: set[AnyAnalysis]) -> None:
        self._cache = {
            key: cached
            for key, cached in self._cache.items()
            if key not in fallen and not (cached.dependencies & fallen)
        }


def _text(analysis: AnyAnalysis) -> str:
    """For messages: options that have no text (sets of entries) must not hide what went wrong."""
    try:
        return str(analysis)
    except PassError:
        return analysis.name


def _default_instance(cls: type[Analysis[R]]) -> Analysis[R]:
    needed = [f.name for f in fields(cast("Any", cls)) if f.default is MISSING and f.default_factory is MISSING]
    if needed:
        raise PassError(
            f"analysis '{cls.name}' has no default for {', '.join(needed)}",
            hint=f"ask for an instance: {cls.__name__}({', '.join(f'{name}=…' for name in needed)})",
        )
    return cls()
