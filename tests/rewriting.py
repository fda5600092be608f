"""Runs rewriting passes in tests and holds them to what all of them promise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import parser

from lcpaq_onnx.graph.graph_io import Graph, load, to_proto
from lcpaq_onnx.manager.pass_base import PassContext, RewritePass
from lcpaq_onnx.manager.pass_hooks import VerifyEach
from lcpaq_onnx.manager.pass_manager import PipelineRun, run_pipeline
from lcpaq_onnx.runtime.session import Session, SessionOptions

__all__ = ["assert_same_outputs", "constants", "notes_of", "ops", "outputs_of", "parse", "rewrite"]

Feed = Mapping[str, np.ndarray]


def parse(text: str, *, opset: int = 17, ir: int = 8) -> Graph:
    """A graph in the syntax of ``onnx.parser``."""
    return load(parser.parse_model(f'<ir_version: {ir}, opset_import: ["": {opset}]> {text}'))


def rewrite(graph: Graph, passes: Sequence[RewritePass], feeds: Sequence[Feed] = (), tolerance: float = 0.0) -> Graph:
    """``graph`` after ``passes``: valid after each, claims about changes true, a second time nothing to do, and outputs
    within ``tolerance`` of their largest magnitude (0: the same bits) in unoptimized ONNX Runtime.
    """
    result = traced(graph, passes).graph
    for feed in feeds:
        assert_same_outputs(outputs_of(graph, feed), outputs_of(result, feed), tolerance)
    assert not any(done.modified for done in traced(result, passes).trace), "a second run found something to do"
    return result


def notes_of(graph: Graph, *passes: RewritePass) -> dict[str, str]:
    """Node → why it was left alone."""
    notes = [note for done in traced(graph, passes).trace if done.result for note in done.result.notes]
    return {note.node: note.reason for note in notes}


def traced(graph: Graph, passes: Sequence[RewritePass]) -> PipelineRun:
    """A run that is verified after each pass, numbers excepted."""
    return run_pipeline(passes, PassContext.of(graph), [VerifyEach()])


def outputs_of(model: Graph | onnx.ModelProto, feed: Feed) -> dict[str, np.ndarray]:
    """Outputs in ONNX Runtime, which runs the nodes as they stand."""
    proto = to_proto(model) if isinstance(model, Graph) else model
    return Session(proto, SessionOptions("none", threads=1)).run(feed)


def assert_same_outputs(expected: Feed, actual: Feed, tolerance: float) -> None:
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (value.dtype, value.shape), name
        if tolerance == 0 or value.dtype.kind != "f":
            np.testing.assert_array_equal(actual[name], value, err_msg=name)
        else:
            scale = float(np.abs(value).max(initial=0.0))
            np.testing.assert_allclose(actual[name], value, rtol=0, atol=tolerance * scale, err_msg=name)


def ops(graph: Graph) -> list[str]:
    """Operators of the top level, in order."""
    return [node.op for node in graph.nodes]


def constants(graph: Graph) -> dict[str, np.ndarray]:
    """Initializers of the top level as they would be written."""
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in to_proto(graph).graph.initializer}
