"""Exact comparison of models, but for what ONNX gives no meaning: order of lists keyed by name, and empty text."""

from __future__ import annotations

import onnx
from google.protobuf.message import Message

__all__ = ["canonical"]

_UNORDERED = {"initializer": "name", "sparse_initializer": "values.name", "value_info": "name"}


def canonical(model: onnx.ModelProto) -> onnx.ModelProto:
    """Copy of ``model`` in which two models are equal exactly if they say the same."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    _normalize(copy)
    return copy


def _normalize(message: Message) -> None:
    for descriptor, value in message.ListFields():
        if value == "" or (isinstance(message, onnx.AttributeProto) and value == b""):
            message.ClearField(descriptor.name)
        elif isinstance(value, Message):
            _normalize(value)
        elif not isinstance(value, (str, bytes, int, float)):
            for item in value:
                if isinstance(item, Message):
                    _normalize(item)
            if isinstance(message, onnx.GraphProto) and descriptor.name in _UNORDERED:
                path = _UNORDERED[descriptor.name].split(".")
                value.sort(key=lambda item: _at(item, path))


def _at(message: Message, path: list[str]) -> str:
    for name in path:
        message = getattr(message, name)
    return str(message)
