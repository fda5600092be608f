"""What an entry is found by: one hash of all that decides its value."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from pathlib import Path

import numpy as np

from lcpaq_onnx.provenance import TOOL_VERSION

__all__ = ["code_version", "key_of"]

# Modules whose code decides a value that is stored; the rest plans with these values, or prints them.
_DECIDING = ("numeric", "graph", "runtime", "passes", "formats", "tables")
_RUNTIMES = ("onnxruntime", *(f"onnxruntime-{kind}" for kind in ("gpu", "openvino", "directml", "qnn")))


def key_of(*parts: str | bytes | int | float) -> str:
    """SHA-256 of the parts, hexadecimal. Parts that differ in value, type, number or division give different keys.

    Raises TypeError on other types: numpy's numbers are to be converted first.
    """
    digest = hashlib.sha256()
    for part in parts:
        tag, content = _tagged(part)
        digest.update(tag + len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


@functools.cache
def code_version(*further: str) -> str:
    """Hash of the code that decides values: its sources here, and the versions of numpy and ONNX Runtime. ``further``:
    other modules and packages of lcpaq_onnx that have a say.

    ONNX Runtime's is read from the metadata of its package, since its import takes long.
    """
    from importlib import metadata

    versions = [f"lcpaq {TOOL_VERSION}", f"numpy {np.__version__}"]
    for name in _RUNTIMES:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    sources = [part for module in (*_DECIDING, *further) for part in _sources(module)]
    return key_of(*versions, *sources)


def _sources(module: str) -> list[str | bytes]:
    """Names and contents of the files of a module or package of lcpaq_onnx, without importing it."""
    spec = importlib.util.find_spec(f"lcpaq_onnx.{module}")
    assert spec is not None, module
    assert spec.origin is not None, module
    origin = Path(spec.origin)
    folder = origin.parent
    files = [origin] if spec.submodule_search_locations is None else sorted(folder.rglob("*.py"))
    return [part for file in files for part in (f"{module} {file.relative_to(folder).as_posix()}", file.read_bytes())]


def _tagged(part: str | bytes | int | float) -> tuple[bytes, bytes]:
    if isinstance(part, bytes):
        return b"b", part
    if isinstance(part, str):
        return b"s", part.encode("utf-8", "surrogatepass")
    if isinstance(part, int):
        return b"i", str(part).encode()
    if isinstance(part, float):
        return b"f", part.hex().encode()
    raise TypeError(f"a part of a key is a text, bytes or a number, not {type(part).__name__}")
