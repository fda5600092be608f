"""Runs a pipeline: one loop, one kind of hook. Passes neither print, nor time, nor check; hooks and the trace do.

The graph that is given is never changed: the manager edits a copy, and results computed for the original hold for it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import onnx_graphsurgeon as gs

from lcpaq_onnx.errors import LcpaqError, PassError
from lcpaq_onnx.graph.emit import PASS_KEY
from lcpaq_onnx.graph.graph_io import Graph, copy, node_metadata
from lcpaq_onnx.manager.analysis import AnalysisManager
from lcpaq_onnx.manager.pass_base import PassContext, PassResult, RewritePass
from lcpaq_onnx.manager.pipeline import Step

__all__ = ["Hook", "PipelineRun", "StepDone", "run_pipeline", "timing_table"]

_TRAIL = "\n  in pass "


@dataclass(frozen=True)
class StepDone:
    """One step that ran. ``result`` is None for an analysis, ``value`` None for a pass."""

    step: Step
    result: PassResult | None = None
    value: object = field(default=None, repr=False)
    seconds: float = field(default=0.0, compare=False)

    @property
    def modified(self) -> bool:
        return self.result is not None and self.result.modified


class Hook:
    """What to do around the steps; it sees the graph and must not change it."""

    def start(self, steps: Sequence[Step], context: PassContext) -> None:
        """Before the first step: refuse options that do not fit the pipeline, remember the graph as it was."""

    def after(self, done: StepDone, context: PassContext) -> None:
        """After each step that did not fail."""


@dataclass(frozen=True)
class PipelineRun:
    """``context``: as given, but of the rewritten graph, with the analyses still valid. ``trace``: what ran."""

    context: PassContext
    trace: tuple[StepDone, ...]

    @property
    def graph(self) -> Graph:
        return self.context.analyses.graph

    @property
    def analyses(self) -> AnalysisManager:
        return self.context.analyses


def run_pipeline(steps: Sequence[Step], context: PassContext, hooks: Sequence[Hook] = ()) -> PipelineRun:
    """Run ``steps`` on a copy of ``context``'s graph.

    An LcpaqError from a pass or hook goes on with the trail of passes added to its message; any other exception of a
    pass becomes a PassError that names the pass.
    """
    graph = copy(context.analyses.graph)
    context = replace(context, analyses=context.analyses.fork(graph))
    for hook in hooks:
        hook.start(steps, context)
    trace: list[StepDone] = []
    for step in steps:
        with _trail(step, trace):
            done = _run_step(step, graph, context)
            for hook in hooks:
                hook.after(done, context)
        trace.append(done)
    return PipelineRun(context, tuple(trace))


def timing_table(trace: Sequence[StepDone]) -> str:
    """Seconds and share of each step, in order, with what it changed."""
    total = sum(done.seconds for done in trace)
    rows = [
        f"{done.seconds:10.3f} s {done.seconds / total if total else 0:6.1%}  {_effect(done):<9}  {done.step}"
        for done in trace
    ]
    return "\n".join([*rows, f"{total:10.3f} s 100.0%  total"])


def _effect(done: StepDone) -> str:
    if done.result is None:
        return "analysis"
    return "changed" if done.modified else "unchanged"


def _run_step(step: Step, graph: Graph, context: PassContext) -> StepDone:
    started = time.perf_counter()
    if isinstance(step, RewritePass):
        result = _rewrite(step, graph, context)
        return StepDone(step, result=result, seconds=time.perf_counter() - started)
    value = context.analyses.get(step)
    return StepDone(step, value=value, seconds=time.perf_counter() - started)


def _rewrite(step: RewritePass, graph: Graph, context: PassContext) -> PassResult:
    # The nodes themselves stay referenced, so that no new node can get the id of a removed one.
    before = {id(node): node for node in _all_nodes(graph)}
    try:
        result: object = step.run(graph, context)
    except LcpaqError:
        raise
    except Exception as error:  # any bug of a pass, third-party ones included: say which pass, keep the cause
        raise PassError(
            f"pass '{step.name}' failed: {type(error).__name__}: {error}",
            hint="this is a bug in the pass; run the pipeline with --stop-after the pass before it to get its input",
        ) from error
    if not isinstance(result, PassResult):
        raise PassError(
            f"pass '{step.name}' returned {type(result).__name__}, not a PassResult", hint="report this bug of the pass"
        )
    made = [node for node in _all_nodes(graph) if id(node) not in before]
    if made and not result.modified:
        raise PassError(
            f"pass '{step.name}' made node '{made[0].name}' but says that it modified nothing",
            hint="report this bug of the pass",
        )
    for node in made:
        node_metadata(node).setdefault(PASS_KEY, step.name)
    if result.modified:
        context.analyses.invalidate(step.preserves)
    return result


def _all_nodes(graph: Graph) -> Iterator[gs.Node]:
    """Nodes of the graph, of its functions, and of all bodies of control flow."""
    pending: list[gs.Graph] = [graph, *graph.functions]
    while pending:
        for node in pending.pop().nodes:
            yield node
            pending.extend(node.subgraphs())


@contextmanager
def _trail(step: Step, trace: Sequence[StepDone]) -> Iterator[None]:
    """Adds to an error where in the pipeline it happened; once, by the innermost pipeline."""
    try:
        yield
    except LcpaqError as error:
        if _TRAIL not in error.message:
            passed = ", ".join(done.step.name for done in trace)
            error.message += f"{_TRAIL}{step}" + (f" after the passes [{passed}]" if passed else "")
        raise
