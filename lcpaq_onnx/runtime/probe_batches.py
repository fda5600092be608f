"""The calibration samples that probes see, in batches that do not depend on how many are asked for.

Samples come in chunks that double: 0 to 31, 32 to 63, 64 to 127, and so on. Results are kept by chunk, so that
an analysis of more samples, or one that was interrupted, measures only what is new.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from lcpaq_onnx.runtime.calibration import CalibrationData, Feed, feed_digest, joined_feed, stacks

__all__ = ["Batch", "Chunk", "ProbeBatches"]

_FIRST_CHUNK = 32
_KEPT_BYTES = 256 << 20


@dataclass(frozen=True)
class Chunk:
    """``sha256``: of the samples' bytes."""

    first: int
    samples: int
    sha256: str


@dataclass(frozen=True, eq=False)
class Batch:
    """``samples`` feeds joined, from number ``first`` of the data on."""

    first: int
    samples: int
    feed: Feed


class ProbeBatches:
    """The first ``samples`` of ``data``; small ones are kept in memory, large ones read again."""

    def __init__(self, data: CalibrationData, samples: int, batch_size: int) -> None:
        self._data, self._samples, self._batch_size = data, samples, batch_size
        self._kept: dict[int, list[Batch]] = {}
        self.chunks = tuple(self._read_chunks())

    @property
    def samples(self) -> int:
        """How many there are; fewer than asked for where the data end."""
        return sum(chunk.samples for chunk in self.chunks)

    def of(self, chunk: Chunk) -> list[Batch]:
        """The batches of one of ``chunks``."""
        if chunk.first in self._kept:
            return self._kept[chunk.first]
        return next(self._batched(first, feeds) for first, feeds in self._by_chunk() if first == chunk.first)

    def _read_chunks(self) -> Iterator[Chunk]:
        kept_bytes = 0
        for first, feeds in self._by_chunk():
            digest = hashlib.sha256()
            # Sample by sample: how many fit in a batch depends on the memory that is free.
            for feed in feeds:
                feed_digest(digest, feed)
                kept_bytes += sum(array.nbytes for array in feed.values())
            if kept_bytes <= _KEPT_BYTES:
                self._kept[first] = self._batched(first, feeds)
            yield Chunk(first, len(feeds), digest.hexdigest())

    def _by_chunk(self) -> Iterator[tuple[int, list[Feed]]]:
        feeds = iter(self._data.take(self._samples))
        first = 0
        while chunk := list(islice(feeds, first or _FIRST_CHUNK)):
            yield first, chunk
            first += len(chunk)

    def _batched(self, first: int, feeds: list[Feed]) -> list[Batch]:
        batches = []
        for stack in stacks(feeds, self._batch_size):
            batches.append(Batch(first, len(stack), joined_feed(stack)))
            first += len(stack)
        return batches
