"""Which kernels ONNX Runtime really chose: read from the graph it saves after optimising, not guessed from the file."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import onnxruntime as ort

from lcpaq_onnx.graph.written import WrittenModel, WrittenNode, read_model
from lcpaq_onnx.runtime.session import Session, SessionOptions

__all__ = ["Kernel", "Realisation", "open_observed", "realised_kernels", "runtime_version"]

# ONNX Runtime's operators that multiply in integers, in whatever domain (the NHWC layout pass moves QLinearConv).
_INTEGER = frozenset(
    [
        *("ConvInteger", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat", "MatMulNBits"),
        *("QGemm", "QLinearConv", "QLinearMatMul"),
    ]
)
_FLOAT = frozenset(
    ["Conv", "ConvTranspose", "FusedConv", "FusedGemm", "FusedMatMul", "Gemm", "MatMul", "NhwcFusedConv"]
)
# Copies rows of a table; a planned one keeps its name.
_LOOKUP = "Gather"
# What its optimisers append to the name of a node they replace.
_SUFFIX = re.compile(r"(/MatMulAddFusion)?(_token_\d+)?(_nhwc|_nchwc)?")
# How far behind a layer a fused operator may take its name from: bias, activation, residual addition.
_FUSED_DEPTH = 3
_EXTERNAL_WEIGHTS = (
    ("session.optimized_model_external_initializers_file_name", "weights.bin"),
    ("session.optimized_model_external_initializers_min_size_in_bytes", "1024"),
)


@dataclass(frozen=True)
class Kernel:
    """The operator that computes one layer. ``dequantizes_weight``: its weights are converted to float at every run."""

    op: str
    domain: str
    dequantizes_weight: bool = False

    @property
    def is_integer(self) -> bool:
        return self.op in _INTEGER


@dataclass(frozen=True)
class Realisation:
    """Layer → kernel, for the layers that could be found; and how many conversions survived optimisation."""

    kernels: Mapping[str, Kernel]
    quantize_nodes: int
    dequantize_nodes: int

    def is_integer(self, layer: str) -> bool:
        """Whether ``layer`` was found and runs in an integer kernel."""
        return layer in self.kernels and self.kernels[layer].is_integer


def runtime_version() -> str:
    """Version of ONNX Runtime."""
    return str(ort.__version__)


def open_observed(path: Path, options: SessionOptions) -> tuple[Session, WrittenModel]:
    """A session for the model file and the graph that it runs. Raises ModelError as ``Session`` does."""
    with tempfile.TemporaryDirectory(prefix="lcpaq-") as folder:
        saved = Path(folder) / "optimized.onnx"
        # Weights go to a file of their own: nobody reads them, and a model above 2 GB can be saved no other way.
        config = (*options.config, *_EXTERNAL_WEIGHTS)
        session = Session(path, replace(options, optimized_model_path=saved, config=config))
        return session, read_model(saved)


def realised_kernels(optimized: WrittenModel, emitted: WrittenModel, layers: Mapping[str, str]) -> Realisation:
    """Find every layer of ``emitted`` (name → its weight tensor) in the ``optimized`` graph.

    A layer is found by its node's name (the longest that fits, with a suffix known of the optimisers), else by the
    weight it alone reads, else by a tensor that it or what fuses with it writes. What is ambiguous is not found.
    """
    candidates = [node for node in optimized.nodes if node.op in _INTEGER or node.op in _FLOAT]
    found = {node.name: node for node in optimized.nodes if node.op == _LOOKUP and node.name in layers}
    _match(found, candidates, layers, {name: (name,) for name in layers})
    _match_weights(found, candidates, layers)
    _match(found, candidates, layers, {name: _written_names(emitted, name) for name in layers}, by_output=True)
    ops = [node.op for node in optimized.nodes]
    return Realisation(
        kernels={
            name: Kernel(node.op, node.domain, _dequantizes_weight(optimized, node))
            for name, node in sorted(found.items())
        },
        quantize_nodes=ops.count("QuantizeLinear"),
        dequantize_nodes=ops.count("DequantizeLinear"),
    )


def _match(
    found: dict[str, WrittenNode],
    candidates: Iterable[WrittenNode],
    layers: Mapping[str, str],
    names: Mapping[str, tuple[str, ...]],
    *,
    by_output: bool = False,
) -> None:
    """Add layers whose ``names`` a candidate bears; a candidate goes to the layer with the longest such name."""
    layer_of: dict[str, str | None] = {}
    for layer in layers:
        for name in names[layer] if layer not in found else ():
            layer_of[name] = layer if name not in layer_of else None
    known = sorted((name for name in layer_of if name), key=len, reverse=True)
    taken = {id(node) for node in found.values()}
    hits: dict[str, list[WrittenNode]] = {}
    for node in candidates:
        if id(node) in taken:
            continue
        borne = (node.name, *node.outputs) if by_output else (node.name,)
        fitting = next((n for n in known if any(_bears(text, n) for text in borne)), None)
        owner = layer_of[fitting] if fitting is not None else None
        if owner is not None:
            hits.setdefault(owner, []).append(node)
    found.update({layer: nodes[0] for layer, nodes in hits.items() if len(nodes) == 1})


def _bears(text: str, name: str) -> bool:
    return text.startswith(name) and _SUFFIX.fullmatch(text, len(name)) is not None


def _match_weights(found: dict[str, WrittenNode], candidates: Iterable[WrittenNode], layers: Mapping[str, str]) -> None:
    weights = list(layers.values())
    taken = {id(node) for node in found.values()}
    free = [node for node in candidates if id(node) not in taken]
    for layer, weight in layers.items():
        if layer in found or weights.count(weight) > 1:
            continue
        readers = [node for node in free if weight in node.inputs or f"{weight}/q" in node.inputs]
        if len(readers) == 1:
            found[layer] = readers[0]


def _written_names(emitted: WrittenModel, layer: str) -> tuple[str, ...]:
    """Tensors written by the layer and by what follows it, as long as that is one node and no such operator itself."""
    node = emitted.by_name.get(layer)
    names: list[str] = []
    for _ in range(_FUSED_DEPTH):
        if node is None:
            break
        names += [name for name in node.outputs if name]
        readers = [reader for name in node.outputs for reader in emitted.readers.get(name, ())]
        node = readers[0] if len(readers) == 1 and readers[0].op not in _FLOAT else None
    return tuple(names)


def _dequantizes_weight(optimized: WrittenModel, node: WrittenNode) -> bool:
    weight = node.inputs[1] if len(node.inputs) > 1 else ""
    producer = optimized.producers.get(weight)
    return producer is not None and producer.op == "DequantizeLinear" and producer.inputs[0] in optimized.constants
