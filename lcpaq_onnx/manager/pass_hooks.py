"""Hooks of the pass manager: print the graph after passes, verify every pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import TextIO

import numpy as np

from lcpaq_onnx.errors import LcpaqError, PassError
from lcpaq_onnx.graph.graph_check import check_graph, graph_digest
from lcpaq_onnx.graph.graph_io import Graph, to_proto
from lcpaq_onnx.graph.graph_text import graph_text
from lcpaq_onnx.manager.pass_base import PassContext, RewritePass
from lcpaq_onnx.manager.pass_manager import Hook, StepDone
from lcpaq_onnx.manager.pipeline import Step, check_names
from lcpaq_onnx.runtime.feeds import Feed
from lcpaq_onnx.runtime.session import Session, SessionOptions

__all__ = ["PrintAfter", "VerifyEach"]


class PrintAfter(Hook):
    """Prints the graph after each pass, and the result of each analysis, with the notes on what was left alone."""

    def __init__(self, stream: TextIO, names: Sequence[str] | None = None) -> None:
        """``names``: of the steps to print after; None prints after all of them."""
        self._stream = stream
        self._names = names

    def start(self, steps: Sequence[Step], context: PassContext) -> None:
        check_names(steps, self._names or ())

    def after(self, done: StepDone, context: PassContext) -> None:
        if self._names is not None and done.step.name not in self._names:
            return
        print(f"// ---- after {done.step}", file=self._stream)
        if done.result is None:
            print(done.value, file=self._stream)
            return
        for note in done.result.notes:
            print(f"// {note}", file=self._stream)
        text = graph_text(context.analyses.graph) if done.modified else "// unchanged"
        print(text, file=self._stream)


class VerifyEach(Hook):
    """Holds every step to what it promises; a PassError names the first one that breaks its word.

    - an analysis, and a pass that says it modified nothing, leave the graph the same to the byte;
    - the graph stays valid (onnx.checker) and runs in ONNX Runtime on all ``feeds``;
    - the outputs of an ``exact`` pass agree with those before it within ``tolerance`` of each output's largest
      magnitude, integers and strings exactly;
    - analyses that a pass ``preserves`` come out the same when computed again.
    """

    def __init__(self, feeds: Sequence[Feed] = (), tolerance: float = 1e-4) -> None:
        """``feeds``: complete inputs, a few samples; without any, numbers are not compared.

        ``tolerance`` 1e-4: float32 sums in another order differ by about 1e-6 of the output's scale per layer, a
        wrong rewrite by far more.
        """
        self._feeds = feeds
        self._tolerance = tolerance
        self._digest = ""
        self._outputs: list[dict[str, np.ndarray]] = []

    def start(self, steps: Sequence[Step], context: PassContext) -> None:
        self._digest, self._outputs = self._observe(context.analyses.graph)

    def after(self, done: StepDone, context: PassContext) -> None:
        name, graph = done.step.name, context.analyses.graph
        if not done.modified:
            if graph_digest(graph) != self._digest:
                raise PassError(
                    f"'{name}' changed the graph without saying so", hint="report this bug; analyses may now be stale"
                )
            return
        try:
            digest, outputs = self._observe(graph)
        except LcpaqError as error:
            raise PassError(f"pass '{name}' broke the model: {error.message}", hint="report this bug") from error
        if isinstance(done.step, RewritePass) and done.step.contract == "exact":
            self._check_outputs(name, outputs)
        _check_preserved(name, context)
        self._digest, self._outputs = digest, outputs

    def _observe(self, graph: Graph) -> tuple[str, list[dict[str, np.ndarray]]]:
        check_graph(graph)
        if not self._feeds:
            return graph_digest(graph), []
        # The model as written: an optimizer could hide a change, or make one of its own.
        session = Session(to_proto(graph), SessionOptions("none"), base_dir=graph.base_dir)
        return graph_digest(graph), [session.run(feed) for feed in self._feeds]

    def _check_outputs(self, name: str, outputs: Sequence[Mapping[str, np.ndarray]]) -> None:
        for index, (before, after) in enumerate(zip(self._outputs, outputs, strict=True)):
            if list(before) != list(after):
                raise PassError(
                    f"pass '{name}' changed the outputs {list(before)} to {list(after)}", hint="report this bug"
                )
            for output, expected in before.items():
                difference = _difference(expected, after[output], self._tolerance)
                if difference:
                    raise PassError(
                        f"pass '{name}' is exact by contract, but output '{output}' of feed {index} {difference}",
                        hint=f"report this bug; --print-after {name} shows the graph",
                    )


def _difference(expected: np.ndarray, actual: np.ndarray, tolerance: float) -> str:
    """How ``actual`` differs; empty if it agrees."""
    if expected.dtype != actual.dtype or expected.shape != actual.shape:
        return f"is {actual.dtype}{list(actual.shape)} instead of {expected.dtype}{list(expected.shape)}"
    if expected.dtype.kind != "f":
        return "" if np.array_equal(expected, actual) else "has other values"
    finite = np.isfinite(expected)
    scale = float(np.abs(expected[finite]).max(initial=0.0))
    limit = max(tolerance, 4 * float(np.finfo(expected.dtype).eps)) * scale
    if np.allclose(actual, expected, rtol=0.0, atol=limit, equal_nan=True):
        return ""
    worst = float(np.abs(actual[finite].astype(np.float64) - expected[finite]).max(initial=0.0))
    return f"differs by {worst:.3g} (allowed {limit:.3g}, {tolerance:g} of its largest magnitude)"


def _check_preserved(name: str, context: PassContext) -> None:
    """Everything still cached after a rewrite is there because the pass vouched for it."""
    for analysis in context.analyses.cached:
        if not _same(context.analyses.get(analysis), context.analyses.recompute(analysis)):
            raise PassError(
                f"pass '{name}' says it preserves '{analysis}', but computed again the result is another one",
                hint="report this bug: the pass must drop the analysis from 'preserves'",
            )


def _same(left: object, right: object) -> bool:
    """Equality that looks into arrays, which dataclasses' ``==`` cannot."""
    if type(left) is not type(right):
        return False
    if isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
        return left.dtype == right.dtype and np.array_equal(left, right, equal_nan=left.dtype.kind in "fc")
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return list(left) == list(right) and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(_same, left, right))
    if is_dataclass(left):
        return all(_same(getattr(left, f.name), getattr(right, f.name)) for f in fields(left))
    return bool(left == right)
