"""Reading, writing and copying models: the one way in and out of an ``onnx_graphsurgeon`` graph, without loss.

A loaded graph, edited or not, is written with everything the file had: metadata and doc strings of model, graph, nodes
and tensors, overridable and unused initializers, local functions, every attribute kind and data type, external data.
Attribute kinds that graphsurgeon lacks are ONNX messages in ``node.attrs``; bodies of a GRAPHS attribute refer to outer
tensors by name and do not follow a renamed one, nor does ``training_info``.
"""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError
from typing_extensions import Buffer

from lcpaq_onnx.errors import ModelError
from lcpaq_onnx.graph.exporting import Exporter, function_message, node_bytes
from lcpaq_onnx.graph.external_data import DataFolder
from lcpaq_onnx.graph.importing import import_model
from lcpaq_onnx.graph.model import DEFAULT_DOMAINS, Graph
from lcpaq_onnx.graph.notes import NOTES, drop_entries, entry_of, node_metadata, node_notes, scope_notes
from lcpaq_onnx.graph.saving import ModelFile, write_files
from lcpaq_onnx.graph.tensors import constant, constant_bytes
from lcpaq_onnx.graph.value_info import value_info_bytes

__all__ = [
    "EXTERNAL_DATA_ABOVE_BYTES",
    "Graph",
    "Source",
    "constant",
    "constant_bytes",
    "content_sha256",
    "copy",
    "fix_initializer",
    "load",
    "node_bytes",
    "node_metadata",
    "overridable_initializers",
    "save",
    "section_bytes",
    "serialized_size",
    "to_proto",
    "value_info_bytes",
]

EXTERNAL_DATA_ABOVE_BYTES = 2**31 - 2**20
"""Default size above which ``save`` uses external data: protobuf's limit of 2 GiB less 1 MiB."""


Source = str | os.PathLike[str] | onnx.ModelProto


# ---- in -------------------------------------------------------------------------------------------------------------
def load(source: Source) -> Graph:
    """The graph of a model file or of a ModelProto, which is neither changed nor kept. External data are checked to be
    there, and read when values are asked for or the graph is saved.

    Raises ModelError if the file is missing or no ONNX model, its types are unknown, or external data are missing, cut
    short or outside the model's folder.
    """
    model = source if isinstance(source, onnx.ModelProto) else _parse(Path(source))
    # Absolute: lazy external data must be found even if the working directory changes.
    path = None if isinstance(source, onnx.ModelProto) else Path(source).absolute()
    graph = import_model(model, DataFolder(path))
    result = Graph(
        model,
        nodes=graph.nodes,
        inputs=graph.inputs,
        outputs=graph.outputs,
        name=graph.name,
        doc_string=graph.doc_string,
        functions=graph.functions,
        base_dir=None if path is None else path.parent,
    )
    vars(result)[NOTES] = scope_notes(graph)
    return result


def _parse(path: Path) -> onnx.ModelProto:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}", hint="check the path of the model file") from error
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError as error:
        raise ModelError(
            f"{path} ({len(data)} bytes) is not an ONNX model, or it is cut short", hint="copy or download it again"
        ) from error
    if not model.HasField("graph"):
        raise ModelError(f"{path} ({len(data)} bytes) holds no graph: not an ONNX model", hint="check the path")
    return model


# ---- out ------------------------------------------------------------------------------------------------------------
def to_proto(graph: Graph) -> onnx.ModelProto:
    """``graph`` as a message of its own. External data are still referred to, relative to ``graph.base_dir``.

    Raises ModelError if two tensors have one name or external data changed since they were loaded.
    """
    model = _rest(graph)
    model.graph.CopyFrom(Exporter(graph.ir_version).graph(graph, {}))
    return model


def save(
    graph: Graph, path: str | os.PathLike[str], *, external_data_above_bytes: int = EXTERNAL_DATA_ABOVE_BYTES
) -> None:
    """Writes ``graph`` to ``path``, atomically: on any failure the old file stands and nothing else is left.

    A model that takes more than ``external_data_above_bytes`` in one file puts its constants of 1 KiB or more into
    ``<name>.data`` beside it; any other is one file, wherever its data were before (an older ``<name>.data`` is left
    alone). Two saves give the same bytes.
    Raises ModelError if it cannot be written. Graphs loaded from a file that is overwritten keep working, but for
    external data that were overwritten too: these give a ModelError when read.
    """
    path = Path(path)
    file = _model_file(graph, path.name, external_data_above_bytes)
    files = [(path, file.write)]
    if file.has_external:
        files.insert(0, (path.with_name(f"{path.name}.data"), file.write_external))
    try:
        write_files(files)
    except OSError as error:
        raise ModelError(
            f"{path} cannot be written: {error.strerror or error}",
            hint="choose an existing folder with enough free space",
        ) from error


def serialized_size(graph: Graph, *, external_data_above_bytes: int = EXTERNAL_DATA_ABOVE_BYTES) -> int:
    """Exact bytes of the model file that ``save`` would write, without the file of external data. If there is one, the
    name of the model counts: this is the size of a ``model.onnx``.
    """
    return _model_file(graph, "model.onnx", external_data_above_bytes).size()


def section_bytes(graph: Graph) -> tuple[int, int]:
    """Bytes of the model outside its graph, and of the graph's own message with all data inside."""
    rest = _rest(graph)
    return int(rest.ByteSize()), ModelFile(rest, graph).graph_bytes()


def content_sha256(graph: Graph) -> str:
    """Hash of everything the model holds, external data included: equal exactly for equal models."""
    file = _model_file(graph, "model.onnx", EXTERNAL_DATA_ABOVE_BYTES)
    raw = _HashStream()
    with io.BufferedWriter(raw) as stream:
        file.write(stream)
        file.write_external(stream)
    return raw.hash.hexdigest()


class _HashStream(io.RawIOBase):
    """Takes what is written into a SHA-256."""

    def __init__(self) -> None:
        self.hash = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Buffer) -> int:
        view = memoryview(data)
        self.hash.update(view)
        return view.nbytes


def copy(graph: Graph) -> Graph:
    """An independent copy. Payloads of constants are shared: assign new ``values``, never write into them."""
    return graph.copy()


# ---- initializers that are inputs too -------------------------------------------------------------------------------
def overridable_initializers(graph: Graph) -> list[gs.Constant]:
    """Constants of the main graph that are also graph inputs, so that a caller may feed other values (all of them in IR
    version 3). ONNX Runtime neither folds nor pre-packs these from IR version 4 on.
    """
    scope = scope_notes(graph)
    read = (tensor for node in graph.nodes for tensor in node.inputs)
    constants = {id(tensor): tensor for tensor in read if isinstance(tensor, gs.Constant)}
    return [tensor for tensor in constants.values() if entry_of(tensor, scope, "input")]


def fix_initializer(constant: gs.Constant) -> None:
    """Makes an overridable initializer a constant for good (up to IR version 3 the format has no such thing)."""
    drop_entries(constant, "input")


def _model_file(graph: Graph, name: str, external_data_above_bytes: int) -> ModelFile:
    rest = _rest(graph)
    file = ModelFile(rest, graph)
    return file if file.size() <= external_data_above_bytes else ModelFile(rest, graph, f"{name}.data")


def _rest(graph: Graph) -> onnx.ModelProto:
    """The model without its graph."""
    model = onnx.ModelProto()
    model.CopyFrom(graph.header)
    model.functions.extend(function_message(function) for function in graph.functions)
    imported = {entry.domain for entry in model.opset_import}
    for domain in sorted(_added_domains(graph) - imported):
        model.opset_import.add(domain=domain, version=1)
    return model


def _added_domains(graph: Graph) -> set[str]:
    """Domains, other than the default one, of nodes that were not in the file: the header may not import them."""
    graphs = [graph, *graph.subgraphs(recursive=True)]
    added = {node.domain or "" for each in graphs for node in each.nodes if node_notes(node) is None}
    return added.difference(DEFAULT_DOMAINS)
