"""How a layer's output moves when its weights move: δ∗x, with weights of its own for every sample."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from lcpaq_onnx.graph.response import grouped_response_model, product_model
from lcpaq_onnx.runtime.session import Session, SessionOptions

__all__ = ["LayerResponse"]

Float = NDArray[np.float32]


class LayerResponse:
    """δ∗x of one layer (Conv, ConvTranspose, Gemm, MatMul, Gather); linear, so it is exact for any size of δ."""

    def __init__(
        self,
        op: str,
        attrs: Mapping[str, object],
        options: SessionOptions = SessionOptions(),  # noqa: B008 - a frozen value
    ) -> None:
        self._op, self._attrs, self._options = op, attrs, options
        self._sessions: dict[tuple[int, int], Session] = {}
        self._product_session: Session | None = None

    def __call__(self, x: Float, v: Float) -> Float:
        """``x``: the layer's input (of Gather the indices), samples on axis 0. ``v``: [draws, *weight shape]; draws
        divide the samples and consecutive samples share one. Returns the change of the layer's output, without bias.
        """
        if self._op in ("Gemm", "MatMul"):
            return self._product(x, v)
        if self._op == "Gather":
            return _looked_up(x.astype(np.int64), v)
        draws = len(v)
        each = len(x) // draws
        channels, extents = x.shape[1], x.shape[2:]
        grouped = x.reshape(draws, each, channels, *extents).swapaxes(0, 1).reshape(each, draws * channels, *extents)
        session = self._session(x.ndim, draws)
        y = session.run({"x": grouped, "v": v.reshape(-1, *v.shape[2:])})["y"]
        split: Float = y.reshape(each, draws, y.shape[1] // draws, *y.shape[2:]).swapaxes(0, 1)
        return np.ascontiguousarray(split).reshape(len(x), -1, *y.shape[2:])

    def _product(self, x: Float, v: Float) -> Float:
        alpha = 1.0
        if self._op == "Gemm":
            x = x.T if self._attrs.get("transA", 0) else x
            v = v.swapaxes(1, 2) if self._attrs.get("transB", 0) else v
            alpha = float(str(self._attrs.get("alpha", 1.0)))
        draws = len(v)
        if draws == 1:
            y = self._matmul(x, v[0])
        else:
            # MatMul broadcasts leading axes from the right; the draws stay in front.
            split = x.reshape(draws, len(x) // draws, *x.shape[1:])
            leading = (1,) * (split.ndim - v.ndim)
            y = self._matmul(split, v.reshape(draws, *leading, *v.shape[1:]))
            y = y.reshape(len(x), *y.shape[2:])
        return y if alpha == 1.0 else y * np.float32(alpha)

    def _matmul(self, a: Float, b: Float) -> Float:
        # Not numpy's: its BLAS brings threads of its own, and other sums on other machines.
        if self._product_session is None:
            self._product_session = Session(product_model(), self._options)
        y: Float = self._product_session.run({"a": a, "b": b})["y"]
        return y

    def _session(self, rank: int, draws: int) -> Session:
        key = (rank, draws)
        if key not in self._sessions:
            model = grouped_response_model(self._op, self._attrs, rank, draws)
            self._sessions[key] = Session(model, self._options)
        return self._sessions[key]


def _looked_up(indices: NDArray[np.int64], tables: Float) -> Float:
    """Rows of each table that its share of ``indices`` picks."""
    if len(tables) == 1:
        return np.asarray(tables[0][indices], np.float32)
    return np.concatenate([table[part] for table, part in zip(tables, np.split(indices, len(tables)), strict=True)])
