from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from onnx import OperatorSetIdProto
from onnx_graphsurgeon.ir.graph import Graph
from onnx_graphsurgeon.ir.node import Node
from onnx_graphsurgeon.ir.tensor import Tensor

class Function(Graph):
    domain: str
    attrs: dict[str, Any]
    def __init__(
        self,
        name: str,
        domain: str | None = None,
        nodes: Sequence[Node] | None = None,
        inputs: Sequence[Tensor] | None = None,
        outputs: Sequence[Tensor] | None = None,
        doc_string: str | None = None,
        opset: int | None = None,
        import_domains: Iterable[OperatorSetIdProto] | None = None,
        functions: Sequence[Function] | None = None,
        attrs: Mapping[str, Any] | None = None,
        ir_version: int | None = None,
    ) -> None: ...
    @property
    def unique_id(self) -> tuple[str, str]: ...
