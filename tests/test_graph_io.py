"""Loading, editing and writing models loses nothing and writes what was edited."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_equality import canonical
from onnx import TensorProto, helper, numpy_helper
from onnx_graphsurgeon.logger import G_LOGGER
from rich_model import PACKED_TYPES, rich_model

from lcpaq_onnx.errors import ModelError
from lcpaq_onnx.graph import graph_io


def small_model(ir_version: int = 10) -> onnx.ModelProto:
    """y = relu(x·w) + b, with w of [4, 3]."""
    w = np.arange(12, dtype=np.float32).reshape(4, 3)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["m"], name="matmul"),
            helper.make_node("Relu", ["m"], ["r"], name="relu"),
            helper.make_node("Add", ["r", "b"], ["y"], name="add"),
        ],
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(w, "w"), numpy_helper.from_array(np.ones(3, np.float32), "b")],
        value_info=[helper.make_tensor_value_info("m", TensorProto.FLOAT, ["n", 3])],
    )
    return helper.make_model(graph, ir_version=ir_version, opset_imports=[helper.make_opsetid("", 21)])


def saved(graph: graph_io.Graph, folder: Path) -> onnx.ModelProto:
    graph_io.save(graph, folder / "saved.onnx")
    return onnx.load(folder / "saved.onnx")


def initializers(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


# ---- nothing is lost ------------------------------------------------------------------------------------------------
def test_everything_survives_unchanged(tmp_path: Path) -> None:
    original = rich_model()
    graph = graph_io.load(original)
    assert original == rich_model()
    expected = canonical(original)
    assert canonical(graph_io.to_proto(graph)) == expected
    assert canonical(saved(graph, tmp_path)) == expected
    assert canonical(graph_io.to_proto(graph_io.copy(graph))) == expected
    again = graph_io.load(tmp_path / "saved.onnx")
    assert canonical(graph_io.to_proto(again)) == expected


def test_canonical_form_tells_models_apart() -> None:
    changed = rich_model()
    changed.graph.node[2].attribute[0].g.initializer[0].raw_data = b"\0" * 8
    assert canonical(changed) != canonical(rich_model())
    renamed = rich_model()
    renamed.graph.value_info[0].doc_string = "other"
    assert canonical(renamed) != canonical(rich_model())


def test_graph_shares_nothing_with_its_source_or_its_protos() -> None:
    source = rich_model()
    graph = graph_io.load(source)
    for message in (source, graph_io.to_proto(graph)):
        message.graph.initializer[1].float_data[0] = 99
        message.graph.node[0].attribute[0].i = 99
        message.graph.value_info[0].doc_string = "changed"
        message.metadata_props[0].value = "changed"
        message.functions[0].doc_string = "changed"
        message.functions[0].opset_import[0].version = 1
    assert canonical(graph_io.to_proto(graph)) == canonical(rich_model())


def test_reading_values_changes_nothing() -> None:
    graph = graph_io.load(rich_model())
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Constant):
            assert tensor.values.shape == tuple(tensor.shape)
            assert tensor.values.dtype == tensor.dtype
            assert not tensor.values.flags.writeable
    assert canonical(graph_io.to_proto(graph)) == canonical(rich_model())


def test_loaded_values_are_those_of_the_file() -> None:
    graph = graph_io.load(rich_model())
    constants = {name: t for name, t in graph.tensors().items() if isinstance(t, gs.Constant)}
    for tensor in rich_model().graph.initializer:
        if tensor.name in constants:
            assert constants[tensor.name].values.tobytes() == numpy_helper.to_array(tensor).tobytes()
    np.testing.assert_array_equal(constants["sparse_weight"].values, np.array([[0, 5], [0, 7]], np.float32))
    assert constants["nibbles"].dtype == ml_dtypes.int4


def test_types_of_variables_are_numpy_types_and_tuples() -> None:
    tensors = graph_io.load(rich_model()).tensors()
    assert (tensors["x"].dtype, tensors["x"].shape) == (np.float32, ("batch", 3, None))
    assert tensors["sequence"].dtype == np.float32
    assert (tensors["untyped_element"].dtype, tensors["untyped_element"].shape) == (None, (1,))
    assert tensors["named_only"].dtype is None


def test_initializers_as_inputs_of_ir_version_3() -> None:
    original = small_model(ir_version=3)
    original.opset_import[0].version = 8
    names = ("w", "b")
    shapes = ([4, 3], [3])
    original.graph.input.extend(
        helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in zip(names, shapes, strict=True)
    )
    onnx.checker.check_model(original)
    graph = graph_io.load(original)
    assert [tensor.name for tensor in graph.inputs] == ["x"]
    assert canonical(graph_io.to_proto(graph)) == canonical(original)
    graph.nodes[2].inputs[1] = graph_io.constant("b2", np.zeros(3, np.float32))
    edited = graph_io.to_proto(graph)
    assert [value.name for value in edited.graph.input] == ["x", "w", "b2"]
    onnx.checker.check_model(edited, full_check=True)


def test_overridable_initializers_can_be_fixed() -> None:
    graph = graph_io.load(rich_model())
    (override,) = graph_io.overridable_initializers(graph)
    assert override.name == "override"
    graph_io.fix_initializer(override)
    model = graph_io.to_proto(graph)
    assert [value.name for value in model.graph.input] == ["x", "flag"]
    assert "override" in initializers(model)


def test_unused_initializers_stay_until_removed() -> None:
    graph = graph_io.load(rich_model())
    assert [tensor.name for tensor in graph.unused_initializers] == ["unused_scale"]
    graph.unused_initializers.clear()
    assert "unused_scale" not in initializers(graph_io.to_proto(graph))


def test_nothing_is_printed_and_the_logger_is_as_before(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    severity = G_LOGGER.severity
    graph = graph_io.load(rich_model())
    saved(graph_io.copy(graph), tmp_path)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    assert G_LOGGER.severity == severity


@pytest.mark.parametrize("make", [small_model, rich_model])
def test_graphsurgeons_own_methods_work(make: Callable[[], onnx.ModelProto]) -> None:
    graph = graph_io.load(make())
    names = [node.op for node in graph.nodes]
    idle = gs.Node("Neg", "idle", {}, [graph.inputs[0]], [gs.Variable("nobody")])
    graph.nodes.insert(0, idle)
    graph.nodes.reverse()
    graph.cleanup().toposort()
    used = names if "If" not in names else ["Everything", "If"]  # MatMul and its reader lead nowhere
    assert [node.op for node in graph.nodes] == used
    assert len(graph_io.to_proto(graph).graph.node) == len(used)


# ---- subgraphs ------------------------------------------------------------------------------------------------------
def branches(model: onnx.ModelProto) -> list[onnx.GraphProto]:
    return [attribute.g for attribute in model.graph.node[2].attribute]


def test_constants_of_branches_are_declared_once() -> None:
    model = graph_io.to_proto(graph_io.load(rich_model()))
    assert [[tensor.name for tensor in branch.initializer] for branch in branches(model)] == [["own", "idle"]] * 2
    assert {"weight", "only_in_branches"} <= set(initializers(model))


def test_new_constant_of_two_branches_goes_to_the_graph_around_them() -> None:
    graph = graph_io.load(rich_model())
    shared = graph_io.constant("new", np.ones(2, np.float32))
    single = graph_io.constant("single", np.ones(2, np.float32))
    bodies = [graph.nodes[2].attrs[name] for name in ("then_branch", "else_branch")]
    for body in bodies:
        body.nodes[0].inputs[1] = shared
    bodies[0].nodes[1].inputs[1] = single
    model = graph_io.to_proto(graph)
    assert "new" in initializers(model)
    assert "single" not in initializers(model)
    declared = [[tensor.name for tensor in branch.initializer] for branch in branches(model)]
    assert declared == [["own", "idle"], ["own", "idle", "single"]]  # helper.make_node sorts: else, then


def test_initializer_of_a_branch_may_have_the_name_of_an_outer_one() -> None:
    original = rich_model()
    attribute = original.graph.node[2].attribute[0]
    attribute.g.initializer.append(numpy_helper.from_array(np.full(2, 77, np.float32), "weight"))
    graph = graph_io.load(original)
    assert canonical(graph_io.to_proto(graph)) == canonical(original)
    branch = graph.nodes[2].attrs[attribute.name]
    np.testing.assert_array_equal(branch.nodes[0].inputs[1].values, [77, 77])


def test_renamed_outer_tensor_is_renamed_in_branches() -> None:
    graph = graph_io.load(rich_model())
    graph.tensors()["h"].name = "hidden"
    model = graph_io.to_proto(graph)
    assert [branch.node[2].input[1] for branch in branches(model)] == ["hidden", "hidden"]
    assert model.graph.node[1].input[0] == "hidden"
    assert model.graph.value_info[0].name == "hidden"
    assert model.graph.value_info[0].doc_string == "hidden text"
    assert model.graph.quantization_annotation[0].tensor_name == "hidden"


# ---- edits ----------------------------------------------------------------------------------------------------------
def test_edits_are_written(tmp_path: Path) -> None:
    graph = graph_io.load(small_model())
    matmul, relu, add = graph.nodes
    matmul.name = "renamed"
    relu.op, relu.attrs["alpha"] = "LeakyRelu", 0.5
    add.inputs[1].name = "bias"
    add.inputs[1].values = np.full(3, 7, np.float64)
    matmul.inputs[1] = graph_io.constant("w2", np.eye(4, 3, dtype=np.float32))
    graph_io.node_metadata(relu)["made"] = "here"
    graph.header.metadata_props.add(key="k", value="v")
    graph.opset = 22
    graph.metadata["g"] = "2"
    model = saved(graph, tmp_path)
    assert [node.name for node in model.graph.node] == ["renamed", "relu", "add"]
    assert (model.graph.node[1].op_type, model.graph.node[1].attribute[0].f) == ("LeakyRelu", 0.5)
    assert {name: values.dtype for name, values in initializers(model).items()} == {
        "w2": np.float32,
        "bias": np.float64,
    }
    assert model.graph.node[1].metadata_props[0].value == "here"
    assert (model.metadata_props[0].value, model.opset_import[0].version) == ("v", 22)
    assert model.graph.metadata_props[0].value == "2"


def test_new_type_is_written_and_old_one_verbatim() -> None:
    graph = graph_io.load(rich_model())
    hidden = graph.tensors()["h"]
    assert isinstance(hidden, gs.Variable)
    hidden.dtype = np.float16
    value = next(v for v in graph_io.to_proto(graph).graph.value_info if v.name == "h")
    assert value.type.tensor_type.elem_type == TensorProto.FLOAT16
    assert value.doc_string == "hidden text"


def test_constant_that_became_a_variable_is_no_initializer() -> None:
    graph = graph_io.load(rich_model())
    weight = graph.tensors()["weight"]
    weight.to_variable()
    weight.dtype = weight.shape = None
    source = graph_io.constant("weight/q", np.zeros((2, 2), np.float32))
    graph.nodes.insert(0, gs.Node("Identity", inputs=[source], outputs=[weight]))
    model = graph_io.to_proto(graph)
    assert "weight" not in initializers(model)
    assert "weight" not in {value.name for value in model.graph.value_info}


def test_replaced_values_keep_doc_and_metadata() -> None:
    graph = graph_io.load(rich_model())
    graph.tensors()["weight"].values = np.zeros((2, 2), np.float32)
    weight = next(t for t in graph_io.to_proto(graph).graph.initializer if t.name == "weight")
    assert (weight.doc_string, weight.metadata_props[0].value) == ("weight text", "1")
    assert weight.raw_data == bytes(16)


def test_removed_node_takes_its_constants_along() -> None:
    graph = graph_io.load(small_model())
    add = graph.nodes.pop()
    add.inputs[0].inputs[0].outputs[0] = add.outputs[0]
    add.outputs.clear()
    model = graph_io.to_proto(graph)
    assert set(initializers(model)) == {"w"}
    onnx.checker.check_model(model)


def test_edited_function_is_rewritten_and_the_other_kept() -> None:
    graph = graph_io.load(rich_model())
    graph.functions[0].nodes[1].op = "Elu"
    model = graph_io.to_proto(graph)
    expected = rich_model()
    expected.functions[0].node[1].op_type = "Elu"
    assert canonical(model) == canonical(expected)


def test_attributes_of_new_nodes_take_the_type_the_operator_asks_for() -> None:
    graph = graph_io.load(small_model())
    graph.nodes[1] = gs.Node("LeakyRelu", "new", {"alpha": 1}, graph.nodes[1].inputs[:], [gs.Variable("r2")])
    graph.nodes.append(gs.Node("MaxPool", "p", {"pads": [], "kernel_shape": (1,)}, [gs.Variable("r2")], []))
    nodes = graph_io.to_proto(graph).graph.node
    assert nodes[1].attribute[0] == helper.make_attribute("alpha", 1.0)
    assert [a.type for a in nodes[3].attribute] == [onnx.AttributeProto.INTS] * 2


def test_domain_of_a_new_node_is_imported() -> None:
    graph = graph_io.load(small_model())
    graph.nodes.append(gs.Node("Gelu", "g", {}, graph.nodes[0].inputs[:1], [gs.Variable("g")], "com.microsoft"))
    imports = {entry.domain: entry.version for entry in graph_io.to_proto(graph).opset_import}
    assert imports == {"": 21, "com.microsoft": 1}
    assert graph.header.opset_import[0].version == graph.opset == 21


def test_copy_is_independent_and_shares_payloads() -> None:
    graph = graph_io.load(rich_model())
    duplicate = graph_io.copy(graph)
    original, copied = graph.tensors()["weight"], duplicate.tensors()["weight"]
    assert copied is not original
    assert copied._values is original._values
    graph_io.node_metadata(duplicate.nodes[0])["namespace"] = "changed"
    duplicate.nodes[0].attrs["ints"].append(9)
    duplicate.nodes[2].attrs["then_branch"].nodes[0].name = "changed"
    duplicate.functions[0].nodes[0].name = "changed"
    duplicate.header.doc_string = "changed"
    duplicate.metadata["g"] = "changed"
    duplicate.unused_initializers[0].name = "changed"
    copied.values = np.zeros((2, 2), np.float32)
    copied.name = "changed"
    assert canonical(graph_io.to_proto(graph)) == canonical(rich_model())
    assert graph.copy().header == graph.header


def test_two_tensors_of_one_name_are_refused() -> None:
    graph = graph_io.load(small_model())
    graph.nodes[2].inputs[1] = graph_io.constant("w", np.ones(3, np.float32))
    with pytest.raises(ModelError, match="two different tensors are called 'w'"):
        graph_io.to_proto(graph)


# ---- constants from numpy -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [*PACKED_TYPES, np.float16, np.bool_, np.complex64, np.uint64])
@pytest.mark.parametrize("shape", [(), (1,), (3, 3), (0, 2)])
def test_constants_of_all_types_are_written(dtype: type, shape: tuple[int, ...], tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    graph = graph_io.load(small_model())
    graph.nodes[2].inputs[1] = graph_io.constant("c", values)
    model = saved(graph, tmp_path)
    read = initializers(model)["c"]
    assert (read.dtype, read.shape) == (values.dtype, shape)
    assert read.tobytes() == values.tobytes()  # bytes: a NaN is itself
    loaded = graph_io.load(tmp_path / "saved.onnx").nodes[2].inputs[1]
    assert (loaded.dtype, loaded.shape) == (values.dtype, shape)
    assert graph_io.constant_bytes(loaded) == graph_io.constant_bytes(graph.nodes[2].inputs[1])


def test_strings_are_written(tmp_path: Path) -> None:
    graph = graph_io.load(small_model())
    graph.nodes[2].inputs[1] = graph_io.constant("c", np.array(["a", "é"]))
    assert list(initializers(saved(graph, tmp_path))["c"]) == ["a", "é"]
    assert graph_io.serialized_size(graph) == (tmp_path / "saved.onnx").stat().st_size


def test_numpy_type_that_onnx_lacks_is_refused() -> None:
    with pytest.raises(ModelError, match="constant 'c' has the NumPy type datetime64"):
        graph_io.constant("c", np.array(["2020-01-01"], "datetime64[D]"))


DTYPES = st.sampled_from([ml_dtypes.int4, ml_dtypes.uint4, ml_dtypes.int2, ml_dtypes.uint2, np.float16, np.float32])
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@settings(max_examples=40, deadline=None)
@given(kinds=st.lists(st.tuples(DTYPES, SHAPES), min_size=1, max_size=5), seed=st.integers(0, 2**32 - 1))
def test_random_graphs_hold_what_was_put_in(
    kinds: list[tuple[type, tuple[int, ...]]], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    generator = np.random.default_rng(seed)
    arrays = {f"c{i}": generator.integers(0, 2, shape).astype(kind) for i, (kind, shape) in enumerate(kinds)}
    graph = graph_io.load(small_model())
    constants = [graph_io.constant(name, values) for name, values in arrays.items()]
    graph.nodes.append(gs.Node("Custom", "custom", {}, constants, [gs.Variable("out")], "test"))
    folder = tmp_path_factory.mktemp("random")
    before = graph_io.serialized_size(graph)
    model = saved(graph, folder)
    assert (folder / "saved.onnx").stat().st_size == before
    read = initializers(model)
    for name, values in arrays.items():
        assert read[name].dtype == values.dtype
        np.testing.assert_array_equal(read[name], values)
    assert canonical(graph_io.to_proto(graph_io.load(folder / "saved.onnx"))) == canonical(model)


# ---- sizes ----------------------------------------------------------------------------------------------------------
def field_bytes(payload: int) -> int:
    return 1 + max(1, -(-payload.bit_length() // 7)) + payload


@pytest.mark.parametrize(("make", "matmul"), [(small_model, 0), (rich_model, 1)])
def test_parts_add_up_to_the_file(make: Callable[[], onnx.ModelProto], matmul: int, tmp_path: Path) -> None:
    graph = graph_io.load(make())
    graph.nodes[matmul].inputs[0].name += "_with_a_longer_name"
    graph.nodes[matmul].inputs[1].values = np.zeros((1, 70), ml_dtypes.int4)
    model = saved(graph, tmp_path)
    read = {t.name: t for n in [*graph.nodes] for t in n.inputs if isinstance(t, gs.Constant)} | {
        t.name: t for t in [*graph.unused_initializers, *graph.outputs] if isinstance(t, gs.Constant)
    }
    bodies = [body for node in graph.nodes for body in node.subgraphs()]
    declared = {t.name for t in model.graph.initializer}
    read |= {t.name: t for b in bodies for n in b.nodes for t in n.inputs if t.name in declared}
    parts = sum(graph_io.constant_bytes(constant) for constant in read.values())
    parts += sum(graph_io.node_bytes(node) for node in graph.nodes)
    rest = onnx.GraphProto()
    rest.CopyFrom(model.graph)
    for name in ("node", "initializer", "sparse_initializer"):
        rest.ClearField(name)
    parts += rest.ByteSize()
    model_rest = onnx.ModelProto()
    model_rest.CopyFrom(model)
    model_rest.ClearField("graph")
    size = (tmp_path / "saved.onnx").stat().st_size
    assert field_bytes(parts) + model_rest.ByteSize() == size == graph_io.serialized_size(graph)


def test_value_info_bytes_are_those_written() -> None:
    graph = graph_io.load(rich_model())
    written = {value.name: value for value in graph_io.to_proto(graph).graph.value_info}
    for name in ("h", "sequence", "optional", "map", "sparse", "named_only", "untyped_element"):
        tensor = graph.tensors()[name]
        assert isinstance(tensor, gs.Variable)
        assert graph_io.value_info_bytes(tensor) == field_bytes(written[name].ByteSize())
    assert graph_io.value_info_bytes(gs.Variable("new")) == 0
    typed = gs.Variable("new", np.float32, [1, "n"])
    message = helper.make_tensor_value_info("new", TensorProto.FLOAT, [1, "n"])
    assert graph_io.value_info_bytes(typed) == field_bytes(message.ByteSize())


def test_two_saves_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.onnx", "b.onnx"):
        graph_io.save(graph_io.load(rich_model()), tmp_path / name)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
