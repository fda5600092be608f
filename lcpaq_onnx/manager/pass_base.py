"""What a rewriting pass is: a frozen dataclass of options that edits a graph, says whether it did, and if not, why."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from lcpaq_onnx.errors import PassError
from lcpaq_onnx.manager.analysis import AnalysisInputs, AnalysisManager, AnyAnalysis
from lcpaq_onnx.manager.options import options_text

if TYPE_CHECKING:
    from lcpaq_onnx.graph.graph_io import Graph
    from lcpaq_onnx.planning.plan import Plan
    from lcpaq_onnx.targets.target import Target

__all__ = ["Contract", "Note", "PassContext", "PassResult", "RewritePass"]

Contract = Literal["exact", "lossy"]


@dataclass(frozen=True)
class Note:
    """Why something was left alone: ``node`` (or tensor) and the reason."""

    node: str
    reason: str

    def __str__(self) -> str:
        return f"{self.node}: {self.reason}"


@dataclass(frozen=True)
class PassResult:
    """``modified`` False promises an unchanged graph, down to the bytes. ``notes``: what was left alone, and why."""

    modified: bool
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True)
class PassContext:
    """What a pass may look at besides the graph."""

    analyses: AnalysisManager
    plan: Plan | None = None

    @classmethod
    def of(cls, graph: Graph, inputs: AnalysisInputs | None = None, plan: Plan | None = None) -> PassContext:
        """Context to start a pipeline on ``graph`` with, nothing computed yet."""
        return cls(AnalysisManager(graph, inputs or AnalysisInputs()), plan)

    @property
    def target(self) -> Target:
        """The hardware target. Raises TargetError when there is none."""
        return self.analyses.target

    def needed_plan(self) -> Plan:
        """The plan. Raises PassError when there is none: the pass applies decisions and makes none."""
        if self.plan is None:
            raise PassError("this pass applies a plan, and none was given", hint="make one with 'lcpaq plan'")
        return self.plan


class RewritePass(ABC):
    """Base of all rewriting passes. A subclass is a frozen dataclass; its fields are its options.

    Its docstring says Given / Result / Kept when. It holds no state between runs, prints nothing, opens no files.
    """

    name: ClassVar[str]
    """Unique, kebab-case."""

    preserves: ClassVar[tuple[type[AnyAnalysis], ...]] = ()
    """Analyses whose results hold after this pass as they did before. ``VerifyEach`` computes them again to check."""

    contract: ClassVar[Contract] = "exact"
    """``exact``: outputs agree up to float rounding. ``lossy``: they may differ, by what a plan decided."""

    @abstractmethod
    def run(self, graph: Graph, context: PassContext) -> PassResult:
        """Edit ``graph`` in place; the pass manager owns it, and marks new nodes with the name of the pass."""

    def __str__(self) -> str:
        return options_text(self)
