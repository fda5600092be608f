"""A model file read back as plain values: what stands in it, whoever wrote it. Verification reads through this."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from lcpaq_onnx.errors import ModelError

__all__ = ["WrittenConstant", "WrittenModel", "WrittenNode", "check_file", "read_model", "sha256_of"]

_CHUNK_BYTES = 1 << 22
_PLAIN_ATTRIBUTES = frozenset(
    getattr(onnx.AttributeProto, name) for name in ("INT", "INTS", "FLOAT", "FLOATS", "STRING", "STRINGS")
)


@dataclass(frozen=True)
class WrittenNode:
    """One top-level node. ``attributes`` holds numbers, texts and tuples of them; tensors and graphs are left out."""

    name: str
    op: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class WrittenConstant:
    """One initializer. ``dtype`` is ONNX's name in capitals (INT4); values are read when asked for."""

    dtype: str
    shape: tuple[int, ...]
    _tensor: onnx.TensorProto
    _folder: Path | None

    @cached_property
    def values(self) -> np.ndarray:
        """Values in numpy's or ml_dtypes' type; external data are read from the model's folder."""
        folder = "" if self._folder is None else str(self._folder)
        return np.asarray(onnx.numpy_helper.to_array(self._tensor, folder))


@dataclass(frozen=True, eq=False)
class WrittenModel:
    """Top-level graph of a model file. ``opset``: of the default domain. ``size_bytes``: of the file and of the files
    with its external data. ``producers``: tensor → the node that writes it; ``readers``: tensor → nodes that read it.
    """

    opset: int
    ir_version: int
    metadata: Mapping[str, str]
    nodes: tuple[WrittenNode, ...]
    constants: Mapping[str, WrittenConstant]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    size_bytes: int

    @cached_property
    def by_name(self) -> Mapping[str, WrittenNode]:
        """Nodes by name; unnamed ones are left out."""
        return {node.name: node for node in self.nodes if node.name}

    @cached_property
    def producers(self) -> Mapping[str, WrittenNode]:
        return {name: node for node in self.nodes for name in node.outputs if name}

    @cached_property
    def readers(self) -> Mapping[str, tuple[WrittenNode, ...]]:
        found: dict[str, list[WrittenNode]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                found.setdefault(name, []).append(node)
        return {name: tuple(nodes) for name, nodes in found.items()}


def read_model(source: Path | onnx.ModelProto, *, base_dir: Path | None = None) -> WrittenModel:
    """Read a file, or look at a model in memory whose external data lie in ``base_dir``. External data stay on disk.

    Raises ModelError when the file is missing or is no ONNX model.
    """
    if isinstance(source, Path):
        model, base_dir = _load(source), source.parent
        own_bytes = source.stat().st_size
    else:
        model, own_bytes = source, source.ByteSize()
    tensors = model.graph.initializer
    return WrittenModel(
        opset=next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1),
        ir_version=model.ir_version,
        metadata={entry.key: entry.value for entry in model.metadata_props},
        nodes=tuple(_node(node) for node in model.graph.node),
        constants={tensor.name: _constant(tensor, base_dir) for tensor in tensors},
        inputs=tuple(value.name for value in model.graph.input),
        outputs=tuple(value.name for value in model.graph.output),
        size_bytes=own_bytes + _external_bytes(model, base_dir),
    )


def check_file(path: Path) -> str:
    """What ``onnx.checker`` (full check: types and shapes too) finds wrong with the file; empty when nothing."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError, RuntimeError) as error:
        return " ".join(str(error).split())
    return ""


def sha256_of(path: Path) -> str:
    """SHA-256 of one file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _load(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(str(path), load_external_data=False)
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}", hint="check the path of the model file") from error
    except DecodeError as error:
        raise ModelError(f"{path} is not an ONNX model", hint="check that the file is a complete .onnx file") from error


def _node(node: onnx.NodeProto) -> WrittenNode:
    attributes = {
        attribute.name: _plain(onnx.helper.get_attribute_value(attribute))
        for attribute in node.attribute
        if attribute.type in _PLAIN_ATTRIBUTES
    }
    return WrittenNode(node.name, node.op_type, node.domain, tuple(node.input), tuple(node.output), attributes)


def _plain(value: object) -> object:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value if isinstance(value, int | float | str) else tuple(_plain(item) for item in _items(value))


def _items(value: object) -> list[object]:
    assert isinstance(value, list | tuple)
    return list(value)


def _constant(tensor: onnx.TensorProto, folder: Path | None) -> WrittenConstant:
    return WrittenConstant(onnx.TensorProto.DataType.Name(tensor.data_type), tuple(tensor.dims), tensor, folder)


def _external_bytes(model: onnx.ModelProto, folder: Path | None) -> int:
    """Bytes of the files beside the model; 0 for a missing one, which other checks will report."""
    names = {
        entry.value
        for tensor in model.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    files = [folder / name for name in sorted(names)] if folder is not None else []
    return sum(file.stat().st_size for file in files if file.is_file())
