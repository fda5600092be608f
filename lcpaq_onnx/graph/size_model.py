"""Bytes of the file that a plan would make, counted on the very nodes that rewriting will insert.

Nearly every decision adds its own bytes. What does not (length prefixes that grow, the packed constants that layers
share) is bounded from above in the per-decision figures and exact in ``SizeModel.total``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import onnx
import onnx_graphsurgeon as gs

from lcpaq_onnx.formats import QFormat
from lcpaq_onnx.graph import byte_counts, emit, lookups
from lcpaq_onnx.graph.byte_counts import (
    DUMMIES,
    blob_bytes,
    conversion_pair_bytes,
    integer_bias_bytes,
    packed_bytes,
    stand_in,
    weight_bytes,
)
from lcpaq_onnx.graph.graph_io import Graph, constant_bytes, node_bytes, section_bytes
from lcpaq_onnx.graph.ops import facts_of
from lcpaq_onnx.graph.query import ActivationGroup, Layer, Structure, nodes_by_name

__all__ = ["SizeModel", "StoredLayer"]

# Length prefixes inside the shared packed constants (dimensions, raw data, Split) that grow with their number.
_BLOB_SLACK_BYTES = 48


@dataclass(frozen=True)
class StoredLayer:
    """How one layer stands in the file. ``weight`` None: float. ``integer_bias``: an int32 bias behind a quantized
    input, else the float one. ``isolated``: it reads a DequantizeLinear of its own.
    """

    weight: QFormat | None = None
    storage: str = "float"
    with_scale_only: bool = False
    integer_bias: bool = False
    isolated: bool = False


class SizeModel:
    """Sizes for one prepared graph. ``explicit``: nodes that are written on the integers of an 8-bit group.
    ``metadata``: entries that the emitted model will carry on top of its own.
    """

    def __init__(
        self, graph: Graph, structure: Structure, explicit: frozenset[str], metadata: Mapping[str, str]
    ) -> None:
        self._explicit = explicit
        self._graph = graph
        self._structure = structure
        self._nodes = nodes_by_name(graph)
        self._layers = {layer.name: layer for layer in structure.layers}
        self._header_bytes, self._graph_bytes = section_bytes(graph)
        self._header_bytes += sum(_entry_bytes(key, value) for key, value in metadata.items())
        self._inputs = {tensor.name for tensor in graph.inputs}
        self._outputs = {tensor.name for tensor in graph.outputs}
        self._payer = _payers(structure)
        self._owned: dict[str, list[gs.Constant]] = {}
        self._layer_bytes: dict[tuple[str, StoredLayer], int] = {}
        self._group_bytes: dict[tuple[str, QFormat], int] = {}

    # ---- per decision, upper bounds ---------------------------------------------------------------------------------
    @property
    def fixed_bytes(self) -> int:
        """Everything that no decision moves: the file less the constants of its layers."""
        movable = sum(self._float_bytes(layer) for layer in self._structure.layers)
        return self._header_bytes + _prefixed(self._graph_bytes) - movable

    def layer_bytes(self, name: str, stored: StoredLayer) -> int:
        """Bytes of a layer's constants and of the nodes that restore them, shared ones apart."""
        key = (name, stored)
        if key not in self._layer_bytes:
            layer = self._layers[name]
            self._layer_bytes[key] = self._own_bytes(layer, stored)
            if layer.is_lookup and stored.weight is not None:
                # Its node, and another one that takes its result's new name.
                self._layer_bytes[key] += _longer(self._nodes[name], _lookup_growth(layer)) + 1
            if stored.storage == "packed-bytes":
                assert stored.weight is not None
                piece, shape = self._piece(layer)
                self._layer_bytes[key] += packed_bytes(stored.weight.bits, stand_in(piece), shape)
        return self._layer_bytes[key]

    def group_bytes(self, group: ActivationGroup, format: QFormat) -> int:
        """Bytes of the conversions of an activation group, renamed neighbours included."""
        key = (group.name, format)
        if key not in self._group_bytes:
            renames = sum(_longer(node, by) for node, by in self._renames(group, format))
            self._group_bytes[key] = self._conversion_bytes(group, format) + renames
        return self._group_bytes[key]

    def blob_bytes(self, bits: int) -> int:
        """Bytes of the expression that unpacks all packed weights of one width, without any weight."""
        two, three = (blob_bytes(bits, DUMMIES[:count]) for count in (2, 3))
        return two - 2 * (three - two) + _BLOB_SLACK_BYTES

    def isolated_bytes(self, name: str, channels: int, format: QFormat) -> int:
        """Bytes of a DequantizeLinear of its own for a float layer."""
        layer = self._layers[name]
        return self._isolated_bytes(layer, channels, format) + _longer(self._nodes[name], _isolated_growth(layer))

    # ---- exact ------------------------------------------------------------------------------------------------------
    def total(
        self, layers: Mapping[str, StoredLayer], groups: Mapping[str, QFormat | None], channels: Mapping[str, int]
    ) -> int:
        """Exact size of the model file in bytes. ``channels``: extent of axis 1 of each isolated layer's input."""
        graph_bytes = self._graph_bytes - sum(self._float_bytes(layer) for layer in self._structure.layers)
        longer: dict[str, int] = {}
        for group in self._structure.groups:
            format = groups.get(group.name)
            if format is None:
                continue
            graph_bytes += self._conversion_bytes(group, format)
            for node, by in self._renames(group, format):
                longer[node.name] = longer.get(node.name, 0) + by
        packed: dict[int, list[Layer]] = {}
        for name, stored in layers.items():
            layer = self._layers[name]
            graph_bytes += self._own_bytes(layer, stored)
            is_first = self._payer[layer.weight] == name
            if stored.storage == "packed-bytes" and stored.weight is not None and is_first:
                packed.setdefault(stored.weight.bits, []).append(layer)
            if layer.is_lookup and stored.weight is not None:
                last = lookups.writer_bytes(*_lookup_names(layer), stored.weight)
                moved = self._moved_growth(layer, groups)
                graph_bytes += _prefixed(_payload(last) + moved) - last
                longer[name] = longer.get(name, 0) + _lookup_growth(layer) - moved
            if stored.isolated:
                format = groups[self._structure.group_of()[layer.input]]
                assert format is not None
                graph_bytes += self._isolated_bytes(layer, channels[name], format)
                by = _isolated_growth(layer) - (_growth(layer.input, "/dq") if layer.input in self._inputs else 0)
                longer[name] = longer.get(name, 0) + by
        for bits, members in packed.items():
            graph_bytes += blob_bytes(bits, tuple(self._piece(layer) for layer in members))
        for name, by in longer.items():
            payload = _payload(node_bytes(self._nodes[name]))
            graph_bytes += _prefixed(payload + by) - _prefixed(payload)
        return self._header_bytes + _prefixed(graph_bytes)

    # ---- parts ------------------------------------------------------------------------------------------------------
    def _float_bytes(self, layer: Layer) -> int:
        return sum(constant_bytes(t) for t in self._own_constants(layer))

    def _own_constants(self, layer: Layer) -> list[gs.Constant]:
        if layer.name not in self._owned:
            names = {layer.weight, layer.bias}
            constants = [t for t in self._nodes[layer.name].inputs if t.name in names and isinstance(t, gs.Constant)]
            self._owned[layer.name] = [t for t in constants if self._payer[t.name] == layer.name]
        return self._owned[layer.name]

    def _own_bytes(self, layer: Layer, stored: StoredLayer) -> int:
        owned = {t.name: t for t in self._own_constants(layer)}
        total = 0
        if layer.weight in owned:
            weight = owned[layer.weight]
            total += constant_bytes(weight) if stored.weight is None else _stored_bytes(layer, stored, stored.weight)
        if layer.is_lookup and stored.weight is not None:
            total += lookups.behind_bytes(*_lookup_names(layer), stored.weight)
        if layer.bias in owned:
            bias = owned[layer.bias]
            if stored.integer_bias:
                assert stored.weight is not None
                total += integer_bias_bytes(
                    stand_in(bias.name), tuple(bias.shape), is_per_channel=stored.weight.axis is not None
                )
            else:
                total += constant_bytes(bias)
        return total

    def _conversion_bytes(self, group: ActivationGroup, format: QFormat) -> int:
        constants = emit.activation_constants(group.name, 1.0, 0, format)
        scale, zero_point = (stand_in(tensor.name) for tensor in constants)
        explicit = self._moves_integers(format)
        nodes = orphans = 0
        for name in group.tensors:
            tensor = self._tensors[name]
            pair = conversion_pair_bytes(stand_in(name), scale, zero_point, name in self._inputs)
            is_written = emit.written_on_integers(tensor, explicit)
            is_read = emit.read_on_integers(tensor, explicit, is_output=name in self._outputs)
            nodes += (0 if is_written else pair[0]) + (0 if is_read else pair[1])
            if is_written:
                orphans += sum(
                    constant_bytes(fill) for fill in emit.fills_of(tensor.inputs[0]) if len(fill.outputs) == 1
                )
        return nodes - orphans + (sum(map(constant_bytes, constants)) if nodes else 0)

    def _moves_integers(self, format: QFormat) -> frozenset[str]:
        return self._explicit if format.bits == 8 else frozenset()

    def _isolated_bytes(self, layer: Layer, channels: int, format: QFormat) -> int:
        integers, result = f"{layer.input}/q", emit.isolated_name(layer.input, layer.name)
        axis = facts_of(layer.op).input_channel_axis
        return byte_counts.isolated_bytes(stand_in(integers), stand_in(result), channels, format, axis)

    def _moved_growth(self, layer: Layer, groups: Mapping[str, QFormat | None]) -> int:
        """Bytes of the new name of what a lookup writes, which another node writes once it picks integers."""
        group = self._structure.group_of().get(layer.raw_output, "")
        return _growth(layer.raw_output, "/f") if groups.get(group) is not None else 0

    def _piece(self, layer: Layer) -> tuple[str, tuple[int, ...]]:
        return f"{layer.weight}/q", layer.weight_shape

    def _renames(self, group: ActivationGroup, format: QFormat) -> list[tuple[gs.Node, int]]:
        """Nodes whose text grows when ``group`` is quantized, and by how many bytes."""
        explicit = self._moves_integers(format)
        zero_point = emit.activation_constants(group.name, 1.0, 0, format)[1].name
        renames = []
        for name in group.tensors:
            tensor = self._tensors[name]
            if name not in self._inputs:
                # One letter each: integers from a node in ``explicit``, else floats.
                renames.append((tensor.inputs[0], _growth(name, "/f")))
            # A node that reads it twice stands there twice.
            for node in {id(node): node for node in tensor.outputs}.values():
                if node.name in explicit:
                    renames.append((node, _growth(name, "/q") + emit.fill_growth(node, zero_point)))
                elif name in self._inputs and node.name in self._nodes:
                    renames.append((node, _growth(name, "/dq") * sum(t is tensor for t in node.inputs)))
        return [(node, by) for node, by in renames if by]

    @cached_property
    def _tensors(self) -> dict[str, gs.Tensor]:
        return dict(self._graph.tensors())


def _varint_bytes(value: int) -> int:
    return max(1, -(-value.bit_length() // 7))


def _prefixed(payload: int) -> int:
    """Bytes of a length-delimited protobuf field with a one-byte tag."""
    return 1 + _varint_bytes(payload) + payload


def _payload(field_bytes: int) -> int:
    """Inverse of ``_prefixed``."""
    return next(n for n in range(field_bytes - 2, max(-1, field_bytes - 12), -1) if _prefixed(n) == field_bytes)


def _growth(name: str, ending: str) -> int:
    """What ``ending`` adds to a node that names ``name``: its own bytes, and now and then the length's."""
    before = len(name.encode())
    return _prefixed(before + len(ending.encode())) - _prefixed(before)


def _isolated_growth(layer: Layer) -> int:
    return _growth(layer.input, emit.isolated_name(layer.input, layer.name)[len(layer.input) :])


def _lookup_growth(layer: Layer) -> int:
    return _growth(layer.weight, "/q") + _growth(layer.raw_output, lookups.ROWS)


def _lookup_names(layer: Layer) -> tuple[str, str, str]:
    return stand_in(layer.weight), stand_in(layer.input), stand_in(layer.raw_output)


def _stored_bytes(layer: Layer, stored: StoredLayer, format: QFormat) -> int:
    """Bytes of a quantized weight and of what restores it, packed constants apart."""
    name = stand_in(layer.weight)
    if layer.is_lookup:
        return lookups.table_bytes(name, layer.weight_shape, format, stored.storage)
    return weight_bytes(name, layer.weight_shape, format, stored.storage, stored.with_scale_only)


def _longer(node: gs.Node, by: int) -> int:
    """Upper bound of what ``by`` more characters cost in a node, whatever else lengthens it."""
    payload = _payload(node_bytes(node))
    crosses = _varint_bytes(payload + by + 64) > _varint_bytes(payload)
    return by + int(crosses)


def _entry_bytes(key: str, value: str) -> int:
    return _prefixed(onnx.StringStringEntryProto(key=key, value=value).ByteSize())


def _payers(structure: Structure) -> dict[str, str]:
    """Weight or bias → the first layer that reads it, which alone pays for its bytes."""
    payers: dict[str, str] = {}
    for layer in structure.layers:
        for name in (layer.weight, layer.bias):
            if name is not None:
                payers.setdefault(name, layer.name)
    return payers
