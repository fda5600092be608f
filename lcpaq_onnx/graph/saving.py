"""Writing model files: atomically, constant by constant, with external data when one file would grow too large."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import onnx
import onnx_graphsurgeon as gs

from lcpaq_onnx.errors import ModelError
from lcpaq_onnx.graph.exporting import Exporter
from lcpaq_onnx.graph.tensors import (
    constant_bytes,
    external_of,
    field_bytes,
    head_message,
    inline_message,
    numpy_dtype,
    payload_bytes,
)

__all__ = ["ModelFile", "write_files"]

_PROTOBUF_LIMIT_BYTES = 2**31 - 1
_SMALLEST_EXTERNAL_BYTES = 1024  # as onnx.save: shape inference reads small constants, which must stay inside
_ALIGNMENT_BYTES = 4096  # a page, so that runtimes can map tensors
_GRAPH_TAG = bytes([onnx.ModelProto.GRAPH_FIELD_NUMBER << 3 | 2])
_INITIALIZER_TAG = bytes([onnx.GraphProto.INITIALIZER_FIELD_NUMBER << 3 | 2])

Writer = Callable[[IO[bytes]], None]


@dataclass
class ModelFile:
    """One model ready to be written. ``rest``: the ModelProto without its graph; ``location``: name of the file for
    external data, None to keep all data inside.
    """

    rest: onnx.ModelProto
    graph: gs.Graph
    location: str | None = None
    _external: list[tuple[int, gs.Constant]] = field(default_factory=list)

    def __post_init__(self) -> None:
        exporter = Exporter(self.rest.ir_version, inline_message if self.location is None else self._place)
        self._body, self._constants = exporter.body(self.graph, {})
        self._placed = [] if self.location is None else [self._place(constant) for constant in self._constants]

    def size(self) -> int:
        """Bytes of the model file."""
        return int(self.rest.ByteSize()) + field_bytes(self.graph_bytes())

    def write(self, stream: IO[bytes]) -> None:
        """The model file, with one constant at a time in memory. Protobuf allows fields in any order: the graph comes
        last and its initializers last in it.
        """
        if self.size() > _PROTOBUF_LIMIT_BYTES:
            raise ModelError(
                f"the model file would take {self.size()} bytes, more than the 2 GiB of a protobuf message",
                hint="move large Constant nodes to initializers, which can go to external data",
            )
        stream.write(self.rest.SerializeToString(deterministic=True))
        stream.write(_GRAPH_TAG + _varint(self.graph_bytes()))
        stream.write(self._body.SerializeToString(deterministic=True))
        messages = self._placed if self.location is not None else map(inline_message, self._constants)
        for message in messages:
            data = message.SerializeToString(deterministic=True)
            stream.write(_INITIALIZER_TAG + _varint(len(data)) + data)

    def write_external(self, stream: IO[bytes]) -> None:
        """The file of external data, tensor by tensor at the offsets that the model file names."""
        position = 0
        for offset, constant in self._external:
            stream.write(bytes(offset - position))
            external = external_of(constant)
            if external:
                external.copy_to(stream)
            else:
                stream.write(_raw_data(constant))
            position = offset + _packed_bytes(constant)

    @property
    def has_external(self) -> bool:
        """Whether any constant goes to external data."""
        return bool(self._external)

    def graph_bytes(self) -> int:
        """Bytes of the graph's message, without its field's prefix."""
        body = int(self._body.ByteSize())
        if self.location is None:
            return body + sum(constant_bytes(constant) for constant in self._constants)
        return body + sum(field_bytes(message.ByteSize()) for message in self._placed)

    def _place(self, constant: gs.Constant) -> onnx.TensorProto:
        """``constant`` with its payload at the end of the external data, if large enough."""
        assert self.location is not None
        if constant.dtype.hasobject or _packed_bytes(constant) < _SMALLEST_EXTERNAL_BYTES:
            return inline_message(constant)
        last_offset, last = self._external[-1] if self._external else (0, None)
        end = last_offset + (_packed_bytes(last) if last else 0)
        offset = -(-end // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        self._external.append((offset, constant))
        message = head_message(constant)
        message.data_location = onnx.TensorProto.EXTERNAL
        places = {"location": self.location, "offset": str(offset), "length": str(_packed_bytes(constant))}
        message.external_data.extend(onnx.StringStringEntryProto(key=k, value=v) for k, v in places.items())
        return message


def write_files(files: Sequence[tuple[Path, Writer]]) -> None:
    """Writes all files or none: to temporary files beside them, flushed to the disk, then renamed in the given order.

    On any failure the old files are back in place. (A power cut between two renames can leave the first one done.)
    """
    paths = [path for path, _ in files]
    temporary = {path: _sibling(path, "tmp") for path in paths}
    try:
        for path, write in files:
            with temporary[path].open("wb") as stream:
                write(stream)
                stream.flush()
                os.fsync(stream.fileno())
        _rename(temporary)
        _flush_folders({path.parent for path in paths})
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def _rename(temporary: Mapping[Path, Path]) -> None:
    """Old files but the last are moved aside first and back on failure: once the last is replaced, nothing can fail."""
    backups = []
    with contextlib.ExitStack() as undo:
        for path in list(temporary)[:-1]:
            if path.exists():
                backups.append(_sibling(path, "old"))
                os.replace(path, backups[-1])
                undo.callback(os.replace, backups[-1], path)
            else:
                undo.callback(path.unlink, missing_ok=True)
        for path, source in temporary.items():
            os.replace(source, path)
        undo.pop_all()
    for backup in backups:
        backup.unlink()


def _sibling(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.{ending}")


def _flush_folders(folders: set[Path]) -> None:
    if os.name != "posix":
        return
    for folder in folders:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _packed_bytes(constant: gs.Constant) -> int:
    dtype = numpy_dtype(head_message(constant).data_type, f"constant '{constant.name}'")
    count = 1
    for extent in constant.shape:
        count *= extent
    return payload_bytes(dtype, count)


def _raw_data(constant: gs.Constant) -> bytes:
    message = inline_message(constant)
    if message.HasField("raw_data"):
        return message.raw_data
    return onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(message)).raw_data


def _varint(value: int) -> bytes:
    groups = []
    while value >= 0x80:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])
