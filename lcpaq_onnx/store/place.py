"""Where the store lies, and opening what can be opened there."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

from lcpaq_onnx.errors import UsageError
from lcpaq_onnx.store.disk import DiskStore
from lcpaq_onnx.store.memory import MemoryStore, Store

__all__ = ["STORE_FILE", "default_path", "open_store"]

STORE_FILE = "store.sqlite"
"""Name of the file within its folder."""


def open_store(path: Path | None) -> Store:
    """The store in the file ``path``; one that lasts as long as the process for None, or, with a warning, where no file
    can be.
    """
    if path is None:
        return MemoryStore()
    try:
        return DiskStore(path)
    except OSError as error:
        reason = error.strerror or error
        warnings.warn(f"no store can be at {path} ({reason}): what is measured is not kept", stacklevel=2)
        return MemoryStore()


def default_path() -> Path:
    """Where the store lies unless told otherwise: in the folder ``LCPAQ_CACHE``, else in ``lcpaq`` in the user's folder
    for caches. Raises UsageError when the user has none.
    """
    named = os.environ.get("LCPAQ_CACHE")
    if named:
        return Path(named) / STORE_FILE
    folder = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME", "")
    # The XDG specification: a relative path is to be ignored.
    if os.path.isabs(folder):
        return Path(folder) / "lcpaq" / STORE_FILE
    home = os.path.expanduser("~")
    if not os.path.isabs(home):
        raise UsageError("you have no home directory to keep a store in", hint="name a folder with LCPAQ_CACHE")
    return Path(home) / ".cache" / "lcpaq" / STORE_FILE
