"""Named arrays as one text and one run of bytes, and back to the bit."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Arrays", "checksum", "pack", "unpack"]

Arrays = Mapping[str, NDArray[Any]]

_ALIGNED_BYTES = 16


def pack(arrays: Arrays) -> tuple[str, bytes]:
    """JSON of name, dtype, shape and offset of each, and their bytes."""
    layout, parts, offset = [], [], 0
    for name, array in arrays.items():
        if array.dtype.kind not in "biufc":
            raise TypeError(f"array '{name}' of {array.dtype} is not of plain numbers")
        content = array.tobytes()
        content += bytes(-len(content) % _ALIGNED_BYTES)
        layout.append((name, array.dtype.str, array.shape, offset))
        parts.append(content)
        offset += len(content)
    return json.dumps(layout), b"".join(parts)


def unpack(layout: str, content: bytes) -> dict[str, NDArray[Any]]:
    """Views of ``content``, read-only as it is."""
    return {
        name: np.ndarray(tuple(shape), np.dtype(dtype), content, offset)
        for name, dtype, shape, offset in json.loads(layout)
    }


def checksum(key: str, layout: str, content: bytes) -> int:
    """CRC-32 of an entry as it is written: sqlite does not notice a flipped bit."""
    return zlib.crc32(content, zlib.crc32(f"{key}{layout}".encode()))
