"""round-compensated: float weights become integers that make up for what was lost before them, as the plan says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from lcpaq_onnx.graph.edit import insert_nodes
from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.graph.query import nodes_by_name
from lcpaq_onnx.manager.pass_base import Contract, PassContext, PassResult, RewritePass
from lcpaq_onnx.numeric.columns import chosen_columns
from lcpaq_onnx.numeric.compensated import round_compensated
from lcpaq_onnx.numeric.layer_matrix import LayerMatrix
from lcpaq_onnx.numeric.moments import MomentStream
from lcpaq_onnx.numeric.rounding import QuantizedWeight
from lcpaq_onnx.planning.plan import LayerPlan
from lcpaq_onnx.runtime.blas import one_blas_thread

from .planned import bias_of, input_scales, weight_of
from .prefix_walk import PrefixWalk
from .stored_weights import least_scale, nearest, write_weight

__all__ = ["RoundCompensated"]

Float = NDArray[np.float32]


@dataclass(frozen=True)
class RoundCompensated(RewritePass):
    """Layer by layer in graph order: integers, scales and bias that bring the layer's output, computed from activations
    as the quantized model has them so far, closest to the float model's (``numeric.compensated``; the target for
    changed inputs after Li et al. 2025, GPTAQ). The bias takes up the difference of the means.

    Given:   float weight W → layer
    Result:  as ``round-nearest``; the bias of the layer is corrected
    Kept when the plan does not call the layer's rounding compensated. Needs the calibration data of the plan.
    """

    name: ClassVar[str] = "round-compensated"
    contract: ClassVar[Contract] = "lossy"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        plan = context.needed_plan()
        if all(layer.rounding != "compensated" for layer in plan.layers):
            return PassResult(modified=False)
        nodes = nodes_by_name(graph)
        order = {name: position for position, name in enumerate(nodes)}
        walk = PrefixWalk(graph, context, plan.rounding_samples)
        scales = input_scales(plan)
        inserted: dict[int, list[gs.Node]] = {}
        progress = context.analyses.inputs.progress
        with one_blas_thread(), progress.track("rounding weights", len(plan.layers)) as advance:
            for layer in sorted(plan.layers, key=lambda layer: order[layer.name]):
                advance(1)
                node = nodes[layer.name]
                weight = weight_of(node, layer)
                # A weight that several layers share is rounded for the first of them.
                if layer.weight_format == "f32" or not isinstance(weight, gs.Constant):
                    continue
                values, least = np.asarray(weight.values, np.float32), least_scale(layer, node, scales)
                if layer.rounding != "compensated":
                    walk.replace(weight.name, nearest(layer, values, least).dequantized())
                    continue
                rounded, bias = _compensated(walk, layer, node, values, least)
                walk.replace(weight.name, rounded.dequantized())
                if bias is not None:
                    _correct_bias(node, layer, bias, walk)
                inserted[id(node)] = write_weight(weight, layer, rounded)
        insert_nodes(graph, before=inserted)
        return PassResult(modified=True)


def _compensated(
    walk: PrefixWalk, layer: LayerPlan, node: gs.Node, values: Float, least: Float
) -> tuple[QuantizedWeight, Float | None]:
    """The rounded weight, and what to add to the bias: shape [output channels]; None where there is none to add to."""
    matrix = LayerMatrix.of(layer.op, node.attrs, values.shape)
    assert matrix is not None, "a plan calls only products of matrices compensated"
    stream = _moments(walk, layer, matrix)
    if not _can_correct(node, layer, matrix):
        return round_compensated(values, layer.qformat, matrix, stream.result(), least_scale=least), None
    moments = stream.centered()
    rounded = round_compensated(values, layer.qformat, matrix, moments, least_scale=least)
    before = np.einsum("gmn,gn->gm", matrix.rows_of(values), moments.float_mean)
    after = np.einsum("gmn,gn->gm", matrix.rows_of(rounded.dequantized()), moments.mean)
    return rounded, np.asarray(before - after, np.float32).reshape(-1)


def _moments(walk: PrefixWalk, layer: LayerPlan, matrix: LayerMatrix) -> MomentStream:
    # Where shapes depend on values, the two versions may have come apart: then there is nothing to make up for.
    batches = [(x if x.shape == z.shape else z, z) for x, z in walk.inputs(layer)]
    columns = sum(matrix.column_count(x.shape) for x, _ in batches)
    stream = MomentStream(matrix.groups, matrix.columns, has_changed_inputs=True)
    for number, (x, z) in enumerate(batches):
        share = matrix.column_count(x.shape) / max(1, columns)
        chosen = chosen_columns(matrix, layer.name, x.shape, number, share)
        stream.update(matrix.columns_of(x, chosen), matrix.columns_of(z, chosen))
    return stream


def _can_correct(node: gs.Node, layer: LayerPlan, matrix: LayerMatrix) -> bool:
    is_plain = float(node.attrs.get("alpha", 1.0)) == 1.0 == float(node.attrs.get("beta", 1.0))
    bias = bias_of(node, layer)
    return is_plain and bias is not None and tuple(bias.shape) == (matrix.groups * matrix.rows,)


def _correct_bias(node: gs.Node, layer: LayerPlan, change: Float, walk: PrefixWalk) -> None:
    bias = bias_of(node, layer)
    assert bias is not None
    corrected = np.asarray(bias.values, np.float32) + change
    bias.values = corrected
    walk.replace(bias.name, corrected)
