"""What an analysis may use of the machine, and what it remembers. It changes no figure beyond its last digits."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from lcpaq_onnx.runtime.memory import free_bytes
from lcpaq_onnx.runtime.workers import DEFAULT_WORKERS, SERIAL, Workers, open_workers
from lcpaq_onnx.store import STORE_FILE, MemoryStore, Store, open_store

if TYPE_CHECKING:
    from lcpaq_onnx.runtime.session import SessionOptions

__all__ = ["Execution", "Resources"]

_MOST_CACHE_BYTES = 512 << 20
_MOST_BATCH_BYTES = 128 << 20
_MOST_CARRIED_BYTES = 2 << 30


@dataclass(frozen=True)
class Resources:
    """``workers``: where probes run. ``store``: measured results by content. ``max_memory_bytes``: what an analysis may
    take on top of the model itself, None: half of what is free. ``providers``: ONNX Runtime's execution providers.
    ``subject``: whose results go into the store, for people.
    """

    workers: Workers = SERIAL
    store: Store = field(default_factory=MemoryStore, compare=False)
    max_memory_bytes: int | None = None
    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    subject: str = "model"

    @cached_property
    def cache_bytes(self) -> int:
        """For cached tensors of the float model: a third of the memory, at most 512 MiB. The rest is run again."""
        return min(_MOST_CACHE_BYTES, self._memory_bytes // 3)

    @cached_property
    def batch_bytes(self) -> int:
        """For all tensors of one batch: each worker and the run that fills the cache has one."""
        return min(_MOST_BATCH_BYTES, self._memory_bytes // (3 * (self.workers.count + 1)))

    @cached_property
    def carried_bytes(self) -> int:
        """For what samples carry from layer to layer while weights are rounded one after the other. Not a share of what
        is free: how many samples there are decides the file.
        """
        return _MOST_CARRIED_BYTES if self.max_memory_bytes is None else min(_MOST_CARRIED_BYTES, self.max_memory_bytes)

    @property
    def probe_options(self) -> SessionOptions:
        """One thread: sums in the same order wherever a probe runs."""
        from lcpaq_onnx.runtime.session import SessionOptions  # loads ONNX Runtime, which planning never needs

        return SessionOptions(threads=1, providers=self.providers)

    @property
    def cache_options(self) -> SessionOptions:
        """For runs that fill the cache: without fusions, which depend on what is asked for, so that a tensor has the
        same bits whatever else is cached with it.
        """
        from lcpaq_onnx.runtime.session import SessionOptions

        return SessionOptions("basic", providers=self.providers)

    @cached_property
    def _memory_bytes(self) -> int:
        return free_bytes() // 2 if self.max_memory_bytes is None else self.max_memory_bytes


@dataclass(frozen=True)
class Execution:
    """How the user wants an analysis to run. ``workers``: ``threads``, ``processes``, either with ``:N``, ``serial``,
    ``dask:ADDRESS``, or an executor of ``concurrent.futures``. ``max_memory_bytes``: see ``Resources``. ``cache``:
    folder of the store, None: results are forgotten at the end.
    """

    workers: str | Executor = DEFAULT_WORKERS
    max_memory_bytes: int | None = None
    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    cache: Path | None = None

    @contextmanager
    def resources(self, subject: str = "model") -> Iterator[Resources]:
        """Open; at the end workers that were started here are gone. ``subject``: the model's name. Raises UsageError
        for unknown workers and providers.
        """
        from lcpaq_onnx.runtime.session import check_providers

        check_providers(self.providers)
        with open_workers(self.workers) as workers:
            store = open_store(None if self.cache is None else self.cache / STORE_FILE)
            yield Resources(workers, store, self.max_memory_bytes, self.providers, subject)
