"""What stands in an ONNX file: inputs, outputs, operators, how each layer's weight is stored."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx_graphsurgeon as gs

from lcpaq_onnx.cli.console import text_table
from lcpaq_onnx.graph import graph_io
from lcpaq_onnx.graph.ops import facts_of
from lcpaq_onnx.graph.stored import stored_weight
from lcpaq_onnx.graph.written import read_model

__all__ = ["ModelSummary", "StoredLayer", "summarize"]

_METADATA_PREFIX = "lcpaq."


@dataclass(frozen=True)
class StoredLayer:
    """One layer. ``stored_bits``: width of its weight in the file; ``storage``: float, plain, cast or packed-bytes."""

    name: str
    op: str
    shape: tuple[int, ...]
    stored_bits: int
    storage: str


@dataclass(frozen=True)
class ModelSummary:
    """``metadata``: entries that lcpaq wrote, without the prefix. ``size_bytes`` includes external data."""

    file: str
    size_bytes: int
    opset: int
    ir_version: int
    producer: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    operators: dict[str, int]
    quantize_nodes: int
    dequantize_nodes: int
    layers: tuple[StoredLayer, ...]
    metadata: dict[str, str]

    def document(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)

    def text(self) -> str:
        """For people."""
        operators = ", ".join(f"{count} {op}" for op, count in self.operators.items())
        lines = [
            f"{self.file}: {self.size_bytes:,} bytes, opset {self.opset}, IR version {self.ir_version}",
            f"  producer:  {self.producer or '(not said)'}",
            *(f"  input:     {line}" for line in self.inputs),
            *(f"  output:    {line}" for line in self.outputs),
            f"  operators: {operators}",
            f"  Q/DQ:      {self.quantize_nodes} QuantizeLinear, {self.dequantize_nodes} DequantizeLinear",
            *(f"  lcpaq:     {key} {value}" for key, value in self.metadata.items()),
            "",
        ]
        rows = [
            [layer.name, layer.op, "x".join(map(str, layer.shape)), str(layer.stored_bits), layer.storage]
            for layer in self.layers
        ]
        return "\n".join([*lines, text_table(["layer", "op", "weight", "stored bits", "storage"], rows)])


def summarize(path: Path) -> ModelSummary:
    """The summary of a model file. Raises ModelError when it cannot be read."""
    graph, written = graph_io.load(path), read_model(path)
    counts = Counter(node.op if not node.domain else f"{node.domain}.{node.op}" for node in written.nodes)
    layers = []
    for node in written.nodes:
        facts = facts_of(node.op, node.domain)
        index = 0 if facts.looks_up else facts.weight_input
        # Rows of a quantized table are picked from its integers.
        name = node.inputs[index].removesuffix("/q") if index is not None and len(node.inputs) > index else ""
        weight = stored_weight(written, name) if name else None
        if weight is not None:
            layers.append(StoredLayer(node.name, node.op, weight.shape, weight.bits, weight.storage))
    return ModelSummary(
        file=path.name,
        size_bytes=written.size_bytes,
        opset=written.opset,
        ir_version=written.ir_version,
        producer=f"{graph.producer_name} {graph.producer_version}".strip(),
        inputs=tuple(map(_tensor_text, graph.inputs)),
        outputs=tuple(map(_tensor_text, graph.outputs)),
        operators=dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
        quantize_nodes=counts["QuantizeLinear"],
        dequantize_nodes=counts["DequantizeLinear"],
        layers=tuple(layers),
        metadata={
            key.removeprefix(_METADATA_PREFIX): value
            for key, value in sorted(written.metadata.items())
            if key.startswith(_METADATA_PREFIX)
        },
    )


def _tensor_text(tensor: gs.Tensor) -> str:
    shape = "?" if tensor.shape is None else ", ".join("?" if dim is None else str(dim) for dim in tensor.shape)
    dtype = "?" if tensor.dtype is None else getattr(tensor.dtype, "name", None) or str(tensor.dtype)
    return f"{tensor.name} {dtype} [{shape}]"
