"""The plan: the decisions and nothing else, as reviewable JSON. Applying it twice gives the same bytes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from lcpaq_onnx.errors import LcpaqError, UsageError
from lcpaq_onnx.formats import LayerFormat, QFormat
from lcpaq_onnx.tables import RoundingMethod

__all__ = ["ActivationPlan", "LayerPlan", "Plan", "Predicted", "Proof", "Storage"]

SCHEMA = 2

Storage = Literal["float", "plain", "cast", "packed-bytes"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LayerPlan(_Frozen):
    """One layer. ``format`` is for the reader (``w4a8``), ``weight_format`` the tensor's ``QFormat`` (or ``f32``)."""

    name: str
    op: str
    format: str
    executed: str
    input: str
    input_channels: int = 0
    """Extent of the input along the axis that the weights sum over; only of isolated layers."""
    weight: str
    weight_format: str
    storage: Storage
    scale_source: str = ""
    rounding: RoundingMethod | None = None
    """How the weight's integers are found; None for float layers."""
    bias: str | None = None
    bias_format: Literal["int32", "f32"] | None = None
    isolate_input: bool = False
    """Give this float layer a DequantizeLinear of its own that the runtime's weight requantization does not match."""
    reason: str = ""
    loss: float = 0.0
    loss_stderr: float = 0.0
    size_bytes: int = 0
    latency_us: float = 0.0
    latency_source: str = ""

    @property
    def layer_format(self) -> LayerFormat:
        return LayerFormat.parse(self.format)

    @property
    def qformat(self) -> QFormat:
        """Format of the stored weight; only for quantized layers."""
        return QFormat.parse(self.weight_format)


class ActivationPlan(_Frozen):
    """One activation group. ``format`` is a ``QFormat`` or ``f32``; scale and zero point hold for all its tensors."""

    name: str
    tensors: tuple[str, ...]
    format: str
    scale: float = 0.0
    zero_point: int = 0
    range: tuple[float, float] | None = None
    scale_source: str = ""
    integer_nodes: tuple[str, ...] = ()
    """Nodes that only move the group's values and are written on its integers."""
    reason: str = ""
    loss: float = 0.0
    loss_stderr: float = 0.0

    @property
    def qformat(self) -> QFormat | None:
        """None for a group that stays float."""
        return None if self.format == "f32" else QFormat.parse(self.format)


class Predicted(_Frozen):
    """Totals the plan promises. Errors are of the output (``tables.ErrorEntry``), None where nothing had to be traded
    against error and sensitivities were not measured. Latency is of one sample. ``stored_bits``: mean over all weights
    of layers, float counting 32.
    """

    loss: float | None
    relative_error: float | None
    size_bytes: int
    latency_us: float
    bops: float
    stored_bits: float
    peak_memory_bytes: int
    float_size_bytes: int
    float_latency_us: float
    float_bops: float
    float_peak_memory_bytes: int


class Proof(_Frozen):
    """What the solver proved. ``exchanged``: changes of widths made after that, because cross terms between layers and
    the measured error were for them.
    """

    optimal: bool
    gap: float
    solver: str
    shadow_prices: tuple[str, ...] = ()
    exchanged: tuple[str, ...] = ()


class Plan(_Frozen):
    """All decisions for one model and target."""

    schema_version: int = SCHEMA
    tool_version: str
    source_sha256: str
    target: str
    budgets: tuple[str, ...]
    objective: tuple[str, ...]
    opset: int
    ir_version: int
    layers: tuple[LayerPlan, ...]
    activations: tuple[ActivationPlan, ...]
    predicted: Predicted
    proof: Proof
    rounding_samples: int = 0
    """First calibration samples that compensated rounding goes by; 0 where no layer's rounding is compensated."""
    calibration_sha256: str = ""
    """Of the samples that compensated rounding and rewrites look at; empty where there is neither."""
    rewrites: tuple[str, ...] = ()
    """Passes, as pipeline text, that the prepared model is rewritten by before anything else, in order."""

    def to_json(self) -> str:
        """Stable, indented, ends in a newline."""
        return json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"

    def sha256(self) -> str:
        """Hash of the JSON text; the emitted model carries it."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @classmethod
    def from_json(cls, text: str, *, source: str = "plan") -> Plan:
        """Raises UsageError naming ``source`` and the first field that is wrong."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise UsageError(f"{source} is not JSON: {error}", hint="write it with `lcpaq plan`") from error
        version = data.get("schema_version") if isinstance(data, dict) else None
        if version != SCHEMA:
            message = f"{source} has plan schema {version!r}, this lcpaq reads {SCHEMA}"
            raise UsageError(message, hint="write it again with `lcpaq plan`")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            message = f"{source}: {where}: {first['msg']}"
            raise UsageError(message, hint="correct that field by hand or plan again") from error

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Reads a ``.plan.json`` file. Raises LcpaqError when it cannot be read."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"), source=str(path))
        except OSError as error:
            raise LcpaqError(f"{path}: {error.strerror}", hint="give the path of a .plan.json file") from error
