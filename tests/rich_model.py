"""A model that uses every corner of the ONNX format that readers tend to forget. Not meant to run."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, helper, numpy_helper

__all__ = ["PACKED_TYPES", "rich_model"]

PACKED_TYPES = (
    ml_dtypes.int4,
    ml_dtypes.uint4,
    ml_dtypes.int2,
    ml_dtypes.uint2,
    ml_dtypes.float4_e2m1fn,
    ml_dtypes.bfloat16,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e4m3fnuz,
    ml_dtypes.float8_e5m2,
    ml_dtypes.float8_e5m2fnuz,
    ml_dtypes.float8_e8m0fnu,
)


def rich_model() -> onnx.ModelProto:
    """A fresh one each time."""
    model = onnx.ModelProto(ir_version=11, producer_name="maker", producer_version="1.2", domain="org.example")
    model.model_version = 7
    model.doc_string = "model text"
    model.metadata_props.add(key="names", value="{0: 'cat'}")
    model.metadata_props.add(key="author", value="")
    model.opset_import.extend([helper.make_opsetid("", 21), helper.make_opsetid("local", 3)])
    model.training_info.add().algorithm.name = "step"
    configuration = model.configuration.add(name="two", num_devices=2)
    configuration.device.extend(["a", "b"])
    model.functions.append(_function())
    model.functions.append(_function(overload="second"))
    graph = model.graph
    graph.name, graph.doc_string = "main", "graph text"
    graph.metadata_props.add(key="g", value="1")
    _add_values(graph)
    _add_constants(graph)
    _add_nodes(graph)
    annotation = graph.quantization_annotation.add(tensor_name="h")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="unused_scale")
    return model


def _function(overload: str = "") -> onnx.FunctionProto:
    function = helper.make_function(
        "local",
        "Scale",
        ["a"],
        ["b"],
        [
            helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(np.float32(2), "k"), name="c"),
            helper.make_node("LeakyRelu", ["a"], ["r"], name="leak", doc_string="inner text"),
            helper.make_node("Mul", ["r", "k"], ["b"]),
        ],
        [helper.make_opsetid("", 21)],
        attributes=["needed"],
        attribute_protos=[helper.make_attribute("slope", 0.25, doc_string="default slope")],
        doc_string="function text",
        overload=overload,
    )
    reference = function.node[1].attribute.add(name="alpha", ref_attr_name="slope")
    reference.type = AttributeProto.FLOAT
    function.node[1].metadata_props.add(key="inner", value="kept")
    function.value_info.append(helper.make_tensor_value_info("r", TensorProto.FLOAT, ["n"]))
    function.metadata_props.add(key="f", value="1")
    return function


def _add_values(graph: onnx.GraphProto) -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, None], doc_string="input text")
    value.type.denotation = "IMAGE"
    value.type.tensor_type.shape.dim[1].denotation = "DATA_CHANNEL"
    value.metadata_props.add(key="v", value="1")
    # "override" is an initializer too, between two true inputs.
    graph.input.extend([value, helper.make_tensor_value_info("override", TensorProto.FLOAT, [1])])
    graph.input.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, []))
    graph.output.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, None))
    graph.output.append(helper.make_tensor_value_info("constant_output", TensorProto.FLOAT, [2]))
    tensor = helper.make_tensor_type_proto(TensorProto.FLOAT, ["n"])
    types = {
        "h": helper.make_tensor_type_proto(TensorProto.FLOAT, ["batch", 3, "n"]),
        "sequence": helper.make_sequence_type_proto(tensor),
        "optional": helper.make_optional_type_proto(helper.make_sequence_type_proto(tensor)),
        "map": helper.make_map_type_proto(TensorProto.STRING, tensor),
        "sparse": helper.make_sparse_tensor_type_proto(TensorProto.FLOAT, [2, "k"]),
        "y": helper.make_tensor_type_proto(TensorProto.FLOAT, ["batch"]),
        "weight": helper.make_tensor_type_proto(TensorProto.FLOAT, ["rows", 2]),
        "nowhere": tensor,
        "untyped_element": helper.make_tensor_type_proto(0, [1]),
    }
    graph.value_info.extend(helper.make_value_info(name, type_proto) for name, type_proto in types.items())
    graph.value_info[0].doc_string = "hidden text"
    graph.value_info.append(onnx.ValueInfoProto(name="named_only", doc_string="no type"))


def _add_constants(graph: onnx.GraphProto) -> None:
    weight = TensorProto(name="weight", data_type=TensorProto.FLOAT, dims=[2, 2], float_data=[1, 2, 3, 4])
    weight.doc_string = "weight text"
    weight.metadata_props.add(key="w", value="1")
    graph.initializer.extend(
        [
            TensorProto(name="unused_scale", data_type=TensorProto.FLOAT, dims=[1], float_data=[0.5]),
            weight,
            TensorProto(name="override", data_type=TensorProto.FLOAT, dims=[1], float_data=[9]),
            TensorProto(name="int64s", data_type=TensorProto.INT64, dims=[3], int64_data=[1, 2, 3]),
            TensorProto(name="halves", data_type=TensorProto.FLOAT16, dims=[2], int32_data=[15360, 16384]),
            TensorProto(name="nibbles", data_type=TensorProto.INT4, dims=[3], int32_data=[0x21, 0x0F]),
            helper.make_tensor("words", TensorProto.STRING, [2], ["a", "é"]),
            numpy_helper.from_array(np.zeros((0, 3), np.float32), "empty"),
            numpy_helper.from_array(np.float32(3), "scalar"),
            numpy_helper.from_array(np.ones(2, np.float32), "constant_output"),
            numpy_helper.from_array(np.ones(2, np.float32), "only_in_branches"),
        ]
    )
    for dtype in PACKED_TYPES:
        values = np.array([0, 1, 1], np.float32).astype(dtype)
        graph.initializer.append(numpy_helper.from_array(values, f"packed_{np.dtype(dtype)}"))
    graph.sparse_initializer.append(sparse_tensor("sparse_weight"))


def sparse_tensor(name: str) -> onnx.SparseTensorProto:
    """[[0, 5], [0, 7]] by linear indices."""
    values = numpy_helper.from_array(np.array([5, 7], np.float32), name)
    return helper.make_sparse_tensor(values, numpy_helper.from_array(np.array([1, 3]), ""), [2, 2])


def _branch(name: str, own: float) -> onnx.GraphProto:
    """Reads a constant and a variable of the outer graph, and a constant ``own`` of its own."""
    graph = helper.make_graph(
        [
            helper.make_node("Add", ["own", "weight"], ["s"], name="add"),
            helper.make_node("Add", ["s", "only_in_branches"], ["t"], name="add"),
            helper.make_node("Add", ["t", "h"], ["out"], name="add"),
        ],
        name,
        [],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.full(2, own, np.float32), "own")],
        doc_string="branch text",
        value_info=[helper.make_tensor_value_info("s", TensorProto.FLOAT, [2])],
    )
    graph.metadata_props.add(key="branch", value=name)
    graph.initializer.append(TensorProto(name="idle", data_type=TensorProto.FLOAT, dims=[1], float_data=[own]))
    return graph


def _add_nodes(graph: onnx.GraphProto) -> None:
    tensor_type = helper.make_tensor_type_proto(TensorProto.FLOAT, [1])
    constants = [tensor.name for tensor in graph.initializer if tensor.name.startswith("packed_")]
    constants += ["int64s", "halves", "nibbles", "words", "empty", "scalar", "sparse_weight", "override"]
    rich = helper.make_node(
        "Everything",
        ["x", "", *constants],
        ["h", "", "sequence", "optional", "map", "sparse", "untyped_element", "named_only"],
        name="twin",
        domain="custom.without.import",
        doc_string="node text",
        overload="variant",
        an_int=3,
        a_float=0.1,
        a_string="täxt",
        a_tensor=TensorProto(name="t", data_type=TensorProto.FLOAT, dims=[2], float_data=[1, 2], doc_string="attr"),
        a_sparse=sparse_tensor("s"),
        a_type=tensor_type,
        ints=[1, 2],
        floats=[1.0, 2.5],
        strings=["a", "b"],
        tensors=[numpy_helper.from_array(np.float32(1), "one")],
        graphs=[_branch("listed", 5)],
        sparses=[sparse_tensor("s")],
        types=[tensor_type],
    )
    for name, kind in (("no_ints", "INTS"), ("no_floats", "FLOATS"), ("no_strings", "STRINGS"), ("no_text", "STRING")):
        rich.attribute.add(name=name).type = AttributeProto.AttributeType.Value(kind)
    rich.attribute.add(name="binary", type=AttributeProto.STRING, s=b"\xff\x00").doc_string = "attribute text"
    rich.attribute.add(name="binaries", type=AttributeProto.STRINGS).strings.extend([b"\xfe", b"text"])
    rich.attribute.add(name="of_ir_version_1", i=4)
    rich.metadata_props.add(key="namespace", value="a/b")
    device = rich.device_configurations.add(configuration_id="two", pipeline_stage=1)
    device.sharding_spec.add(tensor_name="x").device.append(1)
    graph.node.extend(
        [
            rich,
            helper.make_node("MatMul", ["h", "weight"], ["m"], name="twin"),
            helper.make_node(
                "If", ["flag"], ["y"], then_branch=_branch("then", 1), else_branch=_branch("else", 2), name="choice"
            ),
            helper.make_node("Scale", ["m"], ["z"], domain="local", needed=1),
        ]
    )
