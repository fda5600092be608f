"""``lcpaq cache``: what is kept of earlier measurements, and removing it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lcpaq_onnx.cli import arguments
from lcpaq_onnx.cli.console import Console, text_table
from lcpaq_onnx.cli.parser import CommandGroup
from lcpaq_onnx.errors import UsageError

if TYPE_CHECKING:
    from lcpaq_onnx.store import Holding

__all__ = ["add_to"]

_EPILOG = """\
What was measured on a model is kept, so that the next run on it only measures what is new.

examples:
  lcpaq cache list
  lcpaq cache clear
"""
_CLEAR = """\
examples:
  lcpaq cache clear
  lcpaq cache clear net.onnx
"""


def add_to(commands: CommandGroup) -> None:
    group = CommandGroup(commands.add("cache", "list and clear stored measurements", _EPILOG))

    parser = group.add(
        "list", "show what is stored, by model", "example:\n  lcpaq cache list --cache /data/lcpaq\n", command=_list
    )
    _add_folder(parser)
    arguments.add_printing(parser, "path, size and entries")

    parser = group.add("clear", "remove what is stored", _CLEAR, command=_clear)
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="only what was measured on it; a name from `lcpaq cache list`"
    )
    _add_folder(parser)
    arguments.add_printing(parser, "path, size and how many entries went")


def _add_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="the store's folder (default: LCPAQ_CACHE, else the user's cache)"
    )


def _list(args: argparse.Namespace, console: Console) -> int:
    from lcpaq_onnx.store import DiskStore

    path = _path(args)
    found: tuple[Holding, ...] = ()
    if path.exists():
        with DiskStore(path) as store:
            found = store.contents()
    size = _size_bytes(path)
    document = {"path": str(path), "size_bytes": size, "entries": [_described(holding) for holding in found]}
    console.result(f"{_table(found)}{path}: {size:,} bytes" if found else f"{path}: nothing stored", document)
    return 0


def _clear(args: argparse.Namespace, console: Console) -> int:
    from lcpaq_onnx.store import DiskStore

    path = _path(args)
    removed = 0
    if path.exists():
        with DiskStore(path) as store:
            _check_known(args.model, store.contents())
            removed = store.clear(args.model)
    else:
        _check_known(args.model, ())
    size = _size_bytes(path)
    of_what = "" if args.model is None else f" of {args.model}"
    entries = "1 entry" if removed == 1 else f"{removed:,} entries"
    document = {"path": str(path), "size_bytes": size, "removed": removed}
    console.result(f"{path}: removed {entries}{of_what}, {size:,} bytes left", document)
    return 0


def _check_known(model: str | None, found: tuple[Holding, ...]) -> None:
    known = sorted({holding.subject for holding in found})
    if model is not None and model not in known:
        hint = f"there is something for {', '.join(known)}" if known else "the store is empty: nothing to clear"
        raise UsageError(f"nothing is stored for '{model}'", hint=hint)


def _path(args: argparse.Namespace) -> Path:
    from lcpaq_onnx.store import STORE_FILE, default_path

    return default_path() if args.cache is None else Path(args.cache) / STORE_FILE


def _size_bytes(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _table(found: tuple[Holding, ...]) -> str:
    rows = [[h.subject, h.what, f"{h.entries:,}", f"{h.bytes:,}", f"{h.last_used:%Y-%m-%d %H:%M}"] for h in found]
    return text_table(["model", "what", "entries", "bytes", "last used (UTC)"], rows)


def _described(holding: Holding) -> dict[str, object]:
    return {
        "model": holding.subject,
        "what": holding.what,
        "entries": holding.entries,
        "bytes": holding.bytes,
        "last_used": holding.last_used.isoformat(timespec="seconds"),
    }
