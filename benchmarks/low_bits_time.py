"""Compensated rounding of a network of ResNet-18's size: seconds and peak memory of a process of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from assets_tasks import Feed
from claims import Claim, table
from curvature_child import lcpaq, run_child, write_feeds
from curvature_part import Part
from onnx import TensorProto, helper, numpy_helper

import lcpaq_onnx
from lcpaq_onnx import Settings
from lcpaq_onnx.numeric.columns import MOMENT_SAMPLES
from lcpaq_onnx.runtime.calibration import open_calibration
from lcpaq_onnx.runtime.declared import declared_inputs

__all__ = ["resnet18_shaped", "run_rounding_time"]

_IMAGES, _QUICK_IMAGES = 64, 8
_MEASURED_IMAGES = 2
_BITS = 4
_LIMIT_S, _LIMIT_GB = 60.0, 3.0
_STAGES = ((64, 1), (128, 2), (256, 2), (512, 2))
_BLOCKS = 2


def run_rounding_time(folder: Path, *, quick: bool) -> Part:
    """``lcpaq apply`` of a plan with every layer at 4 bits: start, second moments of every layer's input, rounding and
    writing. The plan is made before, and not timed.
    """
    random = np.random.default_rng(0)
    model = folder / "resnet18_shaped.onnx"
    onnx.save(resnet18_shaped(random), model)
    count = _QUICK_IMAGES if quick else _IMAGES
    feeds: list[Feed] = [{"image": _image(random)} for _ in range(count)]
    data = write_feeds(folder / "images.npz", feeds)
    settings = Settings(estimator="hessian-diagonal", sensitivity_samples=1, range_method="minmax")
    measured = lcpaq_onnx.analyze(model, data, samples=_MEASURED_IMAGES, settings=settings)
    plan = lcpaq_onnx.allocate(model, measured, weights=(_BITS,), activations=(8,), objective="size")
    # Two images are enough for a plan without a choice; the rounding looks at all.
    looked_at = open_calibration(data, declared_inputs(lcpaq_onnx.load(model))).take(MOMENT_SAMPLES)
    plan = plan.model_copy(update={"calibration_sha256": looked_at.fingerprint()})
    written = folder / "resnet18.plan.json"
    written.write_text(plan.to_json(), encoding="utf-8")
    out = folder / "resnet18.onnx"
    run = run_child(lcpaq("apply", model, written, "--calibration", data, "--quiet", "-o", out), folder / "store")
    rounded = [layer for layer in plan.layers if layer.rounding == "compensated"]
    weights = {tensor.name: int(np.prod(tensor.dims)) for tensor in onnx.load(model).graph.initializer}
    count_of_weights = sum(weights[layer.weight] for layer in rounded)
    peak_gb = run.peak_bytes / 1e9
    detail = f"{count_of_weights / 1e6:.1f} M weights, {count} images, the whole process of lcpaq apply"
    claims = [
        Claim("rounding: millions of weights compensated", count_of_weights / 1e6, ">=", 11.6),
        Claim("rounding: seconds", run.seconds, "<=", _LIMIT_S, detail),
        Claim("rounding: peak memory, GB", peak_gb, "<=", _LIMIT_GB, detail),
    ]
    lines = [(f"{count_of_weights:,}", str(count), f"{run.seconds:.1f}", f"{peak_gb:.2f}")]
    rows: dict[str, object] = {"weights": count_of_weights, "seconds": run.seconds, "peak_bytes": run.peak_bytes}
    return Part(table(("weights", "images", "s", "peak GB"), lines), rows, claims)


def _image(random: np.random.Generator) -> np.ndarray:
    """Smooth, as photographs are: neighbouring pixels are alike. Shape [1, 3, 224, 224]."""
    coarse = random.normal(size=(1, 3, 28, 28)).astype(np.float32)
    return coarse.repeat(8, axis=2).repeat(8, axis=3) + 0.1 * random.normal(size=(1, 3, 224, 224)).astype(np.float32)


def resnet18_shaped(random: np.random.Generator) -> onnx.ModelProto:
    """He et al. 2016, with random weights and without batch norms, which folding would remove."""
    graph = _Network(random)
    at = graph.conv("image", 3, 64, kernel=7, stride=2, relu=True)
    at = graph.add("MaxPool", [at], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    channels = 64
    for wide, first_stride in _STAGES:
        for block in range(_BLOCKS):
            stride = first_stride if block == 0 else 1
            shortcut = (
                at if stride == 1 and wide == channels else graph.conv(at, channels, wide, kernel=1, stride=stride)
            )
            inner = graph.conv(at, channels, wide, kernel=3, stride=stride, relu=True)
            at = graph.add("Relu", [graph.add("Add", [graph.conv(inner, wide, wide, kernel=3), shortcut])])
            channels = wide
    pooled = graph.add("Flatten", [graph.add("GlobalAveragePool", [at])])
    weights = [graph.constant((channels, 1000), 1 / channels), graph.constant((1000,), 1e-4)]
    graph.add("Gemm", [pooled, *weights], output="logits")
    return graph.model()


class _Network:
    def __init__(self, random: np.random.Generator) -> None:
        self._random = random
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []

    def constant(self, shape: tuple[int, ...], variance: float) -> str:
        values = self._random.normal(scale=variance**0.5, size=shape).astype(np.float32)
        self._constants.append(numpy_helper.from_array(values, f"constant{len(self._constants)}"))
        return self._constants[-1].name

    def add(self, op: str, inputs: list[str], output: str = "", **attributes: object) -> str:
        name = output or f"tensor{len(self._nodes)}"
        self._nodes.append(helper.make_node(op, inputs, [name], f"node{len(self._nodes)}", **attributes))
        return name

    def conv(self, data: str, channels: int, wide: int, *, kernel: int, stride: int = 1, relu: bool = False) -> str:
        weights = self.constant((wide, channels, kernel, kernel), 2 / (channels * kernel**2))
        shape = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [kernel // 2] * 4}
        result = self.add("Conv", [data, weights, self.constant((wide,), 1e-4)], **shape)
        return self.add("Relu", [result]) if relu else result

    def model(self) -> onnx.ModelProto:
        image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 224, 224])
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1000])
        graph = helper.make_graph(self._nodes, "resnet18_shaped", [image], [logits], self._constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
