from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from onnx_graphsurgeon.ir.graph import Graph
from onnx_graphsurgeon.ir.tensor import Tensor

class Node:
    class AttributeRef:
        name: str
        type: object
        def __init__(self, name: str, type: object) -> None: ...

    op: str
    name: str
    attrs: dict[str, Any]
    domain: str | None
    def __init__(
        self,
        op: str,
        name: str | None = None,
        attrs: Mapping[str, object] | None = None,
        inputs: Sequence[Tensor] | None = None,
        outputs: Sequence[Tensor] | None = None,
        domain: str | None = None,
    ) -> None: ...
    @property
    def inputs(self) -> list[Tensor]: ...
    @inputs.setter
    def inputs(self, tensors: Iterable[Tensor]) -> None: ...
    @property
    def outputs(self) -> list[Tensor]: ...
    @outputs.setter
    def outputs(self, tensors: Iterable[Tensor]) -> None: ...
    def i(self, tensor_idx: int = 0, producer_idx: int = 0) -> Node: ...
    def o(self, consumer_idx: int = 0, tensor_idx: int = 0) -> Node: ...
    def subgraphs(self, recursive: bool = False) -> Iterator[Graph]: ...
