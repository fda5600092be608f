"""What was measured, kept by the hash of everything it depends on: the same question is never worked out twice.

A key names its content: whoever asks puts all that decides the value into ``key_of``, and what is found is right. See
docs/store.md.
"""

from lcpaq_onnx.store.disk import DiskStore, Holding
from lcpaq_onnx.store.keys import code_version, key_of
from lcpaq_onnx.store.memory import MemoryStore, Store
from lcpaq_onnx.store.place import STORE_FILE, default_path, open_store

__all__ = [
    "STORE_FILE",
    "DiskStore",
    "Holding",
    "MemoryStore",
    "Store",
    "code_version",
    "default_path",
    "key_of",
    "open_store",
]
