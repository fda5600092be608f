"""Ground truth that owes nothing to the engine: whole models with rounded weights, run by plain ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import onnxruntime as ort
from assets_tasks import Feed, Task
from curvature_engine import Subject
from judging import batch_of
from numpy.typing import NDArray
from onnx import numpy_helper
from scipy import special

__all__ = ["Truth"]

Widths = Mapping[str, int]

_BATCH = 100
_ORT_FATAL = 4


class Truth:
    """Mean natural KL divergence (nats, temperature 1) from the float file to the model with rounded weights, on
    ``feeds``, which must not be calibration samples. For models whose first output is logits.
    """

    def __init__(self, subject: Subject, task: Task, feeds: list[Feed]) -> None:
        self._subject = subject
        self._batches = [batch_of(feeds[at : at + _BATCH]) for at in range(0, len(feeds), _BATCH)]
        self._float = self._log_probabilities(task.model.read_bytes())

    def kl(self, widths: Widths) -> float:
        """``widths``: layer → bits; layers that are not named stay float."""
        layers = {layer.name: layer for layer in self._subject.layers}
        rounded = {layers[name].weight: self._subject.rounded(layers[name], bits) for name, bits in widths.items()}
        copy = onnx.ModelProto()
        copy.CopyFrom(self._subject.proto)
        for tensor in copy.graph.initializer:
            if tensor.name in rounded:
                tensor.CopyFrom(numpy_helper.from_array(rounded[tensor.name], tensor.name))
        found = self._log_probabilities(copy.SerializeToString())
        return float((np.exp(self._float) * (self._float - found)).sum(axis=1).mean())

    def kl_of_each(self, plans: Sequence[Widths]) -> list[float]:
        """One after the other on every core."""
        with ThreadPoolExecutor(os.cpu_count()) as executor:
            return list(executor.map(self.kl, plans))

    def _log_probabilities(self, model: bytes) -> NDArray[np.float64]:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, _ORT_FATAL
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        logits = np.concatenate([session.run(None, batch)[0] for batch in self._batches])
        result: NDArray[np.float64] = special.log_softmax(logits.astype(np.float64), axis=1)
        return result
