"""How exporters write a product with constant weights: one tiny model for each way.

torch: torch.onnx, tracing (legacy) and dynamo; tf: tf2onnx; optimum exports through torch and then fuses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import numpy_helper, parser

__all__ = ["LAYOUTS", "Layout"]

_RNG = np.random.default_rng(0)


def _weight(*shape: int) -> np.ndarray:
    return (_RNG.normal(size=shape) / 4).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Layout:
    """``text``: the graph; ``layers``: how many there are; ``source``: who writes it."""

    name: str
    source: str
    text: str
    constants: Mapping[str, np.ndarray] = field(repr=False)
    layers: int = 1

    def model(self) -> onnx.ModelProto:
        model = parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]> g {self.text}')
        model.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in self.constants.items())
        return model

    def feeds(self, count: int = 6) -> list[dict[str, np.ndarray]]:
        rng = np.random.default_rng(1)
        (value,) = self.model().graph.input
        shape = [dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim]
        return [{value.name: rng.normal(size=shape).astype(np.float32)} for _ in range(count)]


_IN3 = "(float[n, 5, 16] x) => (float[n, h, k] y)"
_IN2 = "(float[n, 16] x) => (float[n, k] y)"

LAYOUTS = (
    Layout("matmul", "torch nn.Linear on 3-D input", f"{_IN3} {{ y = MatMul(x, w) }}", {"w": _weight(16, 12)}),
    Layout(
        "matmul-add",
        "torch nn.Linear with bias on 3-D input; tf Dense",
        f"{_IN3} {{ t = MatMul(x, w) y = Add(b, t) }}",
        {"w": _weight(16, 12), "b": _weight(12)},
    ),
    Layout(
        "matmul-add-2d",
        "tf Dense on 2-D input",
        f"{_IN2} {{ t = MatMul(x, w) y = Add(t, b) }}",
        {"w": _weight(16, 12), "b": _weight(12)},
    ),
    Layout(
        "transposed",
        "torch without constant folding, torch dynamo",
        f"{_IN3} {{ t = Transpose <perm = [1, 0]> (w) y = MatMul(x, t) }}",
        {"w": _weight(12, 16)},
    ),
    Layout(
        "constant-node",
        "older exporters: weights in Constant nodes",
        f"{_IN3} {{ w = Constant <value = float[16, 2] {{{', '.join(f'{v:.3f}' for v in _RNG.normal(size=32))}}}> ()"
        " i = Identity(w) y = MatMul(x, i) }",
        {},
    ),
    Layout(
        "half-cast",
        "optimum: weights stored in float16",
        f"{_IN3} {{ f = Cast <to = 1> (h) y = MatMul(x, f) }}",
        {"h": _weight(16, 12).astype(np.float16)},
    ),
    Layout(
        "reshaped",
        "tf2onnx: dense kernels behind Reshape",
        f"{_IN3} {{ t = Reshape(w, s) y = MatMul(x, t) }}",
        {"w": _weight(16, 3, 4), "s": np.array([16, 12])},
    ),
    Layout(
        "gemm",
        "torch nn.Linear on 2-D input",
        f"{_IN2} {{ y = Gemm <transB = 1> (x, w, b) }}",
        {"w": _weight(12, 16), "b": _weight(12)},
    ),
    Layout(
        "gemm-plain",
        "tf2onnx; GPT-2's Conv1D",
        f"{_IN2} {{ y = Gemm(x, w, b) }}",
        {"w": _weight(16, 12), "b": _weight(12)},
    ),
    Layout(
        "gemm-scaled",
        "torch addmm with alpha and beta",
        f"{_IN2} {{ y = Gemm <alpha = 0.5, beta = 2.0, transB = 1> (x, w, b) }}",
        {"w": _weight(12, 16), "b": _weight(12)},
    ),
    Layout(
        "gemm-transposed-input",
        "sklearn and hand-written models",
        "(float[16, 5] x) => (float[n, k] y) { y = Gemm <transA = 1> (x, w, b) }",
        {"w": _weight(16, 12), "b": _weight(12)},
    ),
    Layout(
        "matmul-one-batch",
        "torch.matmul with an unsqueezed weight",
        f"{_IN3} {{ y = MatMul(x, w) }}",
        {"w": _weight(1, 16, 12)},
    ),
    Layout(
        "matmul-by-head",
        "torch.einsum by head, mixture of experts",
        "(float[n, 3, 5, 16] x) => (float[n, c, h, k] y) { y = MatMul(x, w) }",
        {"w": _weight(3, 16, 12)},
    ),
    Layout(
        "weight-on-the-left",
        "torch.matmul(W, x): token mixing",
        f"{_IN3} {{ y = MatMul(w, x) }}",
        {"w": _weight(7, 5)},
        layers=0,
    ),
    Layout(
        "packed-qkv",
        "GPT-2, ViT: one product, then Split",
        f"{_IN3} {{ t = MatMul(x, w) u = Add(t, b) q, k, v = Split <axis = -1, num_outputs = 3> (u)"
        " kt = Transpose <perm = [0, 2, 1]> (k) s = MatMul(q, kt) p = Softmax <axis = -1> (s) y = MatMul(p, v) }",
        {"w": _weight(16, 24), "b": _weight(24)},
    ),
    Layout(
        "separate-qkv",
        "BERT: three products of one input",
        f"{_IN3} {{ q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv)"
        " kt = Transpose <perm = [0, 2, 1]> (k) s = MatMul(q, kt) p = Softmax <axis = -1> (s) y = MatMul(p, v) }",
        {"wq": _weight(16, 8), "wk": _weight(16, 8), "wv": _weight(16, 8)},
        layers=3,
    ),
)
