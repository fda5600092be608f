"""Tensor payloads in a file beside the model (``external_data``): checked at load, read when asked for."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO

import onnx

from lcpaq_onnx.errors import ModelError

__all__ = ["DataFolder", "ExternalData"]

_CHUNK_BYTES = 1 << 24
_Identity = tuple[int, int, int, int]


@dataclass(frozen=True)
class ExternalData:
    """Where one tensor's payload lies. ``identity`` (device, inode, size, time of change) is that of the file when the
    model was loaded: another file under the same name has other offsets.
    """

    path: Path
    offset: int
    length: int
    tensor: str
    identity: _Identity

    def check_unchanged(self) -> None:
        """Raises ModelError if the file was removed, replaced or written since the model was loaded."""
        try:
            unchanged = _identity(self.path) == self.identity
        except OSError:
            unchanged = False
        if not unchanged:
            raise ModelError(
                f"{self.path}, which holds tensor '{self.tensor}', has changed since the model was loaded",
                hint="load the model again",
            )

    def read(self) -> bytes:
        """The payload. Raises ModelError if the file changed since the model was loaded."""
        self.check_unchanged()
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.length)

    def copy_to(self, stream: IO[bytes]) -> None:
        """Writes the payload to ``stream``, holding one chunk of it in memory."""
        self.check_unchanged()
        with self.path.open("rb") as file:
            file.seek(self.offset)
            rest = self.length
            while rest:
                chunk = file.read(min(rest, _CHUNK_BYTES))
                if not chunk:
                    raise OSError(f"{self.path} ended while tensor '{self.tensor}' was read")
                stream.write(chunk)
                rest -= len(chunk)


@dataclass(frozen=True)
class DataFolder:
    """The folder that external payloads of one model must lie in; None when the model came from memory.

    ``model``: the model's file, for messages; links are followed as far as the folder that its own link leads to.
    """

    model: Path | None

    def locate(self, tensor: onnx.TensorProto, required_bytes: int) -> ExternalData | None:
        """The payload of ``tensor``, or None if it is inside the model. Reads nothing.

        Raises ModelError if the file is missing, outside the folder, or too short for ``required_bytes``.
        """
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            return None
        if self.model is None:
            raise ModelError(
                f"tensor '{tensor.name}' has its data in another file, but the model was given without a folder",
                hint="pass the path of the model file instead of the loaded model",
            )
        entries = {entry.key: entry.value for entry in tensor.external_data}
        path = self._path(tensor.name, entries.get("location", ""))
        try:
            identity = _identity(path)
        except OSError as error:
            raise ModelError(
                f"{self.model}: the data of tensor '{tensor.name}' should be in {path}, which cannot be read"
                f" ({error.strerror})",
                hint=f"put the file {path.name} next to the model",
            ) from error
        offset = self._number(tensor.name, entries, "offset", 0)
        length = self._number(tensor.name, entries, "length", required_bytes)
        if length != required_bytes:
            raise ModelError(
                f"{self.model}: tensor '{tensor.name}' needs {required_bytes} bytes, its external data say {length}",
                hint="the model is damaged; export it again",
            )
        if offset + length > identity[2]:
            raise ModelError(
                f"{path}: {identity[2]} bytes long, but tensor '{tensor.name}' ends at byte {offset + length}",
                hint="the data file is cut short or belongs to another model; copy both files again",
            )
        return ExternalData(path, offset, length, tensor.name, identity)

    def _path(self, tensor: str, location: str) -> Path:
        assert self.model is not None
        absolute = PurePosixPath(location).is_absolute() or PureWindowsPath(location).anchor != ""
        parts = {*PurePosixPath(location).parts, *PureWindowsPath(location).parts}
        path = self.model.parent / location
        folders = (self.model.parent.resolve(), self.model.resolve().parent)
        inside = any(path.resolve().is_relative_to(folder) for folder in folders)
        if not location or absolute or ".." in parts or not inside:
            raise ModelError(
                f"{self.model}: tensor '{tensor}' has its data in '{location}', outside the model's folder",
                hint="only files beside the model are read; move the data there and correct the location",
            )
        return path

    def _number(self, tensor: str, entries: dict[str, str], key: str, default: int) -> int:
        text = entries.get(key, str(default))
        if not text.isdecimal():
            raise ModelError(
                f"{self.model}: external data of tensor '{tensor}' have the {key} '{text}'",
                hint="the model is damaged; export it again",
            )
        return int(text)


def _identity(path: Path) -> _Identity:
    status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
