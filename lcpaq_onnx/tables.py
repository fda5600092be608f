"""What analyses measure, as plain values: ranges, Hessian diagonals, errors. JSON through pydantic's TypeAdapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from lcpaq_onnx.formats import LayerFormat

__all__ = [
    "ActivationRange",
    "Audit",
    "Compensable",
    "Cost",
    "CostTable",
    "ErrorEntry",
    "ErrorTable",
    "HessianDiagonal",
    "LiveStep",
    "Measurements",
    "RecordedTensor",
    "RoundingMethod",
    "Sensitivity",
]

RoundingMethod = Literal["nearest", "compensated"]
"""Of weights: each to its nearest integer, or so that errors make up for each other (``numeric.compensated``)."""


@dataclass(frozen=True)
class RecordedTensor:
    """Element type (numpy name) and shape of a tensor as seen when the model ran once; axis 0 is the batch."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        count = 1
        for extent in self.shape:
            count *= extent
        return count

    @property
    def bytes(self) -> int:
        """Size in memory; sub-byte types count a whole byte."""
        return self.elements * (np.dtype(self.dtype).itemsize if self.dtype in np.sctypeDict else 1)


@dataclass(frozen=True)
class ActivationRange:
    """Interval of values a tensor's integers must cover, and the method that chose it."""

    low: float
    high: float
    minimum: float
    maximum: float
    method: str


@dataclass(frozen=True)
class HessianDiagonal:
    """Second derivatives of the teacher loss by a layer's weights. Standard errors are over samples.

    ``trace``: sum of the diagonal. ``channel_mean``: mean diagonal entry of each output channel (one entry where the
    weight has no channel axis). ``squared_error_per_loss``: squared error of the output relative to its scale that
    comes with one unit of loss, for ``error<=…%`` budgets.
    """

    trace: float
    trace_stderr: float
    relative_stderr: float
    squared_error_per_loss: float
    channel_mean: tuple[float, ...]
    channel_stderr: tuple[float, ...]
    samples: int


@dataclass(frozen=True)
class ErrorEntry:
    """Predicted contribution of one decision to the output's error.

    ``loss``: teacher loss (KL in nats for class scores, normalised squared error otherwise). ``squared_error``: mean
    squared error over the squared output scale. Both add up over decisions to first order.
    """

    loss: float
    squared_error: float
    loss_stderr: float = 0.0


@dataclass(frozen=True)
class ErrorTable:
    """Layer → stored weight bits → error; activation group → activation bits → error. Float costs no error.

    ``blocks``: layer → ``w4b32`` → squared rounding error with a scale for each block, over that of the same width with
    one for each channel.
    """

    layers: dict[str, dict[int, ErrorEntry]] = field(default_factory=dict)
    activations: dict[str, dict[int, ErrorEntry]] = field(default_factory=dict)
    blocks: dict[str, dict[str, float]] = field(default_factory=dict)

    def of_layer(self, name: str, format: LayerFormat) -> ErrorEntry | None:
        """Error of the layer's weights in ``format``; None where there is none, or none is known."""
        entry = None if format.weight_bits is None else self.layers.get(name, {}).get(format.weight_bits)
        share = self.blocks.get(name, {}).get(format.stored, 1.0)
        if entry is None or share == 1.0:
            return entry
        return ErrorEntry(share * entry.loss, share * entry.squared_error, share * entry.loss_stderr)


@dataclass(frozen=True)
class Cost:
    """What one decision adds: bytes in the file, time at the recorded shapes, bit operations. ``source`` says where
    the time comes from (``table`` or ``roofline``).
    """

    size_bytes: int = 0
    latency_us: float = 0.0
    bops: float = 0.0
    source: str = ""


@dataclass(frozen=True)
class CostTable:
    """Costs on one target. Formats are texts: ``w4a8`` for layers, ``a8`` or ``f32`` for activation groups, ``int8`` or
    ``f32`` for operators.

    ``storage``: how what is stored (``w4``, ``w4b32``) stands in the file. ``isolated``: extra DequantizeLinear of a
    float layer. ``unpack``: bytes that all packed layers of one width share. ``reference``: totals of the float model.
    """

    layers: dict[str, dict[str, Cost]]
    activations: dict[str, dict[str, Cost]]
    operators: dict[str, dict[str, Cost]]
    isolated: dict[str, Cost]
    unpack: dict[int, int]
    storage: dict[str, str]
    fixed_size_bytes: int
    reference: Cost


@dataclass(frozen=True)
class LiveStep:
    """What is alive while ``node`` runs: bytes of tensors that no decision moves, elements of the groups."""

    node: str
    fixed_bytes: int
    groups: dict[str, int]


@dataclass(frozen=True)
class Audit:
    """The error table against the truth: losses of random plans (stored widths drawn at random, activations in float),
    ``predicted`` by the table and ``measured`` whole, on samples that the table has not seen where there are more than
    its ``samples``; Spearman's rank correlation of the two with its 95 % confidence interval.
    """

    predicted: tuple[float, ...]
    measured: tuple[float, ...]
    rank_correlation: float
    low: float
    high: float
    samples: int


@dataclass(frozen=True)
class Sensitivity:
    """How the error table was made. ``estimator``: in effect. ``measured_entries``: of ``entries`` layer × width.
    ``note``: why another estimator than the one asked for was used; empty where it was not.
    """

    estimator: str
    samples: int
    measured_entries: int
    entries: int
    audit: Audit | None = None
    note: str = ""


@dataclass(frozen=True)
class Compensable:
    """``layers`` whose rounding can be compensated, by the first ``samples`` calibration samples. ``data_sha256``: of
    all samples that may decide anything when a plan is applied.
    """

    layers: tuple[str, ...]
    data_sha256: str
    samples: int


@dataclass(frozen=True)
class Measurements:
    """Everything measured on the model with calibration data: enough to plan for any target and budget."""

    schema: int
    tool_version: str
    source_sha256: str
    source_size_bytes: int
    calibration: str
    loss: str
    tensors: dict[str, RecordedTensor]
    ranges: dict[str, ActivationRange]
    hessian: dict[str, HessianDiagonal]
    errors: ErrorTable
    sensitivity: Sensitivity | None = None
    compensable: Compensable | None = None
