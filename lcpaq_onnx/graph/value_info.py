"""ValueInfoProto of a tensor: verbatim while its type and shape stand as loaded, else from the live tensor."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from lcpaq_onnx.errors import ModelError
from lcpaq_onnx.graph.notes import tensor_notes
from lcpaq_onnx.graph.tensors import field_bytes, onnx_dtype

__all__ = ["described", "is_as_loaded", "value_info_bytes", "value_info_message"]


def described(tensor: gs.Tensor) -> tuple[object, ...]:
    """What a ValueInfoProto tells: kind, data type, shape. A constant as the file holds it is simply that."""
    if isinstance(tensor, gs.Constant) and isinstance(tensor._values, LazyValues):
        return ("stored",)
    kind = _kind(tensor)
    dtype = None if tensor.dtype is None else onnx_dtype(tensor.dtype, f"tensor '{tensor.name}'")
    return kind, dtype, None if tensor.shape is None else tuple(tensor.shape)


def is_as_loaded(tensor: gs.Tensor) -> bool:
    """Whether type and shape are those of the file."""
    notes = tensor_notes(tensor)
    return notes is not None and notes.described == described(tensor)


def value_info_message(tensor: gs.Tensor, stored: onnx.ValueInfoProto | None) -> onnx.ValueInfoProto:
    """The entry to write for ``tensor``, whose entry was ``stored`` at load.

    Raises ModelError for a map, optional or opaque tensor whose dtype or shape was set after loading.
    """
    message = onnx.ValueInfoProto()
    if stored is not None:
        message.CopyFrom(stored)
    message.name = tensor.name
    if stored is not None and is_as_loaded(tensor):
        return message
    denotation = message.type.denotation
    message.ClearField("type")
    if tensor.dtype is not None:
        message.type.CopyFrom(_type_message(tensor))
        if denotation:
            message.type.denotation = denotation
    return message


def value_info_bytes(variable: gs.Tensor) -> int:
    """Exact bytes of one ValueInfoProto of ``variable`` in a GraphProto (tag, length, message); 0 where none is
    written: an inner tensor of unknown type. If the file listed it more than once: its value_info, else the first.
    """
    notes = tensor_notes(variable)
    stored = [entry.message for entry in notes.entries if entry.section != "initializer"] if notes else []
    messages = [message for message in stored if isinstance(message, onnx.ValueInfoProto)]
    if not messages and variable.dtype is None:
        return 0
    return field_bytes(value_info_message(variable, messages[0] if messages else None).ByteSize())


def _kind(tensor: gs.Tensor) -> str:
    """Field of TypeProto. Read with vars(): gs.Constant.to_variable makes variables without a kind."""
    return (isinstance(tensor, gs.Variable) and vars(tensor).get("type")) or "tensor_type"


def _type_message(tensor: gs.Tensor) -> onnx.TypeProto:
    kind = _kind(tensor)
    dtype = onnx_dtype(tensor.dtype, f"tensor '{tensor.name}'")
    if kind == "sparse_tensor_type":
        return onnx.helper.make_sparse_tensor_type_proto(dtype, _shape(tensor.shape))
    dense = onnx.helper.make_tensor_type_proto(dtype, _shape(tensor.shape))
    if kind == "tensor_type":
        return dense
    if kind == "sequence_type":
        return onnx.helper.make_sequence_type_proto(dense)
    raise ModelError(
        f"tensor '{tensor.name}' of kind {kind} was given a new type, which cannot be written",
        hint="leave its dtype and shape as loaded",
    )


def _shape(shape: Sequence[int | str | None] | None) -> list[int | str | None] | None:
    """Plain ints for onnx; a negative extent, graphsurgeon's ``DYNAMIC``, is an unknown one."""
    if shape is None:
        return None
    return [_extent(extent) for extent in shape]


def _extent(extent: int | str | None) -> int | str | None:
    if extent is None or isinstance(extent, str):
        return extent
    return None if extent < 0 else int(extent)
