"""Analyses and passes on real graphs: caching, invalidation, stamps, errors, hooks."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import parser

from lcpaq_onnx.errors import CalibrationError, ModelError, PassError, TargetError
from lcpaq_onnx.graph.graph_check import check_graph, graph_digest
from lcpaq_onnx.graph.graph_io import Graph, constant, load, node_metadata, to_proto
from lcpaq_onnx.graph.graph_text import graph_text
from lcpaq_onnx.manager.analysis import Analysis, AnalysisInputs, AnalysisManager, AnyAnalysis
from lcpaq_onnx.manager.pass_base import Contract, Note, PassContext, PassResult, RewritePass
from lcpaq_onnx.manager.pass_hooks import PrintAfter, VerifyEach
from lcpaq_onnx.manager.pass_manager import Hook, StepDone, run_pipeline, timing_table
from lcpaq_onnx.manager.pipeline import Step, stop_after
from lcpaq_onnx.runtime.session import Session

HEAD = '<ir_version: 8, opset_import: ["":17]>'
FEED = {"x": np.array([[1.0, -2.0, 3.0]], np.float32)}


def chain() -> Graph:
    """x -> Identity -> Mul 2 -> Identity -> Add 1 -> y."""
    return load(
        parser.parse_model(
            f"""{HEAD} chain (float[1,3] x) => (float[1,3] y) <float two = {{2}}, float[3] ones = {{1,1,1}}>
            {{ [first] a = Identity(x) [double] b = Mul(a, two) [second] c = Identity(b) [shift] y = Add(c, ones) }}"""
        )
    )


def branches() -> Graph:
    """y = x + x, or -x, by a constant condition."""
    return load(
        parser.parse_model(
            f"""{HEAD} branches (float[1,3] x) => (float[1,3] y) <bool on = {{1}}>
            {{ [choose] y = If(on) <then_branch = yes () => (float[1,3] t) {{ [twice] t = Add(x, x) }},
                                    else_branch = no () => (float[1,3] e) {{ [minus] e = Neg(x) }}> }}"""
        )
    )


def outputs(graph: Graph) -> dict[str, np.ndarray]:
    return Session(to_proto(graph)).run(FEED)


def operators(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


# ---- passes and analyses of these tests -----------------------------------------------------------------------------
CALLS: Counter[str] = Counter()


@dataclass(frozen=True)
class NodeCount(Analysis[int]):
    name: ClassVar[str] = "node-count"

    def run(self, graph: Graph, analyses: AnalysisManager) -> int:
        CALLS[self.name] += 1
        return len(graph.nodes)


@dataclass(frozen=True)
class Multiple(Analysis[int]):
    """Depends on NodeCount."""

    name: ClassVar[str] = "multiple"
    factor: int = 2

    def run(self, graph: Graph, analyses: AnalysisManager) -> int:
        CALLS[str(self)] += 1
        return self.factor * analyses.get(NodeCount)


@dataclass(frozen=True)
class Report(Analysis[str]):
    """Depends on Multiple and, through it, on NodeCount."""

    name: ClassVar[str] = "report"

    def run(self, graph: Graph, analyses: AnalysisManager) -> str:
        return f"{analyses.get(Multiple(10))} tenths"


@dataclass(frozen=True)
class InputNames(Analysis[list[np.ndarray]]):
    name: ClassVar[str] = "input-shapes"

    def run(self, graph: Graph, analyses: AnalysisManager) -> list[np.ndarray]:
        CALLS[self.name] += 1
        return [np.array(tensor.shape) for tensor in graph.inputs]


@dataclass(frozen=True)
class RemoveIdentity(RewritePass):
    """Given y = Identity(x). Result: readers of y read x. Kept when y is an output of the graph, or below ``keep``."""

    name: ClassVar[str] = "remove-identity"
    preserves: ClassVar[tuple[type[AnyAnalysis], ...]] = (InputNames,)
    keep: tuple[str, ...] = ()

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        identities = [node for node in graph.nodes if node.op == "Identity"]
        notes = tuple(Note(node.name, "is to be kept") for node in identities if node.name in self.keep)
        gone = [node for node in identities if node.name not in self.keep]
        for node in gone:
            source, result = node.inputs[0], node.outputs[0]
            for reader in list(result.outputs):
                reader.inputs = [source if tensor is result else tensor for tensor in reader.inputs]
            node.inputs.clear()
            node.outputs.clear()
        graph.nodes = [node for node in graph.nodes if not any(node is other for other in gone)]
        return PassResult(bool(gone), notes)


@dataclass(frozen=True)
class ScaleOutput(RewritePass):
    """Multiplies the output of each ``op`` by ``factor``, in bodies of control flow as well."""

    name: ClassVar[str] = "scale-output"
    contract: ClassVar[Contract] = "lossy"
    op: str = "Add"
    factor: float = 3.0

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        scopes = [graph, *graph.subgraphs(recursive=True)]
        return PassResult(sum(self._scale(scope) for scope in scopes) > 0)

    def _scale(self, scope: gs.Graph) -> int:
        found = [index for index, node in enumerate(scope.nodes) if node.op == self.op]
        for index in reversed(found):
            node = scope.nodes[index]
            result = node.outputs[0]
            before = gs.Variable(f"{result.name}/before", np.float32, result.shape)
            node.outputs = [before]
            factor = constant(f"{result.name}/factor", np.array(self.factor, np.float32))
            scaled = gs.Node("Mul", f"{before.name}/scaled", inputs=[before, factor], outputs=[result])
            scope.nodes.insert(index + 1, scaled)
        return len(found)


@dataclass(frozen=True)
class ScaleExactly(ScaleOutput):
    name: ClassVar[str] = "scale-exactly"
    contract: ClassVar[Contract] = "exact"


@dataclass(frozen=True)
class Scripted(RewritePass):
    """Does what ``how`` says."""

    name: ClassVar[str] = "scripted"
    preserves: ClassVar[tuple[type[AnyAnalysis], ...]] = (NodeCount,)
    how: str = "nothing"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        if self.how == "rename quietly":
            graph.nodes[0].name = "renamed"
        elif self.how == "add quietly":
            ScaleOutput().run(graph, context)
            return PassResult(modified=False)
        elif self.how == "drop a node":
            graph.nodes = graph.nodes[1:]
            return PassResult(modified=True)
        elif self.how == "add a node":
            return ScaleOutput(factor=1.0).run(graph, context)
        elif self.how == "rename output":
            graph.outputs[0].name = "z"
            return PassResult(modified=True)
        elif self.how == "no result":
            return None  # type: ignore[return-value]
        elif self.how == "bug":
            raise KeyError("conv1")
        elif self.how == "refuse":
            raise CalibrationError("no data", hint="give some")
        elif self.how == "nested":
            run_pipeline([Scripted("refuse")], PassContext.of(graph))
        return PassResult(modified=False)


@pytest.fixture(autouse=True)
def _fresh_calls() -> None:
    CALLS.clear()


# ---- analyses -------------------------------------------------------------------------------------------------------
def test_analyses_are_lazy_and_cached_by_options() -> None:
    analyses = AnalysisManager(chain(), AnalysisInputs())
    assert not CALLS
    assert [analyses.get(Multiple), analyses.get(Multiple(2)), analyses.get(Multiple(3))] == [8, 8, 12]
    assert CALLS == {"multiple": 1, "multiple{factor=3}": 1, "node-count": 1}


def test_everything_falls_after_a_rewrite() -> None:
    analyses = AnalysisManager(chain(), AnalysisInputs())
    analyses.get(Report)
    analyses.invalidate()
    assert analyses.cached == ()


@pytest.mark.parametrize(
    ("preserves", "kept"),
    [
        ([NodeCount], {NodeCount()}),
        ([Multiple], set()),
        ([NodeCount, Multiple], {NodeCount(), Multiple(10), Multiple(3)}),
        ([NodeCount, Report], {NodeCount()}),
        ([Report, Multiple, NodeCount], {NodeCount(), Multiple(10), Multiple(3), Report()}),
    ],
)
def test_a_preserved_analysis_falls_with_what_it_was_made_from(
    preserves: list[type[AnyAnalysis]], kept: set[AnyAnalysis]
) -> None:
    analyses = AnalysisManager(chain(), AnalysisInputs())
    analyses.get(Multiple(3))
    analyses.get(Report)
    analyses.invalidate(preserves)
    assert set(analyses.cached) == kept


def test_dependencies_are_recorded_although_cached_before() -> None:
    analyses = AnalysisManager(chain(), AnalysisInputs())
    analyses.get(NodeCount)
    analyses.get(Multiple(10))
    analyses.get(Report)
    analyses.invalidate([Report, Multiple])
    assert analyses.cached == ()


def test_a_saved_result_is_used_and_replaces_what_was_made_from_another() -> None:
    analyses = AnalysisManager(chain(), AnalysisInputs())
    assert analyses.get(Multiple) == 8
    analyses.put(NodeCount(), 100)
    assert analyses.get(Multiple) == 200
    assert CALLS["node-count"] == 1


def test_a_fork_keeps_results_and_parts_ways() -> None:
    analyses = AnalysisManager(chain(), AnalysisInputs(seed=5))
    analyses.get(NodeCount)
    fork = analyses.fork(branches())
    assert fork.get(NodeCount) == 4
    fork.invalidate()
    assert fork.get(NodeCount) == 1
    assert analyses.get(NodeCount) == 4
    assert fork.inputs.seed == 5


@dataclass(frozen=True)
class Chicken(Analysis[int]):
    name: ClassVar[str] = "chicken"

    def run(self, graph: Graph, analyses: AnalysisManager) -> int:
        return analyses.get(Egg(laid=3))


@dataclass(frozen=True)
class Egg(Analysis[int]):
    name: ClassVar[str] = "egg"
    laid: int

    def run(self, graph: Graph, analyses: AnalysisManager) -> int:
        return analyses.get(Chicken) if self.laid else 1 // self.laid


@pytest.mark.parametrize("warm", [False, True])
def test_a_circle_is_named(warm: bool) -> None:
    analyses = AnalysisManager(chain(), AnalysisInputs())
    if warm:
        analyses.get(Multiple)
    for _ in range(2):  # and the manager is usable afterwards
        with pytest.raises(PassError) as caught:
            analyses.get(Chicken)
        assert caught.value.message.endswith("in a circle: chicken -> egg{laid=3} -> chicken")
    assert analyses.get(NodeCount) == 4


def test_a_class_without_default_options_is_refused() -> None:
    with pytest.raises(PassError, match="analysis 'egg' has no default for laid") as caught:
        AnalysisManager(chain(), AnalysisInputs()).get(Egg)
    assert caught.value.hint == "ask for an instance: Egg(laid=…)"


def test_a_bug_in_an_analysis_names_it_and_keeps_the_cause() -> None:
    with pytest.raises(PassError, match=r"analysis egg\{laid=0\} failed: ZeroDivisionError") as caught:
        AnalysisManager(chain(), AnalysisInputs()).get(Egg(0))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_missing_inputs_say_which_option_to_give() -> None:
    analyses = AnalysisManager(chain(), AnalysisInputs())
    with pytest.raises(CalibrationError, match="--calibration"):
        analyses.inputs.samples()
    with pytest.raises(TargetError, match="--target"):
        _ = analyses.target
    with pytest.raises(PassError, match="lcpaq plan"):
        PassContext(analyses).needed_plan()


# ---- running --------------------------------------------------------------------------------------------------------
def test_a_pipeline_rewrites_a_copy() -> None:
    graph = chain()
    digest = graph_digest(graph)
    run = run_pipeline([RemoveIdentity(), RemoveIdentity()], PassContext.of(graph))
    assert operators(run.graph) == ["Mul", "Add"]
    assert [done.modified for done in run.trace] == [True, False]
    np.testing.assert_array_equal(outputs(run.graph)["y"], outputs(graph)["y"])
    assert graph_digest(graph) == digest


def test_analyses_hold_for_the_copy_until_it_changes() -> None:
    context = PassContext.of(chain())
    assert context.analyses.get(Multiple) == 8
    context.analyses.get(InputNames)
    run = run_pipeline([Multiple(), RemoveIdentity(), Multiple(), RemoveIdentity(), Multiple()], context)
    assert [done.value for done in run.trace if done.result is None] == [8, 4, 4]
    assert CALLS == {"multiple": 2, "node-count": 2, "input-shapes": 1}, "an unmodified graph keeps its analyses"
    assert run.analyses.get(Multiple) == 4
    assert context.analyses.get(Multiple) == 8


def test_notes_say_why_nothing_was_done() -> None:
    run = run_pipeline([RemoveIdentity(("first", "second"))], PassContext.of(chain()))
    (done,) = run.trace
    assert done.result == PassResult(False, (Note("first", "is to be kept"), Note("second", "is to be kept")))


def test_new_nodes_carry_the_name_of_their_pass() -> None:
    run = run_pipeline([ScaleExactly("Mul", 1.0), RemoveIdentity(), ScaleOutput()], PassContext.of(chain()))
    made_by = {node.name: node_metadata(node).get("lcpaq.pass") for node in run.graph.nodes}
    assert made_by == {
        "double": None,
        "shift": None,
        "y/before/scaled": "scale-output",
        "b/before/scaled": "scale-exactly",
    }
    stored = {
        node.name: {entry.key: entry.value for entry in node.metadata_props} for node in to_proto(run.graph).graph.node
    }
    assert stored["y/before/scaled"] == {"lcpaq.pass": "scale-output"}
    assert stored["double"] == {}


def test_new_nodes_in_bodies_of_control_flow_carry_it_too() -> None:
    run = run_pipeline([ScaleOutput()], PassContext.of(branches()))
    (body, other) = run.graph.nodes[0].subgraphs()
    assert {node.name: dict(node_metadata(node)) for node in [*body.nodes, *other.nodes]} == {
        "twice": {},
        "t/before/scaled": {"lcpaq.pass": "scale-output"},
        "minus": {},
    }
    np.testing.assert_array_equal(outputs(run.graph)["y"], 6 * FEED["x"])


def test_a_stamp_that_the_pass_set_stays() -> None:
    @dataclass(frozen=True)
    class Stamper(ScaleOutput):
        name: ClassVar[str] = "stamper"

        def run(self, graph: Graph, context: PassContext) -> PassResult:
            result = super().run(graph, context)
            node_metadata(graph.nodes[-1])["lcpaq.pass"] = "its-helper"
            return result

    run = run_pipeline([Stamper()], PassContext.of(chain()))
    assert node_metadata(run.graph.nodes[-1])["lcpaq.pass"] == "its-helper"


def test_stop_after() -> None:
    steps: list[Step] = [RemoveIdentity(("first",)), ScaleOutput(), RemoveIdentity()]
    run = run_pipeline(stop_after(steps, "scale-output"), PassContext.of(chain()))
    assert operators(run.graph) == ["Identity", "Mul", "Add", "Mul"]


def test_timing_table() -> None:
    run = run_pipeline([RemoveIdentity(), NodeCount(), RemoveIdentity(("a",))], PassContext.of(chain()))
    rows = timing_table(run.trace).splitlines()
    assert [row.split("%  ")[1].strip() for row in rows] == [
        "changed    remove-identity",
        "analysis   node-count",
        "unchanged  remove-identity{keep=a}",
        "total",
    ]
    assert all(done.seconds > 0 for done in run.trace)


# ---- errors ---------------------------------------------------------------------------------------------------------
def test_an_error_gets_the_trail_once_and_keeps_its_type() -> None:
    for how in ("refuse", "nested"):
        with pytest.raises(CalibrationError) as caught:
            run_pipeline([RemoveIdentity(), NodeCount(), Scripted(how)], PassContext.of(chain()))
        after = " after the passes [remove-identity, node-count]" if how == "refuse" else ""
        assert str(caught.value) == f"no data\n  in pass scripted{{how=refuse}}{after}\n  try: give some"


def test_any_other_exception_becomes_a_pass_error() -> None:
    with pytest.raises(PassError) as caught:
        run_pipeline([RemoveIdentity(), Scripted("bug")], PassContext.of(chain()))
    assert caught.value.message == (
        "pass 'scripted' failed: KeyError: 'conv1'\n  in pass scripted{how=bug} after the passes [remove-identity]"
    )
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no result", "pass 'scripted' returned NoneType, not a PassResult"),
        ("add quietly", "pass 'scripted' made node 'y/before/scaled' but says that it modified nothing"),
    ],
)
def test_a_broken_promise_is_the_mistake_of_the_pass(how: str, message: str) -> None:
    with pytest.raises(PassError) as caught:
        run_pipeline([Scripted(how)], PassContext.of(chain()))
    assert caught.value.message.startswith(message)


# ---- hooks ----------------------------------------------------------------------------------------------------------
def test_hooks_see_every_step() -> None:
    class Recorder(Hook):
        def __init__(self) -> None:
            self.seen: list[str] = []

        def start(self, steps: object, context: PassContext) -> None:
            self.seen.append(f"start with {len(context.analyses.graph.nodes)}")

        def after(self, done: StepDone, context: PassContext) -> None:
            self.seen.append(f"{done.step} {done.modified} {len(context.analyses.graph.nodes)}")

    hook = Recorder()
    run_pipeline([NodeCount(), RemoveIdentity()], PassContext.of(chain()), [hook])
    assert hook.seen == ["start with 4", "node-count False 4", "remove-identity True 2"]


def test_print_after() -> None:
    stream = io.StringIO()
    steps: list[Step] = [RemoveIdentity(("second",)), NodeCount(), RemoveIdentity(("second",)), ScaleOutput()]
    run_pipeline(steps, PassContext.of(chain()), [PrintAfter(stream)])
    assert (
        stream.getvalue()
        == """\
// ---- after remove-identity{keep=second}
// second: is to be kept
<
   ir_version: 8,
   opset_import: ["" : 17]
>
chain (float[1,3] x) => (float[1,3] y)
   <float two =  {2}, float[3] ones =  {1,1,1}>
{
   [double] b = Mul (x, two)
   [second] c = Identity (b)
   [shift] y = Add (c, ones)
}
// ---- after node-count
3
// ---- after remove-identity{keep=second}
// second: is to be kept
// unchanged
// ---- after scale-output
<
   ir_version: 8,
   opset_import: ["" : 17]
>
chain (float[1,3] x) => (float[1,3] y)
   <float two =  {2}, float[3] ones =  {1,1,1}, float "y/factor" =  {3}, float[1,3] "y/before">
{
   [double] b = Mul (x, two)
   [second] c = Identity (b)
   [shift] "y/before" = Add (c, ones)
   ["y/before/scaled (scale-output)"] y = Mul ("y/before", "y/factor")
}
"""
    )


def test_print_after_some_steps_only() -> None:
    stream = io.StringIO()
    run_pipeline([RemoveIdentity(), NodeCount()], PassContext.of(chain()), [PrintAfter(stream, ["node-count"])])
    assert stream.getvalue() == "// ---- after node-count\n2\n"
    with pytest.raises(PassError, match="no step of this pipeline is named 'node-cont'"):
        run_pipeline([NodeCount()], PassContext.of(chain()), [PrintAfter(stream, ["node-cont"])])


def test_large_constants_are_left_out_of_the_text() -> None:
    graph = chain()
    values = np.arange(9, dtype=np.float32).reshape(3, 3)
    graph.nodes[3].inputs[1] = wide = constant("wide", values)
    text = graph_text(graph)
    assert "float[3,3] wide = ..." in text
    assert "float[3,3] wide =  {0,1,2,3,4,5,6,7,8}" in graph_text(graph, elide_above=9)
    assert wide.values is values


# ---- verifying ------------------------------------------------------------------------------------------------------
def verified(*steps: Step, graph: Graph | None = None) -> None:
    run_pipeline(steps, PassContext.of(graph or chain()), [VerifyEach([FEED])])


def test_honest_passes_are_verified() -> None:
    verified(NodeCount(), RemoveIdentity(), InputNames(), RemoveIdentity(), ScaleOutput(), ScaleExactly(factor=1.0))
    verified(ScaleOutput(factor=0.5), graph=branches())


def test_preserved_results_with_arrays_can_be_compared() -> None:
    verified(InputNames(), RemoveIdentity())
    assert CALLS["input-shapes"] == 2, "computed again to compare"


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (
            ScaleExactly(factor=1.01),
            "pass 'scale-exactly' is exact by contract, but output 'y' of feed 0 differs by 0.07 (allowed 0.0007,",
        ),
        (Scripted("rename quietly"), "'scripted' changed the graph without saying so"),
        (Scripted("drop a node"), "pass 'scripted' broke the model: the model is not valid ONNX: "),
        (Scripted("rename output"), "pass 'scripted' changed the outputs ['y'] to ['z']"),
    ],
)
def test_the_first_pass_that_breaks_its_word_is_named(step: Step, message: str) -> None:
    with pytest.raises(PassError) as caught:
        verified(RemoveIdentity(), step, ScaleOutput())
    assert caught.value.message.startswith(message)
    assert caught.value.message.endswith(f"\n  in pass {step} after the passes [remove-identity]")


def test_a_wrong_claim_to_preserve_is_found() -> None:
    with pytest.raises(PassError, match="pass 'scripted' says it preserves 'node-count'"):
        verified(NodeCount(), Scripted("add a node"))


def test_an_analysis_that_edits_is_found() -> None:
    @dataclass(frozen=True)
    class Meddling(Analysis[int]):
        name: ClassVar[str] = "meddling"

        def run(self, graph: Graph, analyses: AnalysisManager) -> int:
            graph.nodes[0].name = "mine"
            return 1

    with pytest.raises(PassError, match="'meddling' changed the graph without saying so"):
        verified(Meddling())


def test_a_model_that_was_broken_before_is_nobodys_mistake() -> None:
    graph = chain()
    graph.nodes[0].op = "Idntity"
    with pytest.raises(ModelError) as caught:
        verified(RemoveIdentity(), graph=graph)
    assert "in pass" not in caught.value.message


def test_without_feeds_structure_alone_is_verified() -> None:
    run_pipeline([ScaleExactly(factor=1.01)], PassContext.of(chain()), [VerifyEach()])


def test_external_data_can_be_verified_and_printed(tmp_path: Path) -> None:
    model = to_proto(chain())
    wide = onnx.numpy_helper.from_array(np.ones((3, 400), np.float32), "wide")
    model.graph.initializer.append(wide)
    model.graph.node[3].input[1] = "row"
    model.graph.node.insert(
        0, onnx.helper.make_node("ReduceMean", ["wide"], ["means"], name="mean", axes=[1], keepdims=0)
    )
    model.graph.node.insert(1, onnx.helper.make_node("Identity", ["means"], ["row"], name="third"))
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, size_threshold=1024)
    graph = load(tmp_path / "m.onnx")
    check_graph(graph)
    assert "float[3,400] wide = ..." in graph_text(graph)
    run = run_pipeline([RemoveIdentity()], PassContext.of(graph), [VerifyEach([FEED])])
    assert operators(run.graph) == ["ReduceMean", "Mul", "Add"]
