"""What onnx-graphsurgeon has no place for, noted on its objects at load and written out again at save.

Notes are a Python attribute of the object, so they go where it goes and vanish with it. They never repeat what
graphsurgeon does hold: names, wiring, attributes and values are always written from the live objects.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import onnx
import onnx_graphsurgeon as gs

__all__ = [
    "METADATA",
    "NOTES",
    "Entry",
    "FunctionNotes",
    "NodeNotes",
    "ScopeNotes",
    "Section",
    "TensorNotes",
    "drop_entries",
    "entry_of",
    "function_notes",
    "node_metadata",
    "node_notes",
    "scope_notes",
    "tensor_notes",
]

NOTES = "lcpaq_notes"
METADATA = "metadata_props"

Section = Literal["input", "output", "value_info", "initializer"]


@dataclass(frozen=True)
class Entry:
    """A tensor's place in one list of one GraphProto. ``message``: the ValueInfoProto; of an initializer, a TensorProto
    with its doc string and metadata only. ``scope``: token of the graph, see ScopeNotes.
    """

    scope: object
    section: Section
    index: int
    message: onnx.ValueInfoProto | onnx.TensorProto


@dataclass(frozen=True)
class TensorNotes:
    """``described``: data type, shape and kind at load; while they stand, the ValueInfoProtos are written verbatim."""

    name: str
    described: tuple[object, ...]
    entries: tuple[Entry, ...] = ()


@dataclass(frozen=True)
class NodeNotes:
    """``rest``: a NodeProto with the fields graphsurgeon lacks. ``attributes``: type and doc string of each."""

    rest: onnx.NodeProto
    attributes: dict[str, onnx.AttributeProto]


@dataclass
class ScopeNotes:
    """Notes of a graph or subgraph. Copies of a graph share ``token``, so entries of copied tensors still match.

    ``strays``: value_info entries, with index, of names that no node has. ``unused``: constants that nothing read.
    """

    token: object = field(default_factory=object)
    metadata: dict[str, str] = field(default_factory=dict)
    quantization_annotation: list[onnx.TensorAnnotation] = field(default_factory=list)
    strays: list[tuple[int, onnx.ValueInfoProto]] = field(default_factory=list)
    unused: list[gs.Constant] = field(default_factory=list)


@dataclass(frozen=True)
class FunctionNotes:
    """``original`` is written verbatim while the function still exports to a message of that ``digest``."""

    original: onnx.FunctionProto
    attributes: dict[str, onnx.AttributeProto]
    digest: bytes = b""


# vars() and not getattr(): gs.Graph.__getattr__ prints an error for a name it does not know.
def tensor_notes(tensor: gs.Tensor) -> TensorNotes | None:
    """Notes of ``tensor``; None if it was made after loading."""
    notes = vars(tensor).get(NOTES)
    return notes if isinstance(notes, TensorNotes) else None


def node_notes(node: gs.Node) -> NodeNotes | None:
    """Notes of ``node``; None if it was made after loading."""
    notes = vars(node).get(NOTES)
    return notes if isinstance(notes, NodeNotes) else None


def function_notes(function: gs.Function) -> FunctionNotes | None:
    """Notes of ``function``; None if it was made after loading."""
    notes = vars(function).get(NOTES)
    return notes if isinstance(notes, FunctionNotes) else None


def scope_notes(graph: gs.Graph) -> ScopeNotes:
    """Live notes of a graph or subgraph, made empty if it has none."""
    notes = vars(graph).setdefault(NOTES, ScopeNotes())
    assert isinstance(notes, ScopeNotes)
    return notes


def node_metadata(node: gs.Node) -> dict[str, str]:
    """Live ``metadata_props`` of ``node``, made empty if it has none; kept by copy, save and load."""
    metadata: dict[str, str] = vars(node).setdefault(METADATA, {})
    return metadata


def entry_of(tensor: gs.Tensor, scope: ScopeNotes, section: Section) -> Entry | None:
    """Place of ``tensor`` in one list of the graph that ``scope`` belongs to."""
    notes = tensor_notes(tensor)
    entries = notes.entries if notes else ()
    return next((entry for entry in entries if entry.scope is scope.token and entry.section == section), None)


def drop_entries(tensor: gs.Tensor, section: Section) -> None:
    """Forgets that ``tensor`` was listed in ``section`` of any graph."""
    notes = tensor_notes(tensor)
    if notes:
        kept = tuple(entry for entry in notes.entries if entry.section != section)
        vars(tensor)[NOTES] = replace(notes, entries=kept)
