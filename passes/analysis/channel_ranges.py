"""The interval and the mean square of each channel of given tensors, over the calibration data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from lcpaq_onnx.errors import UsageError
from lcpaq_onnx.graph.graph_io import Graph, to_proto
from lcpaq_onnx.graph.subgraph import with_outputs
from lcpaq_onnx.manager.analysis import Analysis, AnalysisManager
from lcpaq_onnx.runtime.session import Session, SessionOptions

from .batch_size import BatchSize

__all__ = ["ChannelRange", "ChannelRanges"]


@dataclass(frozen=True, eq=False)
class ChannelRange:
    """Least and greatest value and mean square of each channel, float64 [channels]; not finite where a value was not.

    ``count``: values of one channel.
    """

    low: NDArray[np.float64]
    high: NDArray[np.float64]
    mean_square: NDArray[np.float64]
    count: int

    @property
    def is_finite(self) -> bool:
        """Whether all values were."""
        return bool(np.isfinite(self.mean_square).all())


@dataclass(frozen=True)
class ChannelRanges(Analysis[dict[str, ChannelRange]]):
    """``tensors``: pairs of a name and the axis that runs over channels, of fixed extent; -1 is the last. One pass over
    all calibration data, batch by batch. Raises UsageError for a tensor that the model has not, or has not that axis.
    """

    name: ClassVar[str] = "channel-ranges"
    tensors: frozenset[tuple[str, int]] = frozenset()

    def run(self, graph: Graph, analyses: AnalysisManager) -> dict[str, ChannelRange]:
        axes = dict(sorted(self.tensors))
        if not axes:
            return {}
        model = to_proto(graph)
        fed = {value.name for value in model.graph.input}
        written = {name for node in model.graph.node for name in node.output}
        unknown = sorted(axes.keys() - fed - written)
        if unknown:
            raise UsageError(f"the model has no tensor '{unknown[0]}'", hint="see its tensors with `lcpaq inspect`")
        observed = with_outputs(model, [name for name in axes if name not in fed])
        options = SessionOptions(providers=analyses.inputs.resources.providers)
        session = Session(observed, options, base_dir=graph.base_dir)
        ranges: dict[str, ChannelRange] = {}
        with analyses.inputs.progress.track("measuring channels", analyses.inputs.sample_count()) as advance:
            for feed in analyses.inputs.samples().batches(analyses.get(BatchSize)):
                values = feed | session.run(feed, [name for name in axes if name not in fed])
                for name, axis in axes.items():
                    ranges[name] = _widened(ranges.get(name), _range_of(name, values[name], axis))
                advance(len(next(iter(feed.values()))) if analyses.get(BatchSize) > 1 else 1)
        return ranges


def _range_of(name: str, values: NDArray[np.generic], axis: int) -> ChannelRange:
    if not -values.ndim <= axis < values.ndim:
        raise UsageError(f"'{name}' of shape {list(values.shape)} has no axis {axis}", hint="give an axis that it has")
    rows: NDArray[np.float64] = np.moveaxis(values, axis, -1).reshape(-1, values.shape[axis]).astype(np.float64)
    if not len(rows):
        zeros = np.zeros(values.shape[axis])
        return ChannelRange(zeros, zeros, zeros, 0)
    squares: NDArray[np.float64] = np.einsum("rc,rc->c", rows, rows)
    return ChannelRange(rows.min(axis=0), rows.max(axis=0), squares / len(rows), len(rows))


def _widened(known: ChannelRange | None, seen: ChannelRange) -> ChannelRange:
    if known is None or known.count == 0:
        return seen
    count = known.count + seen.count
    mean_square = (known.mean_square * known.count + seen.mean_square * seen.count) / count
    low, high = np.minimum(known.low, seen.low), np.maximum(known.high, seen.high)
    return ChannelRange(low, high, mean_square, count)
