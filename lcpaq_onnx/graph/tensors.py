"""Constants: from TensorProto to gs.Constant and back, without decoding what nobody reads, and their bytes on disk."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import DTypeLike, NDArray
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues

from lcpaq_onnx.errors import ModelError
from lcpaq_onnx.graph.external_data import DataFolder, ExternalData
from lcpaq_onnx.graph.notes import tensor_notes

__all__ = [
    "StoredConstant",
    "StoredSparseValues",
    "StoredValues",
    "constant",
    "constant_bytes",
    "field_bytes",
    "head_message",
    "inline_message",
    "numpy_dtype",
    "onnx_dtype",
    "payload_bytes",
    "sparse_message",
    "tensor_message",
]

_BITS = {
    np.dtype(scalar): bits
    for bits, scalars in {
        2: (ml_dtypes.int2, ml_dtypes.uint2),
        4: (ml_dtypes.int4, ml_dtypes.uint4, ml_dtypes.float4_e2m1fn),
        6: (ml_dtypes.float6_e2m3fn, ml_dtypes.float6_e3m2fn),
    }.items()
    for scalar in scalars
}
"""Types that ONNX packs to less than the whole bytes they take in NumPy."""


# ---- types ----------------------------------------------------------------------------------------------------------
def numpy_dtype(data_type: int, where: str) -> np.dtype[Any]:
    """NumPy (or ml_dtypes) type of a TensorProto.DataType. ``where`` names the tensor in a ModelError."""
    try:
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(data_type))
    except KeyError:
        raise ModelError(
            f"{where} has the data type {data_type}, unknown to onnx {onnx.__version__}",
            hint="install a newer onnx or export the model with an older one",
        ) from None


def onnx_dtype(dtype: DTypeLike | int, where: str) -> int:
    """TensorProto.DataType of a NumPy type (an int is one already). Raises ModelError if ONNX has no such type."""
    if isinstance(dtype, int):
        return dtype
    try:
        return int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
    except ValueError:
        raise ModelError(
            f"{where} has the NumPy type {np.dtype(dtype)}, which ONNX lacks",
            hint="convert the values, e.g. to float32",
        ) from None


def payload_bytes(dtype: np.dtype[Any], count: int) -> int:
    """Bytes of ``count`` values in raw_data, sub-byte types packed."""
    return -(-count * _BITS.get(dtype, 8 * dtype.itemsize) // 8)


# ---- values as the file holds them ----------------------------------------------------------------------------------
class StoredValues(LazyValues):
    """A TensorProto decoded at each reading. Unlike its base it knows every ONNX type and external data."""

    def __init__(self, tensor: onnx.TensorProto, folder: DataFolder) -> None:
        """``tensor`` is copied. Raises ModelError for an unknown type or external data that cannot be there."""
        self.tensor = onnx.TensorProto()
        self.tensor.CopyFrom(tensor)
        self.shape = tuple(tensor.dims)
        self.dtype = numpy_dtype(tensor.data_type, f"tensor '{tensor.name}'")
        count = int(np.prod(self.shape, dtype=np.int64))
        self.nbytes = count * self.dtype.itemsize
        self.external = folder.locate(tensor, payload_bytes(self.dtype, count))

    def load(self) -> NDArray[Any]:
        """The values, read-only: what is written is the stored tensor, so changing a decoded copy would be lost."""
        tensor = _inlined(self.tensor, self.external) if self.external else self.tensor
        try:
            values = onnx.numpy_helper.to_array(tensor).reshape(self.shape).view()
        except ValueError as error:
            raise ModelError(
                f"tensor '{tensor.name}' of shape {self.shape} cannot be decoded: {error}",
                hint="the model is damaged; export it again",
            ) from error
        values.flags.writeable = False
        return values


class StoredSparseValues(SparseValues):
    """A SparseTensorProto (ONNX sparse_initializer), kept as it is; reading gives the dense values."""

    def __init__(self, tensor: onnx.SparseTensorProto) -> None:
        """``tensor`` is copied. Raises ModelError for an unknown type or external data, which runtimes refuse too."""
        name = tensor.values.name
        if onnx.TensorProto.EXTERNAL in (tensor.values.data_location, tensor.indices.data_location):
            raise ModelError(f"sparse tensor '{name}' has external data", hint="store its values inside the model")
        self.tensor = onnx.SparseTensorProto()
        self.tensor.CopyFrom(tensor)
        self.shape = tuple(tensor.dims)
        self.dtype = numpy_dtype(tensor.values.data_type, f"sparse tensor '{name}'")
        self.nbytes = int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def load(self) -> NDArray[Any]:
        """Dense values, read-only. Indices are linear [NNZ] or per axis [NNZ, rank]."""
        indices = onnx.numpy_helper.to_array(self.tensor.indices)
        dense = np.zeros(self.shape, self.dtype)
        where = np.unravel_index(indices, self.shape) if indices.ndim == 1 else tuple(indices.T)
        dense[where] = onnx.numpy_helper.to_array(self.tensor.values)
        dense.flags.writeable = False
        return dense


class StoredConstant(gs.Constant):
    """A constant of a loaded model. Its base forgets the TensorProto when ``values`` is read; this one keeps it until
    other values are assigned.
    """

    @property
    def values(self) -> NDArray[Any]:
        """Current values; read-only while they are those of the file."""
        return self._values.load() if isinstance(self._values, LazyValues) else self._values

    @values.setter
    def values(self, values: NDArray[Any] | LazyValues) -> None:
        self._values = values


def constant(name: str, values: NDArray[Any]) -> gs.Constant:
    """A constant of any ONNX type, ml_dtypes included; 0-d stays 0-d. ``values`` is not copied: do not write into it.

    Raises ModelError for a NumPy type that ONNX lacks.
    """
    values = np.asarray(values)
    onnx_dtype(values.dtype, f"constant '{name}'")
    return gs.Constant(name, values)


# ---- messages -------------------------------------------------------------------------------------------------------
def tensor_message(constant: gs.Constant) -> onnx.TensorProto:
    """``constant`` as written, external data still referred to. May belong to the constant: do not change it."""
    values = constant._values
    if not isinstance(values, LazyValues):
        return _from_array(constant, values)
    assert isinstance(values.tensor, onnx.TensorProto)
    if isinstance(values, StoredValues) and values.external:
        values.external.check_unchanged()
    if values.tensor.name == constant.name:
        return values.tensor
    renamed = onnx.TensorProto()
    renamed.CopyFrom(values.tensor)
    renamed.name = constant.name
    return renamed


def inline_message(constant: gs.Constant) -> onnx.TensorProto:
    """Like ``tensor_message``, but external data are read and put inside."""
    message = tensor_message(constant)
    external = external_of(constant)
    return _inlined(message, external) if external else message


def sparse_message(constant: gs.Constant) -> onnx.SparseTensorProto:
    """``constant``, which holds SparseValues, as it is written."""
    assert isinstance(constant._values, SparseValues)
    message = onnx.SparseTensorProto()
    message.CopyFrom(constant._values.tensor)
    message.values.name = constant.name
    return message


def head_message(constant: gs.Constant) -> onnx.TensorProto:
    """``constant`` without its payload: name, shape, type, doc string, metadata."""
    values = constant._values
    message = onnx.TensorProto()
    if isinstance(values, LazyValues):
        tensor = values.tensor
        message.data_type = tensor.data_type
        message.doc_string = tensor.doc_string
        message.metadata_props.extend(tensor.metadata_props)
    else:
        message.data_type = onnx_dtype(constant.export_dtype, f"constant '{constant.name}'")
        _add_notes(message, constant)
    if not message.doc_string:
        message.ClearField("doc_string")
    message.dims.extend(constant.shape)
    if constant.name:
        message.name = constant.name
    return message


def external_of(constant: gs.Constant) -> ExternalData | None:
    """Where the payload lies, if outside the model."""
    return constant._values.external if isinstance(constant._values, StoredValues) else None


# ---- sizes ----------------------------------------------------------------------------------------------------------
def field_bytes(payload: int) -> int:
    """Bytes of a length-delimited protobuf field: tag (all of GraphProto's take one byte), length, payload."""
    return 1 + max(1, -(-payload.bit_length() // 7)) + payload


def constant_bytes(constant: gs.Constant) -> int:
    """Exact bytes of ``constant`` as an initializer in a GraphProto (tag, length, TensorProto), data inside."""
    values = constant._values
    if isinstance(values, SparseValues):
        return field_bytes(sparse_message(constant).ByteSize())
    if isinstance(values, LazyValues) and not external_of(constant):
        named = field_bytes(len(values.tensor.name.encode())) if values.tensor.HasField("name") else 0
        name = named if values.tensor.name == constant.name else field_bytes(len(constant.name.encode()))
        return field_bytes(values.tensor.ByteSize() - named + name)
    if constant.dtype.hasobject or constant.dtype.kind == "U":
        return field_bytes(tensor_message(constant).ByteSize())
    dtype = numpy_dtype(onnx_dtype(constant.export_dtype, constant.name), constant.name)
    payload = payload_bytes(dtype, int(np.prod(constant.shape, dtype=np.int64)))
    return field_bytes(head_message(constant).ByteSize() + field_bytes(payload))


def _from_array(constant: gs.Constant, values: NDArray[Any]) -> onnx.TensorProto:
    where = f"constant '{constant.name}'"
    dtype = numpy_dtype(onnx_dtype(constant.export_dtype, where), where)
    message = onnx.numpy_helper.from_array(values.astype(dtype, copy=False), constant.name)
    _add_notes(message, constant)
    return message


def _add_notes(message: onnx.TensorProto, constant: gs.Constant) -> None:
    notes = tensor_notes(constant)
    for entry in notes.entries if notes else ():
        if entry.section == "initializer" and isinstance(entry.message, onnx.TensorProto):
            message.MergeFrom(entry.message)


def _inlined(tensor: onnx.TensorProto, external: ExternalData) -> onnx.TensorProto:
    message = onnx.TensorProto()
    message.CopyFrom(tensor)
    message.ClearField("external_data")
    message.ClearField("data_location")
    message.raw_data = external.read()
    return message
