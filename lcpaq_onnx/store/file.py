"""The sqlite file of a store: opened by many threads and processes at once, never half-written, set aside if broken."""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

__all__ = ["DamageError", "StoreFile"]

T = TypeVar("T")

SCHEMA = 1
"""Version of the tables, in the file's ``user_version``."""

# How long to wait for another process that writes.
_PATIENCE_S = 30.0
# Contents stand apart from what is often updated: sqlite rewrites a row as a whole.
_TABLES = (
    """CREATE TABLE entry (
        key TEXT PRIMARY KEY, subject TEXT NOT NULL, what TEXT NOT NULL, bytes INTEGER NOT NULL, last_used REAL NOT NULL
    ) WITHOUT ROWID""",
    "CREATE INDEX entry_by_use ON entry (last_used, bytes)",
    """CREATE TABLE content (
        key TEXT PRIMARY KEY, layout TEXT NOT NULL, arrays BLOB NOT NULL, checksum INTEGER NOT NULL
    )""",
)
# Connections of the parent process in a forked child: to close them here could undo locks that the parent relies on.
_INHERITED: list[sqlite3.Connection] = []


class DamageError(Exception):
    """What the file holds is not what a store wrote."""


class StoreFile:
    """One connection, for one thing at a time; every process has its own, a forked child too."""

    def __init__(self, path: Path) -> None:
        """Opens the file at ``path``, with its folder if need be. Raises OSError."""
        self.path = path
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._identity: os.stat_result | None = None
        self.run(lambda _: None)

    def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """What ``work`` returns; in a damaged or foreign file it is done again on the new one that takes its place.

        Raises OSError: the file cannot be opened, read or written, or stays locked by another process.
        """
        if self._process != os.getpid():
            self._leave_to_parent()
        with self._lock:
            try:
                return self._tried(work)
            except (DamageError, sqlite3.DatabaseError) as error:
                if not (isinstance(error, sqlite3.OperationalError) or _is_damage(error)):
                    raise
                raise OSError(errno.EIO, str(error), str(self.path)) from error

    def close(self) -> None:
        """The next ``run`` opens it again."""
        if self._process != os.getpid():
            self._leave_to_parent()
        with self._lock:
            self._close()

    def _tried(self, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            return work(self._opened())
        except (DamageError, sqlite3.DatabaseError) as error:
            if not _is_damage(error):
                raise
            self._set_aside(str(error))
        return work(self._opened())

    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._identity = self.path.stat() if self.path.exists() else None
            self._connection = sqlite3.connect(
                self.path, timeout=_PATIENCE_S, isolation_level=None, check_same_thread=False
            )
            try:
                _prepare(self._connection)
            except BaseException:
                self._close()
                raise
            self._identity = self.path.stat()
        return self._connection

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _set_aside(self, reason: str) -> None:
        self._close()
        # Another process may have done so already, and what stands here is its new file.
        if self._identity is None or not self.path.exists() or not os.path.samestat(self._identity, self.path.stat()):
            return
        # Before the file itself: a journal left behind would be read into the new file.
        for ending in ("-wal", "-shm", "-journal"):
            self.path.with_name(self.path.name + ending).unlink(missing_ok=True)
        broken = self.path.with_name(self.path.name + ".broken")
        os.replace(self.path, broken)
        warnings.warn(
            f"the store {self.path} cannot be used ({reason}): it is set aside as {broken.name}, and a new one begun",
            stacklevel=2,
        )

    def _leave_to_parent(self) -> None:
        if self._connection is not None:
            _INHERITED.append(self._connection)
        self._connection = None
        self._lock = threading.Lock()
        self._process = os.getpid()


def _is_damage(error: Exception) -> bool:
    # sqlite's own class for "malformed" and "not a database" is the base of all others.
    return type(error) in (DamageError, sqlite3.DatabaseError)


def _prepare(connection: sqlite3.Connection) -> None:
    """Raises DamageError when something else than a store of this schema is in the file."""
    with connection:
        connection.execute("BEGIN")
        is_new = _is_empty(connection)
    if is_new:
        # Only possible before the first page is written.
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
    _use_wal(connection)
    connection.execute("PRAGMA synchronous = NORMAL")
    if not is_new:
        return
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        # Asked again under the lock: another process may have been faster.
        if _is_empty(connection):
            for statement in _TABLES:
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {SCHEMA}")


def _is_empty(connection: sqlite3.Connection) -> bool:
    """Within a transaction, since another process may write the tables between the two questions."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if (version, tables) == (SCHEMA, {"entry", "content"}):
        return False
    if (version, tables) == (0, set()):
        return True
    raise DamageError(f"it holds tables of version {version}, not {SCHEMA}" if tables else f"version {version}")


def _use_wal(connection: sqlite3.Connection) -> None:
    """Lets readers and a writer work side by side; a file system that cannot keeps sqlite's rollback journal."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            # Two processes that open a new file at once: here sqlite does not wait by itself.
            if "locked" not in str(error) or time.monotonic() > deadline:
                return
            time.sleep(0.01)
