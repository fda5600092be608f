"""How much memory this process may still take before somebody ends it, and amounts of memory as text."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from lcpaq_onnx.budget import Budget
from lcpaq_onnx.errors import UsageError

__all__ = ["free_bytes", "parse_bytes"]

_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class _Accounts:
    """Names of a control group's files: its limit, what it uses, and in ``memory.stat`` what of that the kernel drops
    first when memory runs short (pages of files not read lately, of all groups below it too).
    """

    limit: str
    used: str
    droppable: str


# https://docs.kernel.org/admin-guide/cgroup-v2.html and cgroup-v1/memory.html
_V2 = _Accounts("memory.max", "memory.current", "inactive_file")
_V1 = _Accounts("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def free_bytes() -> int:
    """The least of what the machine has available, what the control groups of this process leave (containers, batch
    systems), and what its limit of address space leaves (``ulimit -v``). 0 when one of them is used up.
    """
    free = [psutil.virtual_memory().available, *_left_by_groups(_MEMBERSHIP, _CGROUPS), *_left_of_address_space()]
    return max(0, min(free))


def parse_bytes(text: str) -> int:
    """``2GB``, ``640KiB``, ``1.5e9B``: the units of budgets. Raises UsageError, on less than one byte too."""
    hint = "write e.g. 2GB, 1.5GiB or 800MB"
    try:
        amount = Budget.parse(f"peak_memory<={text.strip()}")
    except UsageError as error:
        raise UsageError(f"'{text}' is not an amount of memory", hint=hint) from error
    if amount.unit != "absolute" or amount.limit < 1:
        raise UsageError(f"'{text}' is not an amount of memory", hint=hint)
    return int(amount.limit)


def _left_by_groups(membership: Path, mount: Path) -> Iterator[int]:
    """What each control group of the process leaves, from its own up to the root's; nothing where there are none."""
    for line in _text(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            accounts, root = _V2, mount
        elif "memory" in controllers.split(","):
            accounts, root = _V1, mount / "memory"
        else:
            continue
        # In a container its own group may be mounted as the root, while the path is that on the host: what does not
        # exist is passed over on the way up.
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(root):
                yield from _left_by_group(folder, accounts)


def _left_by_group(folder: Path, accounts: _Accounts) -> Iterator[int]:
    limit, used = _text(folder / accounts.limit).strip(), _text(folder / accounts.used).strip()
    # "max" is no limit.
    if not (limit.isdecimal() and used.isdecimal()):
        return
    stat = dict(line.split(maxsplit=1) for line in _text(folder / "memory.stat").splitlines() if line)
    yield int(limit) - int(used) + int(stat.get(accounts.droppable, 0))


def _left_of_address_space() -> Iterator[int]:
    if sys.platform == "win32":
        return
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        yield limit - psutil.Process().memory_info().vms


def _text(path: Path) -> str:
    """Nothing where the file is not there or not ours to read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
