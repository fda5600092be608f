"""One model run from place to place: constants that come later may still change."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from lcpaq_onnx.graph.pieces import Pieces
from lcpaq_onnx.runtime.calibration import Feed
from lcpaq_onnx.runtime.session import Session, SessionOptions

__all__ = ["Walk"]

Array = NDArray[np.generic]

# Weights are changed by whoever walks and by nothing else: ONNX Runtime would quantize those between Q and DQ.
_AS_WRITTEN = SessionOptions(disabled_optimizers=("WeightBiasQuantization",))


class Walk:
    """Runs on all batches at once, no node twice; tensors that nobody reads any more are dropped."""

    def __init__(self, model: onnx.ModelProto, base_dir: Path | None, batches: Sequence[Feed]) -> None:
        """``batches``: one or more."""
        self._pieces = Pieces(model)
        self._base_dir = base_dir
        self._states: list[dict[str, Array]] = [dict(feed) for feed in batches]
        self._replaced: dict[str, NDArray[np.float32]] = {}

    def replace(self, initializer: str, values: NDArray[np.float32]) -> None:
        """From here on ``initializer`` is ``values``."""
        self._replaced[initializer] = values

    def to(self, tensor: str) -> list[Array]:
        """Go on to where ``tensor`` is computed; its value on each batch. Raises ModelError when a piece cannot run."""
        piece = self._pieces.until(tensor)
        if piece.nodes:
            model = self._pieces.model_of(piece, self._states[0], self._replaced)
            session = Session(model, _AS_WRITTEN, base_dir=self._base_dir)
            for state in self._states:
                state |= session.run({name: state[name] for name in piece.inputs})
        found = [state[tensor] for state in self._states]
        for state in self._states:
            for name in piece.finished:
                state.pop(name, None)
        return found
