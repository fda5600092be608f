"""What every store can do, and the one that lasts as long as the process."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, Protocol

from numpy.typing import NDArray

from lcpaq_onnx.store.packing import Arrays, pack, unpack

__all__ = ["MemoryStore", "Store"]


class Store(Protocol):
    """Small sets of named arrays by key (``key_of``). Safe to use from several threads."""

    def get(self, key: str) -> dict[str, NDArray[Any]] | None:
        """What was put, equal to the bit and read-only; None if there is nothing."""

    def get_many(self, keys: Iterable[str]) -> dict[str, dict[str, NDArray[Any]]]:
        """What there is of ``keys``, by key and in their order."""

    def put(self, key: str, arrays: Arrays, *, subject: str, what: str) -> None:
        """Keep a copy. ``subject``: the model's name; ``what``: a word such as ``probe``; both for people only.

        Raises TypeError on arrays that are not of plain numbers.
        """


class MemoryStore:
    """Lasts as long as the process. Above ``limit_bytes`` of arrays the least recently used go."""

    def __init__(self, limit_bytes: float = math.inf) -> None:
        self._limit_bytes = limit_bytes
        self._bytes = 0
        self._held: OrderedDict[str, dict[str, NDArray[Any]]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> dict[str, NDArray[Any]] | None:
        return self.get_many((key,)).get(key)

    def get_many(self, keys: Iterable[str]) -> dict[str, dict[str, NDArray[Any]]]:
        found = {}
        with self._lock:
            for key in keys:
                if key in self._held:
                    self._held.move_to_end(key)
                    found[key] = dict(self._held[key])
        return found

    def put(self, key: str, arrays: Arrays, *, subject: str, what: str) -> None:
        self.keep(key, unpack(*pack(arrays)))

    def keep(self, key: str, arrays: dict[str, NDArray[Any]]) -> None:
        """Like ``put``, without a copy: nobody may write to ``arrays`` any more."""
        with self._lock:
            self._bytes += _size(arrays) - _size(self._held.pop(key, {}))
            self._held[key] = arrays
            while self._bytes > self._limit_bytes:
                self._bytes -= _size(self._held.popitem(last=False)[1])

    def forget(self) -> None:
        """Drop everything."""
        with self._lock:
            self._held.clear()
            self._bytes = 0


def _size(arrays: Arrays) -> int:
    return sum(array.nbytes for array in arrays.values())
