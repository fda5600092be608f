"""How much memory is free: as the kernel counts it, on control groups laid out as it lays them out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from lcpaq_onnx.errors import UsageError
from lcpaq_onnx.runtime.memory import _left_by_groups, free_bytes, parse_bytes

MB = 10**6


def group(folder: Path, **files: int | str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n", encoding="utf-8")


def left(tmp_path: Path, membership: str) -> list[int]:
    (tmp_path / "membership").write_text(membership, encoding="utf-8")
    return list(_left_by_groups(tmp_path / "membership", tmp_path / "mount"))


def test_free_bytes_of_this_machine() -> None:
    free = free_bytes()
    assert 0 < free <= psutil.virtual_memory().total


def test_limit_of_address_space() -> None:
    """The process itself takes some of it: between nothing and 2 GB, by what it has loaded."""
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (4 * 10**9, 4 * 10**9))\n"
        "from lcpaq_onnx.runtime.memory import free_bytes\nprint(free_bytes())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < 4 * 10**9


def test_version_2_counts_every_group_up_to_the_root(tmp_path: Path) -> None:
    mount = tmp_path / "mount"
    stat = f"anon {40 * MB}\ninactive_file {7 * MB}\nactive_file {3 * MB}"
    group(mount / "a" / "b", memory__max=100 * MB, memory__current=60 * MB, memory__stat=stat)
    group(mount / "a", memory__max=90 * MB, memory__current=70 * MB, memory__stat=stat)
    group(mount, memory__stat=stat)
    assert left(tmp_path, "0::/a/b\n") == [47 * MB, 27 * MB]


def test_version_2_without_a_limit(tmp_path: Path) -> None:
    group(tmp_path / "mount" / "a", memory__max="max", memory__current=60 * MB, memory__stat="inactive_file 0")
    assert left(tmp_path, "0::/a\n") == []


def test_version_1_beside_version_2(tmp_path: Path) -> None:
    v1 = tmp_path / "mount" / "memory" / "job"
    stat = f"inactive_file 0\ntotal_inactive_file {5 * MB}"
    group(v1, memory__limit_in_bytes=50 * MB, memory__usage_in_bytes=20 * MB, memory__stat=stat)
    assert left(tmp_path, "5:cpu,cpuacct:/job\n4:memory:/job\n1:name=systemd:/x:y\n0::/job\n") == [35 * MB]


def test_a_container_sees_its_group_as_the_root(tmp_path: Path) -> None:
    """The path is that on the host and does not exist here."""
    root = tmp_path / "mount" / "memory"
    group(root, memory__limit_in_bytes=50 * MB, memory__usage_in_bytes=20 * MB, memory__stat="")
    assert left(tmp_path, "4:memory:/docker/0123\n") == [30 * MB]
    group(tmp_path / "mount", memory__max=80 * MB, memory__current=20 * MB, memory__stat="")
    assert left(tmp_path, "0::/../host\n") == [60 * MB]


def test_no_control_groups(tmp_path: Path) -> None:
    assert list(_left_by_groups(tmp_path / "none", tmp_path)) == []


def test_parse_bytes() -> None:
    assert parse_bytes("2GB") == 2 * 10**9
    assert parse_bytes(" 1.5 GiB ") == 3 << 29
    assert parse_bytes("640kb") == 640_000


@pytest.mark.parametrize("text", ["", "2", "2G", "half", "0.5x", "0B", "-1GB", "1GB<=2GB", "10%"])
def test_what_is_no_amount_of_memory(text: str) -> None:
    with pytest.raises(UsageError, match="is not an amount of memory") as refused:
        parse_bytes(text)
    assert "2GB" in refused.value.hint
