"""A store that all processes share and that survives them."""

from __future__ import annotations

import json
import sqlite3
import time
import warnings
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

from lcpaq_onnx.store.file import DamageError, StoreFile
from lcpaq_onnx.store.memory import MemoryStore
from lcpaq_onnx.store.packing import Arrays, checksum, pack, unpack

__all__ = ["DiskStore", "Holding"]

_LIMIT_BYTES = 2 << 30
_RECENT_BYTES = 256 << 20
_ROW_BYTES = 400  # of an entry beside its arrays: the key four times, names, numbers
_BLOB_BYTES = 10**9  # sqlite's own limit


@dataclass(frozen=True)
class Holding:
    """All entries of one subject and one kind. ``bytes``: on disk, about. ``last_used``: the latest of them, in UTC."""

    subject: str
    what: str
    entries: int
    bytes: int
    last_used: datetime


class DiskStore:
    """One file, shared by all processes that open it; what ``put`` was given survives a killed process.

    Above ``limit_bytes`` of file the least recently used entries go. What this process put or got stays in memory too
    (256 MiB of it). A file that is damaged or of another version is set aside with a warning; where nothing can be
    written, one warning says so and the store goes on in memory. The constructor raises OSError.
    """

    def __init__(self, path: Path, limit_bytes: int = _LIMIT_BYTES) -> None:
        self.path = path
        self.limit_bytes = limit_bytes
        self._recent = MemoryStore(_RECENT_BYTES)
        self._file = StoreFile(path)
        self._writes = True
        weakref.finalize(self, self._file.close)

    def __enter__(self) -> DiskStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def get(self, key: str) -> dict[str, NDArray[Any]] | None:
        return self.get_many((key,)).get(key)

    def get_many(self, keys: Iterable[str]) -> dict[str, dict[str, NDArray[Any]]]:
        wanted = list(keys)
        found = self._recent.get_many(wanted)
        missing = [key for key in wanted if key not in found]
        if missing:
            found.update(self._from_file(json.dumps(missing)))
        return {key: found[key] for key in wanted if key in found}

    def put(self, key: str, arrays: Arrays, *, subject: str, what: str) -> None:
        layout, content = pack(arrays)
        self._recent.keep(key, unpack(layout, content))
        size = len(content) + len(layout) + _ROW_BYTES
        if not self._writes or size > min(self.limit_bytes, _BLOB_BYTES):
            return

        def write(connection: sqlite3.Connection) -> None:
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                # The name of a file need not be Unicode, what sqlite holds must be.
                name = subject.encode("utf-8", "replace").decode("utf-8")
                row = (key, name, what, size, time.time())
                connection.execute("INSERT OR REPLACE INTO entry VALUES (?, ?, ?, ?, ?)", row)
                value = (key, layout, content, checksum(key, layout, content))
                connection.execute("INSERT OR REPLACE INTO content VALUES (?, ?, ?, ?)", value)
                _make_room(connection, self.limit_bytes, newest=key)

        try:
            self._file.run(write)
        except OSError as error:
            self._go_on_without(error)

    def contents(self) -> tuple[Holding, ...]:
        """What there is, sorted by subject and kind. Raises OSError."""
        query = "SELECT subject, what, count(*), sum(bytes), max(last_used) FROM entry GROUP BY 1, 2 ORDER BY 1, 2"
        rows = self._file.run(lambda connection: connection.execute(query).fetchall())
        return tuple(
            Holding(subject, what, entries, size, datetime.fromtimestamp(used, timezone.utc))
            for subject, what, entries, size, used in rows
        )

    def clear(self, subject: str | None = None) -> int:
        """Remove all entries, or those of one subject, and shrink the file; returns their number. Raises OSError."""
        self._recent.forget()

        def remove(connection: sqlite3.Connection) -> int:
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                query = "SELECT key FROM entry WHERE :subject IS NULL OR subject = :subject"
                keys = [key for (key,) in connection.execute(query, {"subject": subject})]
                _delete(connection, keys)
            # `execute` would stop after the first page.
            connection.executescript("PRAGMA incremental_vacuum")
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            return len(keys)

        return self._file.run(remove)

    def close(self) -> None:
        """Let go of the file; a later call opens it again."""
        self._file.close()

    def _from_file(self, keys: str) -> dict[str, dict[str, NDArray[Any]]]:
        """``keys``: a JSON list."""
        read: dict[str, dict[str, NDArray[Any]]] = {}
        try:
            read = self._file.run(lambda connection: _read(connection, keys))
            if read and self._writes:
                self._file.run(lambda connection: _touch(connection, keys))
        except OSError as error:
            self._go_on_without(error)
        for key, arrays in read.items():
            self._recent.keep(key, arrays)
        return {key: dict(arrays) for key, arrays in read.items()}

    def _go_on_without(self, error: OSError) -> None:
        if self._writes:
            self._writes = False
            reason = error.strerror or error
            warnings.warn(
                f"the store {self.path} does not work ({reason}): what is measured now is not kept", stacklevel=3
            )


# ---- on the open file -----------------------------------------------------------------------------------------------
_AMONG = "WHERE key IN (SELECT value FROM json_each(?))"


def _read(connection: sqlite3.Connection, keys: str) -> dict[str, dict[str, NDArray[Any]]]:
    """``keys``: a JSON list. Raises DamageError."""
    found: dict[str, dict[str, NDArray[Any]]] = {}
    query = f"SELECT key, layout, arrays, checksum FROM content {_AMONG}"
    for key, layout, content, written in connection.execute(query, (keys,)):
        if checksum(key, layout, content) != written:
            raise DamageError("its content has changed")
        found[key] = unpack(layout, content)
    return found


def _touch(connection: sqlite3.Connection, keys: str) -> None:
    connection.execute(f"UPDATE entry SET last_used = ? {_AMONG}", (time.time(), keys))


def _delete(connection: sqlite3.Connection, keys: list[str]) -> None:
    for table in ("entry", "content"):
        connection.execute(f"DELETE FROM {table} {_AMONG}", (json.dumps(keys),))


def _make_room(connection: sqlite3.Connection, limit_bytes: int, newest: str) -> None:
    """Delete the least recently used until the pages in use fit; ``newest`` stays."""
    pages, free, page_bytes = (
        connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
    )
    excess_bytes = (pages - free) * page_bytes - limit_bytes
    oldest = []
    query = "SELECT key, bytes FROM entry WHERE key != ? ORDER BY last_used"
    for key, size in connection.execute(query, (newest,)) if excess_bytes > 0 else ():
        oldest.append(key)
        excess_bytes -= size
        if excess_bytes <= 0:
            break
    if oldest:
        _delete(connection, oldest)
