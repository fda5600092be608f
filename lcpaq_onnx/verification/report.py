"""The report: what was promised beside what was measured, as JSON. ``report_text`` renders it for reading."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from lcpaq_onnx.errors import LcpaqError, UsageError
from lcpaq_onnx.formats import LayerFormat
from lcpaq_onnx.planning.plan import Proof
from lcpaq_onnx.tables import Sensitivity
from lcpaq_onnx.targets.schema import EXECUTED_BITS

__all__ = [
    "FLOAT_BITS",
    "INTEGER_BITS",
    "ActivationRow",
    "BitSummary",
    "Check",
    "Environment",
    "KernelSummary",
    "LatencyMeasure",
    "LayerRow",
    "ModelFile",
    "Report",
    "Totals",
    "executed_bits",
]

SCHEMA = 2

INTEGER_BITS, FLOAT_BITS = 8, 32
"""Of the products of ONNX Runtime's kernels."""

Raw = dict[str, object]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Check(_Frozen):
    """One check of the emitted file. ``detail`` says what was seen and, where a limit was applied, why that limit."""

    name: str
    passed: bool
    detail: str


class ModelFile(_Frozen):
    """A model by its file name (no folder) and hash; ``size_bytes`` includes external data."""

    name: str
    sha256: str
    size_bytes: int


class Environment(_Frozen):
    """Where it was measured. Nothing here names a machine or a user."""

    onnxruntime: str
    threads: int
    cpu_count: int
    machine: str


class Totals(_Frozen):
    """Figures of one model; None: not measured or does not apply.

    ``relative_error``: root mean square error over the output's range. ``agreement``: share of samples whose decision
    is the float model's (class scores only). ``latency_us``: one sample, median. ``load_ms``: from the file to a ready
    session, packed weights unpacked; least of a few. ``bops``: multiply-accumulates × weight bits × activation bits, as
    executed.
    """

    size_bytes: int | None = None
    latency_us: float | None = None
    load_ms: float | None = None
    bops: float | None = None
    peak_memory_bytes: int | None = None
    loss: float | None = None
    loss_stderr: float | None = None
    relative_error: float | None = None
    agreement: float | None = None


class LatencyMeasure(_Frozen):
    """Both models in turns on one sample. ``speedup``: median of the rounds' own ratios, with their quartiles."""

    rounds: int
    float_median_us: float
    float_minimum_us: float
    median_us: float
    minimum_us: float
    speedup: float
    speedup_low: float
    speedup_high: float


class KernelSummary(_Frozen):
    """Multiply-accumulates of all layers (one sample), those in integer kernels, and conversions left in the graph."""

    macs: int
    integer_macs: int
    layers: int
    integer_layers: int
    quantize_nodes: int
    dequantize_nodes: int

    @property
    def integer_share(self) -> float:
        """From 0 to 1; by layers where no layer multiplies."""
        if self.macs:
            return self.integer_macs / self.macs
        return self.integer_layers / self.layers if self.layers else 0.0


class BitSummary(_Frozen):
    """Means over the layers. ``stored``: bits of a weight in the file, ``stored_in_all`` with scales, biases and the
    nodes that restore them (those that layers share apart). ``executed``: bits that a multiplication runs in, over all
    of them; over layers where none multiplies.
    """

    stored: float
    stored_in_all: float
    executed: float


class LayerRow(_Frozen):
    """One layer. ``executed``: planned; ``kernel``: the operator that ONNX Runtime ran (empty: not found);
    ``float_reason``: why it did not run in integer (empty: it did). ``stored_bits``: of a weight in the file;
    ``executed_bits``: of its products in that kernel, else as planned. ``size_bytes`` is the plan's.
    """

    name: str
    op: str
    format: str
    executed: str
    kernel: str
    is_integer: bool
    float_reason: str
    storage: str
    stored_bits: int
    executed_bits: int
    parameters: int
    size_bytes: int
    macs: int
    loss: float
    loss_stderr: float
    reason: str


def executed_bits(executed: str, kernel: str, *, is_integer: bool) -> int:
    """Bits of the products: in the kernel that ran, else (``kernel`` empty) in what was planned to be executed."""
    if not kernel:
        return EXECUTED_BITS.get(executed, FLOAT_BITS)
    return INTEGER_BITS if is_integer else FLOAT_BITS


class ActivationRow(_Frozen):
    """One activation group; ``tensors`` counts them."""

    name: str
    tensors: int
    format: str
    scale: float
    zero_point: int
    range: tuple[float, float] | None
    loss: float
    loss_stderr: float
    reason: str


class Report(_Frozen):
    """Everything verification found. ``float_*`` are the float model's figures. ``loss_name``: what ``loss`` means.
    ``samples``: how many calibration samples the measured errors are from. ``sensitivity``: None where no error was
    traded against anything, or the plan came from a file. ``rewrites``: of the plan; ``loss_without_rewrites``:
    measured loss of the best plan without them, None where that was not measured.
    """

    schema_version: int = SCHEMA
    tool_version: str
    source: ModelFile
    emitted: ModelFile
    plan_sha256: str
    target: str
    budgets: tuple[str, ...]
    objective: tuple[str, ...]
    environment: Environment
    calibration: str
    samples: int
    loss_name: str
    promised: Totals
    measured: Totals
    float_promised: Totals
    float_measured: Totals
    latency: LatencyMeasure | None
    kernels: KernelSummary | None
    bits: BitSummary | None = None
    checks: tuple[Check, ...]
    warnings: tuple[str, ...]
    layers: tuple[LayerRow, ...]
    activations: tuple[ActivationRow, ...]
    proof: Proof
    sensitivity: Sensitivity | None = None
    rounding_samples: int = 0
    """Calibration samples that weights were rounded by, and which the measured error has seen; 0: to nearest."""
    rewrites: tuple[str, ...] = ()
    loss_without_rewrites: float | None = None

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    @property
    def failed_checks(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if not check.passed)

    def to_json(self) -> str:
        """Stable, indented, ends in a newline."""
        return json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: str = "report") -> Report:
        """Raises UsageError naming ``source`` and the first field that is wrong."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise UsageError(f"{source} is not JSON: {error}", hint="write it with `lcpaq verify`") from error
        version = data.get("schema_version") if isinstance(data, dict) else None
        reader = _READERS.get(version) if isinstance(version, int) and not isinstance(version, bool) else None
        if reader is None:
            known = " or ".join(map(str, _READERS))
            message = f"{source} has report schema {version!r}, this lcpaq reads {known}"
            raise UsageError(message, hint="write it again with `lcpaq verify`")
        try:
            return cls.model_validate(reader(data))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise UsageError(f"{source}: {where}: {first['msg']}", hint="write it again with `lcpaq verify`") from error

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Reads a ``.report.json`` file. Raises LcpaqError when it cannot be read."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"), source=str(path))
        except OSError as error:
            raise LcpaqError(f"{path}: {error.strerror}", hint="give the path of a .report.json file") from error


def _as_written(data: Raw) -> Raw:
    return data


def _from_schema_1(data: Raw) -> Raw:
    """It had neither load times nor bits: those of layers follow from the formats, means are left out."""
    rows = data.get("layers")
    layers = [_with_bits(row) for row in rows] if isinstance(rows, list) else rows
    return data | {"schema_version": SCHEMA, "layers": layers}


def _with_bits(row: object) -> object:
    if not isinstance(row, dict):
        return row
    try:
        stored = LayerFormat.parse(str(row.get("format"))).weight_bits or FLOAT_BITS
    except UsageError:
        return row
    executed = executed_bits(str(row.get("executed")), str(row.get("kernel")), is_integer=bool(row.get("is_integer")))
    return row | {"stored_bits": stored, "executed_bits": executed}


# A later schema gets a reader of its own; this dispatch is what keeps old files loading.
_READERS: Mapping[int, Callable[[Raw], Raw]] = {1: _from_schema_1, SCHEMA: _as_written}
