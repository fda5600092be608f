"""Reading an .npz archive row by row: memory holds one row of each array, whatever the archive's size."""

from __future__ import annotations

import math
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from lcpaq_onnx.errors import CalibrationError

__all__ = ["NPZ_ERRORS", "ArrayHeader", "read_headers", "read_rows", "unreadable"]

# What numpy and zipfile raise for files that are damaged, encrypted, or not what they seem.
NPZ_ERRORS = (OSError, EOFError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class ArrayHeader:
    """What the header of one .npy member tells. ``shape`` counts rows on axis 0."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    fortran_order: bool


def unreadable(path: Path, error: Exception) -> CalibrationError:
    """The one message for a data file that cannot be read."""
    reason = str(error)
    if "Object arrays" in reason:
        return CalibrationError(
            f"'{path}' holds an array of Python objects", hint="save plain numeric arrays; pickles are never read"
        )
    if "allow_pickle" in reason:  # numpy takes whatever it does not know for a pickle
        reason = f"it is not a {path.suffix} file"
    return CalibrationError(f"cannot read '{path}': {reason}", hint="write the file again; it is damaged or incomplete")


def read_headers(path: Path) -> dict[str, ArrayHeader]:
    """Headers of all arrays of the archive, by name. Raises CalibrationError for a damaged file."""
    try:
        with zipfile.ZipFile(path) as archive:
            headers = {}
            for member in archive.namelist():
                if member.endswith(".npy"):
                    with archive.open(member) as stream:
                        header = _read_header(member.removesuffix(".npy"), stream)
                    headers[header.name] = header
    except NPZ_ERRORS as error:
        raise unreadable(path, error) from error
    return headers


def read_rows(path: Path, name: str) -> Iterator[np.ndarray]:
    """Rows ``array[i : i + 1]`` of one array, read-only; a 0-d array is one row, itself.

    Raises CalibrationError for a damaged file and for Python objects, which are never unpickled.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as stream:
            header = _read_header(name, stream)
            if header.dtype.hasobject:
                raise ValueError("Object arrays cannot be loaded when allow_pickle=False")
            if header.fortran_order and len(header.shape) > 1:
                yield from _column_major_rows(archive, name)
                return
            row_shape = (1, *header.shape[1:]) if header.shape else ()
            row_bytes = math.prod(row_shape) * header.dtype.itemsize
            for _ in range(header.shape[0] if header.shape else 1):
                row = stream.read(row_bytes)
                if len(row) != row_bytes:
                    raise EOFError(f"array '{name}' ends too early")
                yield np.ndarray(row_shape, header.dtype, row)
    except NPZ_ERRORS as error:
        raise unreadable(path, error) from error


def _column_major_rows(archive: zipfile.ZipFile, name: str) -> Iterator[np.ndarray]:
    """Rows of an array in Fortran order lie scattered over the member: unpack it to disk and map it."""
    with tempfile.TemporaryDirectory(prefix="lcpaq-") as folder:
        path = Path(folder, "array.npy")
        with archive.open(f"{name}.npy") as packed, path.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        for index in range(array.shape[0]):
            yield np.array(array[index : index + 1], order="C")


def _read_header(name: str, stream: IO[bytes]) -> ArrayHeader:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        raise ValueError(f"array '{name}' has .npy format {version}, for structured types only")
    return ArrayHeader(name, dtype, shape, fortran_order)
