"""Which layers a runtime can multiply in blocks: what stands around a layer decides, not its operator alone."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from lcpaq_onnx.formats import LayerFormat
from lcpaq_onnx.graph.ops import sums_over_rows
from lcpaq_onnx.graph.query import Layer
from lcpaq_onnx.targets.target import Quirk, Target

__all__ = ["takes_blocks"]


def takes_blocks(node: gs.Node, layer: Layer, format: LayerFormat, rank: int, target: Target) -> bool:
    """Whether ``layer`` (its ``node``) is a product with a matrix [K, N] that the runtime computes in the block-wise
    ``format``. ``rank``: of its output.

    A bias of shape [N] may follow. With anything else added to it a MatMul of two matrices becomes a Gemm that runs in
    float and has its weights dequantized at every run; so does a Gemm with another bias.
    """
    assert format.weight_bits is not None
    if not sums_over_rows(node.op, node.attrs, layer.weight_shape):
        return False
    if not target.takes_blocks(format.weight_bits, layer.weight_shape):
        return False
    columns = layer.weight_shape[1]
    if node.op == "Gemm":
        return layer.bias is None or _shape(node.inputs[2]) == (columns,)
    if rank != 2 or not target.has_quirk(Quirk.MATMUL_ADD_BECOMES_GEMM):
        return True
    product = node.outputs[0]
    added = [operand for add in product.outputs if add.op == "Add" for operand in add.inputs if operand is not product]
    return all((shape := _shape(operand)) is not None and len(shape) < 2 for operand in added)


def _shape(tensor: gs.Tensor) -> tuple[int, ...] | None:
    """Of a constant, else None."""
    return tuple(int(extent) for extent in tensor.shape) if isinstance(tensor, gs.Constant) else None
