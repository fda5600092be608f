"""Runs what follows a changed tensor, and only that: everything before it is cached once per batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lcpaq_onnx.graph.subgraph import SuffixExtractor, with_outputs
from lcpaq_onnx.numeric.losses import OutputScale, TeacherLoss, relative_squared_error
from lcpaq_onnx.runtime.calibration import Feed
from lcpaq_onnx.runtime.session import Session
from lcpaq_onnx.tables import ErrorEntry

__all__ = ["CachedBatch", "ChangeLoss", "OpenSuffix", "SuffixRunner", "in_rounds", "joined"]

Array = NDArray[np.generic]


@dataclass(frozen=True, eq=False)
class CachedBatch:
    """Tensors of the float model on one batch: graph outputs, starts of suffixes, their live tensors.
    ``samples``: extent of the feed's axis 0.
    """

    tensors: Mapping[str, Array]
    outputs: Mapping[str, Array]
    samples: int

    def floats(self, name: str) -> NDArray[np.float32]:
        """A cached float tensor."""
        return np.asarray(self.tensors[name], np.float32)


@dataclass(frozen=True, eq=False)
class ChangeLoss:
    """Teacher loss and squared error relative to the output's scale, one entry per sample."""

    loss: NDArray[np.float64]
    squared_error: NDArray[np.float64]

    def entry(self) -> ErrorEntry:
        """Means over the samples, with the standard error of the loss."""
        stderr = float(self.loss.std(ddof=1) / np.sqrt(len(self.loss))) if len(self.loss) > 1 else 0.0
        return ErrorEntry(float(self.loss.mean()), float(self.squared_error.mean()), stderr)


def joined(parts: Sequence[ChangeLoss]) -> ChangeLoss:
    """The samples of several batches in a row."""
    return ChangeLoss(np.concatenate([p.loss for p in parts]), np.concatenate([p.squared_error for p in parts]))


class SuffixRunner:
    """Evaluates the teacher loss of changes to single tensors. One session per suffix, freed when left."""

    def __init__(
        self,
        extractor: SuffixExtractor,
        starts: Iterable[str],
        extra: Iterable[str] = (),
        *,
        base_dir: Path | None = None,
    ) -> None:
        """``starts``: tensors to change. ``extra``: further tensors the caller wants cached (layers' inputs)."""
        self._base_dir = base_dir
        self._outputs = tuple(value.name for value in extractor.model.graph.output)
        self._suffixes = {start: extractor.suffix(start, self._outputs) for start in starts}
        inputs = {value.name for value in extractor.model.graph.input}
        cached = {*extra, *self._suffixes, *(name for s in self._suffixes.values() for name in s.live)}
        self._from_feed = cached & inputs
        self._from_run = sorted(cached - inputs - set(self._outputs))
        self._whole = Session(with_outputs(extractor.model, self._from_run), base_dir=base_dir)

    @property
    def cached_names(self) -> frozenset[str]:
        """Tensors that ``cache`` keeps."""
        return frozenset({*self._from_feed, *self._from_run, *self._outputs})

    def cache(self, feed: Feed) -> CachedBatch:
        """Run the float model once on a batch and keep what suffixes read."""
        values = self._whole.run(feed, [*self._outputs, *self._from_run])
        outputs = {name: values[name] for name in self._outputs}
        samples = next((len(value) for value in feed.values() if value.ndim), 1)
        return CachedBatch(values | {name: feed[name] for name in self._from_feed}, outputs, samples)

    def open(self, start: str, loss: TeacherLoss, scale: OutputScale) -> OpenSuffix:
        """A session for the suffix that begins at ``start``."""
        return OpenSuffix(self, start, loss, scale)


class OpenSuffix:
    def __init__(self, runner: SuffixRunner, start: str, loss: TeacherLoss, scale: OutputScale) -> None:
        self._suffix = runner._suffixes[start]
        self._session = Session(self._suffix.model, base_dir=runner._base_dir) if self._suffix.outputs else None
        self._loss, self._scale = loss, scale

    def evaluate(self, batch: CachedBatch, changed: Array) -> ChangeLoss:
        """Loss of replacing the start tensor by ``changed`` on ``batch``."""
        outputs = dict(batch.outputs)
        if self._session is not None:
            feed = {name: batch.tensors[name] for name in self._suffix.live}
            feed[self._suffix.start] = changed
            # A suffix may be empty of nodes when the start is itself an output.
            outputs |= self._session.run(feed)
        return ChangeLoss(
            self._loss(batch.outputs, outputs), relative_squared_error(batch.outputs, outputs, self._scale)
        )


def in_rounds(batches: Iterable[Feed], cached_bytes_per_sample: int, limit_bytes: int) -> Iterator[list[Feed]]:
    """Batches grouped so that a group's cache stays below ``limit_bytes`` (at least one batch a group)."""
    group: list[Feed] = []
    used = 0
    for batch in batches:
        size = cached_bytes_per_sample * max(1, len(next(iter(batch.values()))) if batch else 1)
        if group and used + size > limit_bytes:
            yield group
            group, used = [], 0
        group.append(batch)
        used += size
    if group:
        yield group
