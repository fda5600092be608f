"""Multiply-accumulates of the layers of a written model, from the shapes of one run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import onnx

from lcpaq_onnx.graph.ops import facts_of
from lcpaq_onnx.graph.signatures import Shape, signature_of_shapes
from lcpaq_onnx.graph.stored import stored_weight
from lcpaq_onnx.graph.subgraph import with_outputs
from lcpaq_onnx.graph.written import WrittenModel, WrittenNode

__all__ = ["layer_macs", "shape_probe"]


def shape_probe(path: Path, model: WrittenModel, layers: Iterable[str]) -> onnx.ModelProto:
    """The file at ``path`` with the inputs and outputs of ``layers`` (node names) as further outputs."""
    nodes = [model.by_name[name] for name in layers if name in model.by_name and _multiplies(model.by_name[name])]
    tensors = dict.fromkeys(name for node in nodes for name in (node.inputs[0], node.outputs[0]))
    return with_outputs(onnx.load(str(path), load_external_data=False), [n for n in tensors if n not in model.inputs])


def layer_macs(model: WrittenModel, layers: Mapping[str, str], shapes: Mapping[str, Shape]) -> dict[str, int]:
    """Multiply-accumulates of each of ``layers`` (node name → weight tensor) that is in ``model`` and has some;
    ``shapes``: of the tensors that ``shape_probe`` returns and of the inputs.
    """
    counts = {}
    for name, weight in layers.items():
        node, stored = model.by_name.get(name), stored_weight(model, weight)
        if node is None or stored is None or not _multiplies(node):
            continue
        inputs = [stored.shape if tensor == weight else shapes.get(tensor, (0,)) for tensor in node.inputs]
        position = frozenset([node.inputs.index(weight)]) if weight in node.inputs else frozenset[int]()
        counts[name] = signature_of_shapes(node.op, node.attributes, inputs, [shapes[node.outputs[0]]], position).macs
    return counts


def _multiplies(node: WrittenNode) -> bool:
    return not facts_of(node.op, node.domain).looks_up
