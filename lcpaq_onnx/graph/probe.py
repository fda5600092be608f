"""One-operator models: the smallest file that shows what a runtime does with an operator in a format.

Used to check a target's claims against the real runtime and to measure its latency table. Values are random; neither
the kernel a runtime picks nor its speed depends on them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from lcpaq_onnx.errors import UsageError
from lcpaq_onnx.formats import QFormat

__all__ = ["Attribute", "Probe", "build_probe"]

Array = npt.NDArray[np.generic]
Attribute = int | float | str | list[int] | list[float]

# Positions of weight and bias among the inputs of the operators that have them.
_WEIGHT, _BIAS = 1, 2
# 6/255 with zero point qmin: a Relu or Clip(0, 6) before the quantizer is implied by its range, so runtimes drop it.
_ACTIVATION_SCALE = np.float32(6 / 255)
_DTYPES: dict[tuple[int, bool], npt.DTypeLike] = {
    (2, True): ml_dtypes.int2,
    (4, True): ml_dtypes.int4,
    (8, True): np.int8,
    (8, False): np.uint8,
    (16, True): np.int16,
    (16, False): np.uint16,
}


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One operator to build a model around.

    ``inputs``: per input its shape (a float activation, batch included) or an array (a constant as it stands, e.g. the
    target shape of Reshape). ``weighted``: input 1 is a weight of that shape, to be constant, and input 2 (if any) its
    bias. ``tail``: operator behind it that runtimes fuse, e.g. ``"Relu"``; empty for none. ``after_conv``:
    input 0 comes from a 1x1 Conv, so that the operator runs in the layout it has behind layers. Inputs are
    quantized at scale 6/255, outputs at ``output_scale`` (operators that only move data need the same).
    """

    op: str
    inputs: Sequence[tuple[int, ...] | Array | None]
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    outputs: int = 1
    weighted: bool = False
    tail: str = ""
    after_conv: bool = False
    output_scale: float = 6 / 255
    opset: int = 21


def build_probe(probe: Probe, activation: QFormat | None, weight: QFormat | None, *, seed: int = 0) -> onnx.ModelProto:
    """The model of ``probe``: float when both formats are None.

    With ``activation`` every activation input and every output passes a QuantizeLinear/DequantizeLinear pair (one
    scale, 0-d, explicit zero point). ``weight`` quantizes the weight: 8 or 16 bits stand plainly in the file, fewer
    as a sub-byte constant cast to int8; its bias becomes int32 at scale float32(x_scale * w_scale), which is what
    ONNX Runtime requires bit for bit to fuse. Raises UsageError for weight widths that have no ONNX type.
    """
    builder = _Builder(probe, activation, weight, np.random.default_rng(seed))
    return builder.model()


class _Builder:
    """Collects nodes and initializers of one probe."""

    def __init__(
        self, probe: Probe, activation: QFormat | None, weight: QFormat | None, rng: np.random.Generator
    ) -> None:
        self.probe, self.activation, self.weight, self.rng = probe, activation, weight, rng
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[TensorProto] = []
        self.weight_scale: npt.NDArray[np.float32] = np.ones((), np.float32)

    def model(self) -> onnx.ModelProto:
        probe = self.probe
        names, graph_inputs = [], []
        for index, value in enumerate(probe.inputs):
            if value is None:
                names.append("")
            elif isinstance(value, np.ndarray):
                names.append(self._constant(f"c{index}", value))
            elif probe.weighted and index == _WEIGHT:
                names.append(self._weight(value, self.weight))
            elif probe.weighted and index == _BIAS:
                names.append(self._bias(value))
            else:
                graph_inputs.append(helper.make_tensor_value_info(f"x{index}", TensorProto.FLOAT, value))
                name = self._boundary(f"x{index}", f"x{index}_dq")
                names.append(self._after_conv(name, value[1]) if probe.after_conv and index == 0 else name)
        raw = [f"raw{i}" for i in range(probe.outputs)]
        self._add(probe.op, names, raw, probe.attributes)
        if probe.tail:
            self._add(probe.tail, [raw[0]], ["tail0"])
            raw[0] = "tail0"
        outputs = [self._boundary(name, f"y{i}", np.float32(probe.output_scale)) for i, name in enumerate(raw)]
        graph_outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        graph = helper.make_graph(self.nodes, "probe", graph_inputs, graph_outputs, self.initializers)
        opset = helper.make_opsetid("", probe.opset)
        return helper.make_model(graph, opset_imports=[opset], ir_version=13 if probe.opset > 24 else 10)

    def _add(
        self, op: str, inputs: Sequence[str], outputs: Sequence[str], attributes: Mapping[str, Attribute] | None = None
    ) -> None:
        node = helper.make_node(op, inputs, outputs, name=f"{op}_{len(self.nodes)}")
        node.attribute.extend(helper.make_attribute(key, value) for key, value in (attributes or {}).items())
        self.nodes.append(node)

    def _constant(self, name: str, value: npt.ArrayLike) -> str:
        self.initializers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def _boundary(self, source: str, target: str, scale_value: np.float32 = _ACTIVATION_SCALE) -> str:
        """Quantize and dequantize ``source``; returns the name to read."""
        if self.activation is None:
            return source
        dtype = np.dtype(_DTYPES[self.activation.bits, self.activation.signed])
        middle = 0 if self.activation.signed or self.probe.tail else 2 ** (self.activation.bits - 1)
        scale = self._constant(f"{source}_s", scale_value)
        zero = self._constant(f"{source}_z", np.zeros((), dtype) + dtype.type(middle))
        self._add("QuantizeLinear", [source, scale, zero], [f"{source}_q"])
        self._add("DequantizeLinear", [f"{source}_q", scale, zero], [target])
        return target

    def _after_conv(self, source: str, channels: int) -> str:
        fmt = None if self.activation is None or self.activation.bits != 8 else QFormat(bits=8, axis=0)
        self._add("Conv", [source, self._weight((channels, channels, 1, 1), fmt)], ["conv"])
        return self._boundary("conv", "conv_dq")

    def _weight(self, shape: tuple[int, ...], fmt: QFormat | None) -> str:
        if fmt is None:
            return self._constant("w", self.rng.normal(0, 0.05, shape).astype(np.float32))
        if (fmt.bits, fmt.signed) not in _DTYPES:
            raise UsageError(f"no ONNX type for a {fmt} weight", hint="probe with 2, 4, 8 or 16 bits")
        stored = np.dtype(_DTYPES[fmt.bits, fmt.signed])
        values = self.rng.integers(fmt.qmin, fmt.qmax, shape, endpoint=True)
        name = self._constant("w_stored", values.astype(stored))
        if fmt.bits < 8:
            self._add("Cast", [name], ["w_q"], {"to": TensorProto.INT8})
            name, stored = "w_q", np.dtype(np.int8)
        channels = () if fmt.axis is None else (shape[fmt.axis],)
        self.weight_scale = self.rng.uniform(1e-3, 2e-3, channels).astype(np.float32)
        scale = self._constant("w_s", self.weight_scale)
        zero = self._constant("w_z", np.zeros(channels, stored))
        axis = {} if fmt.axis is None else {"axis": fmt.axis}
        self._add("DequantizeLinear", [name, scale, zero], ["w"], axis)
        return "w"

    def _bias(self, shape: tuple[int, ...]) -> str:
        if self.weight is None or self.activation is None or self.activation.bits != 8:
            return self._constant("b", self.rng.normal(0, 0.05, shape).astype(np.float32))
        name = self._constant("b_q", self.rng.integers(-100, 100, shape).astype(np.int32))
        scale = self._constant("b_s", (_ACTIVATION_SCALE * self.weight_scale).astype(np.float32))
        zero = self._constant("b_z", np.zeros(self.weight_scale.shape, np.int32))
        axis = {"axis": 0} if self.weight_scale.ndim else {}
        self._add("DequantizeLinear", [name, scale, zero], ["b"], axis)
        return "b"
