"""The in-memory graph: an ``onnx_graphsurgeon`` graph that knows the model around it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs

from lcpaq_onnx.graph.copying import Copier
from lcpaq_onnx.graph.notes import scope_notes

__all__ = ["DEFAULT_DOMAINS", "Graph"]

DEFAULT_DOMAINS = ("", "ai.onnx")
"""Names of the default operator set."""


class Graph(gs.Graph):
    """A gs.Graph plus the rest of its model.

    ``header``: every field of the ModelProto except ``graph`` and ``functions``; ``opset``, ``import_domains``,
    ``ir_version`` and the producer are views of it. ``base_dir``: folder of external data, None if the model came from
    memory.
    """

    header: onnx.ModelProto
    base_dir: Path | None

    def __init__(
        self,
        header: onnx.ModelProto,
        *,
        nodes: Sequence[gs.Node] = (),
        inputs: Sequence[gs.Tensor] = (),
        outputs: Sequence[gs.Tensor] = (),
        name: str = "graph",
        doc_string: str = "",
        functions: Sequence[gs.Function] = (),
        base_dir: Path | None = None,
    ) -> None:
        """``header`` is copied, less its graph and functions. Other parameters as in gs.Graph."""
        self.header = onnx.ModelProto()
        for descriptor, value in header.ListFields():
            if descriptor.name in ("graph", "functions"):
                continue
            if isinstance(value, (str, int)):
                setattr(self.header, descriptor.name, value)
            else:
                getattr(self.header, descriptor.name).extend(value)
        self.base_dir = base_dir
        super().__init__(
            nodes=list(nodes),
            inputs=inputs,
            outputs=outputs,
            name=name,
            doc_string=doc_string,
            opset=self.opset,
            import_domains=self.import_domains,
            producer_name=self.producer_name,
            producer_version=self.producer_version,
            functions=functions,
            ir_version=self.ir_version,
        )

    @property
    def opset(self) -> int:
        """Version of the default operator set; 1 if the model imports none, as before IR version 3."""
        return next((entry.version for entry in self.header.opset_import if entry.domain in DEFAULT_DOMAINS), 1)

    @opset.setter
    def opset(self, opset: int) -> None:
        if opset == self.opset:
            return  # graphsurgeon's constructor sets what it was given: add no import to a model without one
        for entry in self.header.opset_import:
            if entry.domain in DEFAULT_DOMAINS:
                entry.version = opset
                return
        self.header.opset_import.add(domain="", version=opset)

    @property
    def import_domains(self) -> Sequence[onnx.OperatorSetIdProto]:
        """Operator sets that the model imports, live."""
        imports: Sequence[onnx.OperatorSetIdProto] = self.header.opset_import
        return imports

    @import_domains.setter
    def import_domains(self, domains: Iterable[onnx.OperatorSetIdProto] | None) -> None:
        imports = [onnx.helper.make_opsetid(entry.domain, entry.version) for entry in domains or ()]
        del self.header.opset_import[:]
        self.header.opset_import.extend(imports)

    @property
    def ir_version(self) -> int:
        """IR version of the model."""
        return self.header.ir_version

    @ir_version.setter
    def ir_version(self, version: int | None) -> None:
        if version is not None and version != self.ir_version:
            self.header.ir_version = version

    @property
    def producer_name(self) -> str:
        """Tool that made the model."""
        return self.header.producer_name

    @producer_name.setter
    def producer_name(self, name: str) -> None:
        _set_text(self.header, "producer_name", name)

    @property
    def producer_version(self) -> str:
        """Version of that tool."""
        return self.header.producer_version

    @producer_version.setter
    def producer_version(self, version: str) -> None:
        _set_text(self.header, "producer_version", version)

    @property
    def metadata(self) -> dict[str, str]:
        """Live ``metadata_props`` of the graph (those of the model are in ``header``)."""
        return scope_notes(self).metadata

    @property
    def unused_initializers(self) -> list[gs.Constant]:
        """Live list of initializers that nothing read when the model was loaded; they are written as long as they stay
        in it. One that fell out of use later is not written.
        """
        return scope_notes(self).unused

    def toposort(self, recurse_subgraphs: bool = True, recurse_functions: bool = True, mode: str = "nodes") -> Graph:
        """As in graphsurgeon, but functions keep their order: its sorting of functions never ends if the graph has
        subgraphs too, and drops overloads.
        """
        super().toposort(recurse_subgraphs, recurse_functions, mode)
        return self

    def copy(self, tensor_map: Mapping[str, gs.Tensor] | None = None) -> Graph:
        """An independent copy. ``tensor_map`` is for graphsurgeon's copies of subgraphs and not used."""
        copier = Copier()
        result = Graph(
            self.header,
            nodes=copier.nodes(self.nodes),
            inputs=copier.tensors(self.inputs),
            outputs=copier.tensors(self.outputs),
            name=self.name,
            doc_string=self.doc_string,
            functions=[Copier().function(function) for function in self.functions],
            base_dir=self.base_dir,
        )
        copier.add_scope(self, result)
        return result


def _set_text(message: onnx.ModelProto, name: str, text: str) -> None:
    """Leaves an absent field absent when it is set to nothing."""
    if text or message.HasField(name):
        setattr(message, name, text)
