"""One job of a sensitivity analysis: move one tensor in some directions, run what follows, compare the outputs.

A job holds plain values only, so it can run in this thread, in another, or in a process far away, with the same bits as
result: its sessions have one thread, and random draws belong to samples, not to jobs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lcpaq_onnx.graph.subgraph import Suffix
from lcpaq_onnx.numeric.directions import BlockSigns, Direction, Quantizing, Rounding, Signs, WeightDirection
from lcpaq_onnx.numeric.hutchinson import LayerProbe
from lcpaq_onnx.numeric.losses import BuiltinLoss, OutputScale, TeacherLoss, relative_squared_error
from lcpaq_onnx.numeric.projection import projected
from lcpaq_onnx.runtime.response import LayerResponse
from lcpaq_onnx.runtime.session import Session, SessionOptions
from lcpaq_onnx.tables import ErrorEntry

__all__ = ["LinearLayer", "ProbeJob", "ProbeResult", "StartBatch", "joined", "run_probes"]

Array = NDArray[np.generic]
Float = NDArray[np.float32]

EMBEDDING_LENGTH = 128
"""Numbers kept of each sample's output change: cross terms of layers are inner products of these."""
_DRAW_BYTES = 64 << 20
# Of a sample whose outputs overflow: so bad that no plan takes it, and still a number that can be added up.
_BEYOND = 1e9


@dataclass(frozen=True, eq=False)
class LinearLayer:
    """The layer whose raw output the start is. ``by_sample``: rows of its input stand sample by sample in a batch.
    ``errors``: by which its weight moves when it is rounded.
    """

    name: str
    op: str
    attrs: Mapping[str, object]
    input: str
    weight: Float
    channel_axis: int | None
    by_sample: bool
    errors: Mapping[Rounding, Float]


@dataclass(frozen=True, eq=False)
class StartBatch:
    """Tensors of the float model on ``samples`` samples, the first of which has number ``first`` in the data: the
    start, what its suffix reads besides, what its directions read; ``outputs`` of the whole model.
    """

    first: int
    samples: int
    tensors: Mapping[str, Array]
    outputs: Mapping[str, Array]

    def floats(self, name: str) -> Float:
        """A cached float tensor."""
        return np.asarray(self.tensors[name], np.float32)

    def only(self, names: frozenset[str]) -> StartBatch:
        """The same with just these tensors."""
        return replace(self, tensors={name: value for name, value in self.tensors.items() if name in names})

    @property
    def numbers(self) -> range:
        """Of the samples in the data."""
        return range(self.first, self.first + self.samples)


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """Per sample: teacher loss, squared error relative to the output's scale, number of the sample whose draw was used
    (its own, where draws are not shared). ``embedding`` [samples, k]: the output's change, ½‖row‖² ≈ the loss where it
    is small; k is 0 for random directions and for a loss of the user's own.
    """

    loss: NDArray[np.float64]
    squared_error: NDArray[np.float64]
    draw: NDArray[np.int64]
    embedding: Float

    def entry(self) -> ErrorEntry:
        """Means over the samples, with the standard error of the loss."""
        loss, squared_error = (np.nan_to_num(v, nan=_BEYOND, posinf=_BEYOND) for v in (self.loss, self.squared_error))
        stderr = float(loss.std(ddof=1) / np.sqrt(len(loss))) if len(loss) > 1 else 0.0
        return ErrorEntry(float(loss.mean()), float(squared_error.mean()), stderr)


@dataclass(frozen=True, eq=False)
class ProbeJob:
    """``suffix`` with all that its probes read; ``layer``: whose raw output the start is, None for other tensors."""

    suffix: Suffix
    base_dir: Path | None
    layer: LinearLayer | None
    directions: tuple[Direction, ...]
    batches: tuple[StartBatch, ...]
    loss: TeacherLoss
    scale: OutputScale
    options: SessionOptions


def joined(parts: Sequence[ProbeResult]) -> ProbeResult:
    """The samples of several results in a row."""
    return ProbeResult(
        np.concatenate([part.loss for part in parts]),
        np.concatenate([part.squared_error for part in parts]),
        np.concatenate([part.draw for part in parts]),
        _equally_long([part.embedding for part in parts]),
    )


def _equally_long(embeddings: Sequence[Float]) -> Float:
    """All rows, with zeros behind the shorter ones: outputs of unlike shapes. Inner products stay."""
    longest = max(rows.shape[1] for rows in embeddings)
    return np.concatenate([np.pad(rows, ((0, 0), (0, longest - rows.shape[1]))) for rows in embeddings])


def run_probes(job: ProbeJob) -> tuple[tuple[ProbeResult, ...], ...]:
    """For each direction a result on each batch. Raises ModelError when the suffix does not run."""
    behind = _Behind(job)
    mover = None if job.layer is None else _Mover.of(job.layer, job.suffix.start, job.options)
    results = []
    for direction in job.directions:
        if isinstance(direction, Quantizing):
            parts = [behind(b, direction.changed(b.floats(direction.tensor)), embed=True) for b in job.batches]
        else:
            assert mover is not None  # who asks for a change of weights names a layer's raw output
            parts = [mover.result(behind, batch, direction) for batch in job.batches]
        results.append(tuple(parts))
    return tuple(results)


@dataclass(frozen=True, eq=False)
class _Mover:
    """Turns a change of weights into a change of the layer's output."""

    layer: LinearLayer
    start: str
    respond: LayerResponse
    probe: LayerProbe

    @classmethod
    def of(cls, layer: LinearLayer, start: str, options: SessionOptions) -> _Mover:
        respond = LayerResponse(layer.op, layer.attrs, options)
        return cls(layer, start, respond, LayerProbe(layer.weight, layer.channel_axis))

    def result(self, behind: _Behind, batch: StartBatch, direction: WeightDirection) -> ProbeResult:
        x, y = batch.floats(self.layer.input), batch.floats(self.start)
        if isinstance(direction, Rounding):
            return behind(batch, y + self.respond(x, self.layer.errors[direction][None]), embed=True)
        if not self.layer.by_sample:
            # All rows move together, so the whole batch shares one draw.
            v = direction.draws(self.probe, self.layer.name, batch.numbers[:1])
            return behind(batch, y + self.respond(x, v), shared=True)
        return behind(batch, y + self._responses(x, batch, direction))

    def _responses(self, x: Float, batch: StartBatch, direction: Signs | BlockSigns) -> Float:
        """Every sample with its own draw; as many at once as fit in 64 MiB."""
        at_once = max(1, _DRAW_BYTES // (4 * max(1, self.probe.elements)))
        rows = len(x) // batch.samples
        parts = []
        for first in range(0, batch.samples, at_once):
            numbers = batch.numbers[first : first + at_once]
            v = direction.draws(self.probe, self.layer.name, numbers)
            parts.append(self.respond(x[first * rows : (first + len(numbers)) * rows], v))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


class _Behind:
    """What follows the start: changed start → result."""

    def __init__(self, job: ProbeJob) -> None:
        self._suffix, self._loss, self._scale = job.suffix, job.loss, job.scale
        has_outputs = bool(job.suffix.outputs)
        self._session = Session(job.suffix.model, job.options, base_dir=job.base_dir) if has_outputs else None

    def __call__(self, batch: StartBatch, changed: Array, *, embed: bool = False, shared: bool = False) -> ProbeResult:
        outputs = dict(batch.outputs)
        if self._session is not None:
            feed = {name: batch.tensors[name] for name in self._suffix.live}
            feed[self._suffix.start] = changed
            outputs |= self._session.run(feed)
        loss = self._loss(batch.outputs, outputs)
        # A single feed may hold several rows.
        own = np.arange(len(loss)) if len(loss) == batch.samples and not shared else np.zeros(len(loss))
        return ProbeResult(
            loss=loss,
            squared_error=relative_squared_error(batch.outputs, outputs, self._scale),
            draw=own.astype(np.int64) + batch.first,
            embedding=self._embedding(batch, outputs, len(loss)) if embed else np.zeros((len(loss), 0), np.float32),
        )

    def _embedding(self, batch: StartBatch, outputs: Mapping[str, Array], samples: int) -> Float:
        if not isinstance(self._loss, BuiltinLoss):
            return np.zeros((samples, 0), np.float32)
        return projected(self._loss.embed(batch.outputs, outputs), EMBEDDING_LENGTH).astype(np.float32)
