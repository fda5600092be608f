"""The schedule that peak memory is counted on."""

from __future__ import annotations

from onnx import TensorProto, helper

from lcpaq_onnx.graph import graph_io
from lcpaq_onnx.manager.analysis import AnalysisInputs, AnalysisManager
from lcpaq_onnx.passes import MemoryTimeline, RecordedTensors
from lcpaq_onnx.tables import RecordedTensor


def live(*edges: tuple[str, str, str]) -> list[tuple[str, int]]:
    """Node and live elements at each step, for one-input operators (name, input, output) from x to y of 4 floats."""
    nodes = [helper.make_node("Exp", [source], [result], name=name) for name, source, result in edges]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in ("x", "y")]
    model = helper.make_model(
        helper.make_graph(nodes, "g", ends[:1], ends[1:]), opset_imports=[helper.make_opsetid("", 13)], ir_version=10
    )
    graph = graph_io.load(model)
    analyses = AnalysisManager(graph, AnalysisInputs())
    names = {"x", *(result for _, _, result in edges)}
    analyses.put(RecordedTensors(), {name: RecordedTensor(shape=(4,), dtype="float32") for name in sorted(names)})
    return [(step.node, sum(step.groups.values())) for step in analyses.get(MemoryTimeline)]


def test_keeps_the_order_of_the_graph() -> None:
    steps = live(("a", "x", "u"), ("b", "x", "v"), ("c", "u", "y"), ("d", "v", "w"))
    # c is the last to read u; y stays to the end; nobody reads w.
    assert steps == [("a", 8), ("b", 12), ("c", 12), ("d", 12)]


def test_a_writer_comes_before_its_readers() -> None:
    """Nodes listed before what they read wait; of those that can run, the first listed goes first."""
    steps = live(("last", "v", "y"), ("late", "u", "v"), ("first", "x", "u"), ("free", "x", "w"))
    assert [node for node, _ in steps] == ["first", "late", "last", "free"]
