"""Files made by ``onnxruntime.quantization.quantize_static``, with every setting worth a try."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from assets_tasks import Feed
from judging import batch_of
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

__all__ = ["PEER", "StaticSetting", "make_static", "settings_to_try"]

_TYPES = {"u8": QuantType.QUInt8, "s8": QuantType.QInt8}
_METHODS = {
    "minmax": CalibrationMethod.MinMax,
    "entropy": CalibrationMethod.Entropy,
    "percentile": CalibrationMethod.Percentile,
}


@dataclass(frozen=True)
class StaticSetting:
    """``activation``, ``weight``: "u8" or "s8". ``symmetric``: activations. ``reader_batch``: samples per feed."""

    activation: str = "u8"
    weight: str = "s8"
    preprocess: bool = True
    method: str = "minmax"
    symmetric: bool = False
    per_channel: bool = True
    reader_batch: int = 1

    def __str__(self) -> str:
        words = [f"{self.activation}{self.weight}", self.method]
        words += ["pre"] * self.preprocess + ["sym"] * self.symmetric + ["per-tensor"] * (not self.per_channel)
        return " ".join(words) + (f" batch={self.reader_batch}" if self.reader_batch > 1 else "")


PEER = StaticSetting()
"""Per channel, QDQ, pre-processed: the row that peers are measured against."""

_PAIRS = (("u8", "s8"), ("s8", "s8"), ("u8", "u8"))


def settings_to_try(*, quick: bool) -> tuple[StaticSetting, ...]:
    """``quick``: only the recommended one and the function's defaults."""
    defaults = StaticSetting("s8", "s8", preprocess=False, per_channel=False)
    if quick:
        return (PEER, defaults)
    found = [
        StaticSetting(activation, weight, preprocess, "minmax", symmetric)
        for activation, weight in _PAIRS
        for preprocess in (True, False)
        for symmetric in (False, True)
    ]
    found += [
        StaticSetting(activation, weight, method=method)
        for activation, weight in _PAIRS
        for method in ("entropy", "percentile")
    ]
    # Fewer scales make smaller files.
    found += [StaticSetting(activation, "s8", per_channel=False) for activation in ("u8", "s8")]
    return (*found, defaults)


def make_static(model: Path, feeds: list[Feed], setting: StaticSetting, out: Path) -> None:
    """Write ``out``: all that a user has to do, pre-processing included."""
    with _quiet():
        source = model
        if setting.preprocess:
            source = out.with_suffix(".pre.onnx")
            _preprocess(model, source)
        quantize_static(
            str(source),
            str(out),
            _Reader(feeds, setting.reader_batch),
            quant_format=QuantFormat.QDQ,
            per_channel=setting.per_channel,
            activation_type=_TYPES[setting.activation],
            weight_type=_TYPES[setting.weight],
            calibrate_method=_METHODS[setting.method],
            extra_options={"ActivationSymmetric": setting.symmetric},
        )


def _preprocess(model: Path, out: Path) -> None:
    try:
        quant_pre_process(str(model), str(out))
    except Exception:  # symbolic shape inference raises plain Exception where it is incomplete
        quant_pre_process(str(model), str(out), skip_symbolic_shape=True)


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    def __init__(self, feeds: list[Feed], batch: int) -> None:
        self._feeds: Iterator[Feed] = iter(
            feeds if batch == 1 else [batch_of(feeds[at : at + batch]) for at in range(0, len(feeds), batch)]
        )

    def get_next(self) -> Feed | None:
        return next(self._feeds, None)


@contextmanager
def _quiet() -> Iterator[None]:
    """It logs a warning that recommends pre-processing and one for every tensor whose range it adjusts; the histogram
    methods print.
    """
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
