"""The store: equal to the bit, shared by processes, whole after a kill, never in the way whatever lies on the disk."""

from __future__ import annotations

import math
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as npst
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from lcpaq_onnx.store import STORE_FILE, DiskStore, MemoryStore, Store, code_version, default_path, key_of, open_store

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """\
import os, sys
from pathlib import Path
import numpy as np
from lcpaq_onnx.store import DiskStore, key_of
store = DiskStore(Path(sys.argv[1]))
def put(index):
    store.put(key_of(index), {"value": np.full(500, index)}, subject="net", what="probe")
"""


def put(store: Store, index: int, size: int = 500, subject: str = "net") -> None:
    store.put(key_of(index), {"value": np.full(size, index)}, subject=subject, what="probe")


def held(store: Store, *indices: int) -> list[int]:
    """Those of ``indices`` that are there; their values are checked."""
    found = store.get_many(map(key_of, indices))
    present = [index for index in indices if key_of(index) in found]
    for index in present:
        assert np.unique(found[key_of(index)]["value"]).tolist() == [index]
    return present


def start(script: str, path: Path, *words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-c", SCRIPT + script, str(path), *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(params=["memory", "disk"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_store(tmp_path / STORE_FILE if request.param == "disk" else None)


# ---- what is kept ---------------------------------------------------------------------------------------------------
def test_put_and_get(store: Store) -> None:
    assert store.get("00") is None
    put(store, 1)
    put(store, 2)
    assert list(store.get_many([key_of(2), "00", key_of(1), key_of(2)])) == [key_of(2), key_of(1)]
    put(store, 1, size=3)
    replaced = store.get(key_of(1))
    assert replaced is not None
    assert replaced["value"].tolist() == [1, 1, 1]
    assert store.get_many([]) == {}


def test_callers_cannot_change_what_is_kept(store: Store) -> None:
    value = np.zeros(3)
    store.put("a", {"x": value}, subject="net", what="probe")
    value[:] = 1
    found = store.get("a")
    assert found is not None
    assert found["x"].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="read-only"):
        found["x"][0] = 1
    found.clear()
    assert store.get("a")


def test_only_plain_numbers(store: Store) -> None:
    with pytest.raises(TypeError, match="'x' of object"):
        store.put("a", {"x": np.array([None])}, subject="net", what="probe")
    with pytest.raises(TypeError, match="'x' of <U1"):
        store.put("a", {"x": np.array(["b"])}, subject="net", what="probe")


DTYPES = st.sampled_from([np.dtype(name) for name in ("float32", "float64", "int64", "bool", ">f4")])
SHAPES = npst.array_shapes(min_dims=0, min_side=0)
ARRAYS = st.dictionaries(st.text(), DTYPES.flatmap(lambda dtype: npst.arrays(dtype, SHAPES)))


@given(arrays=ARRAYS)
def test_arrays_come_back_to_the_bit(tmp_path_factory: pytest.TempPathFactory, arrays: dict[str, NDArray[Any]]) -> None:
    path = tmp_path_factory.mktemp("store") / STORE_FILE
    with DiskStore(path) as store:
        store.put("a", arrays, subject="net", what="probe")
    with DiskStore(path) as store:
        found = store.get("a")
    assert found is not None
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()
        assert found[name].flags.aligned


def test_layouts_do_not_matter(store: Store) -> None:
    value = np.arange(12.0).reshape(3, 4)
    store.put("a", {"x": value.T, "y": value[::2, ::-1]}, subject="net", what="probe")
    found = store.get("a")
    assert found is not None
    np.testing.assert_array_equal(found["x"], value.T)
    np.testing.assert_array_equal(found["y"], value[::2, ::-1])


def test_threads(store: Store) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda index: put(store, index), range(200)))
        assert list(pool.map(lambda index: held(store, index), range(200))) == [[index] for index in range(200)]


def test_memory_is_bounded() -> None:
    store = MemoryStore(limit_bytes=3 * 4000)
    for index in range(3):
        put(store, index)
    assert held(store, 0) == [0]
    put(store, 3)
    assert held(store, 0, 1, 2, 3) == [0, 2, 3]


def test_four_hundred_entries_are_one_question(tmp_path: Path) -> None:
    """20 ms is the limit that was asked for; 6 measured. The least of five, since the machine is shared."""
    path = tmp_path / STORE_FILE
    with DiskStore(path) as store:
        for index in range(400):
            put(store, index, size=50)
    seconds = []
    for _ in range(5):
        with DiskStore(path) as store:
            started = time.perf_counter()
            found = store.get_many([key_of(index) for index in range(400)])
            seconds.append(time.perf_counter() - started)
            assert len(found) == 400
    assert min(seconds) < 0.02


# ---- the disk -------------------------------------------------------------------------------------------------------
def test_the_least_recently_used_go(tmp_path: Path) -> None:
    path = tmp_path / STORE_FILE
    with DiskStore(path) as store:
        for index in range(50):
            put(store, index)
    used_bytes = path.stat().st_size
    with DiskStore(path, limit_bytes=used_bytes) as store:
        assert held(store, 0) == [0]
        for index in range(50, 70):
            put(store, index)
    with DiskStore(path) as store:
        kept = held(store, *range(70))
    assert kept == [0, *range(kept[1], 70)]
    assert 20 <= kept[1] <= 26
    assert path.stat().st_size <= used_bytes + 3 * 4096


def test_what_is_larger_than_the_store_stays_in_memory(tmp_path: Path) -> None:
    path = tmp_path / STORE_FILE
    with DiskStore(path, limit_bytes=100_000) as store:
        put(store, 1)
        put(store, 2, size=100_000)
        assert held(store, 1, 2) == [1, 2]
    with DiskStore(path) as store:
        assert held(store, 1, 2) == [1]


def test_contents_and_clear(tmp_path: Path) -> None:
    path = tmp_path / STORE_FILE
    with DiskStore(path) as store:
        for index in range(60):
            put(store, index, subject="b" if index % 3 else "a")
        store.put("x", {}, subject="b", what="analysis")
    full = path.stat().st_size
    with DiskStore(path) as store:
        found = store.contents()
        assert [(one.subject, one.what, one.entries) for one in found] == [
            ("a", "probe", 20),
            ("b", "analysis", 1),
            ("b", "probe", 40),
        ]
        assert sum(one.bytes for one in found) == pytest.approx(full, rel=0.5)
        assert abs(found[0].last_used.timestamp() - time.time()) < 60
        assert store.clear("c") == 0
        assert store.clear("b") == 41
        assert held(store, *range(6)) == [0, 3]
        assert path.stat().st_size < 0.5 * full
        assert store.clear() == 20
        assert store.contents() == ()
        assert path.stat().st_size < 0.2 * full


def test_a_subject_need_not_be_unicode(tmp_path: Path) -> None:
    with DiskStore(tmp_path / STORE_FILE) as store:
        put(store, 1, subject=os.fsdecode(b"net\xff.onnx"))
        assert store.contents()[0].subject == "net?.onnx"


def test_a_killed_process_loses_nothing(tmp_path: Path) -> None:
    """Every put that returned is there, whenever the kill comes; three times on one file."""
    path = tmp_path / STORE_FILE
    script = "for index in range(int(sys.argv[2]), 10**9):\n    put(index)\n    print(index, flush=True)\n"
    returned: list[int] = []
    for lines in (1, 37, 120):
        process = start(script, path, 1000 * lines)
        assert process.stdout is not None
        returned.extend(int(process.stdout.readline()) for _ in range(lines))
        process.kill()
        rest, errors = process.communicate()
        assert errors == ""
        returned.extend(map(int, rest.split()))
        with DiskStore(path) as store:
            assert held(store, *returned) == returned
    assert not path.with_name(f"{STORE_FILE}.broken").exists()


def test_processes_put_at_once(tmp_path: Path) -> None:
    """They create the file together, and write the same keys as well as their own."""
    path = tmp_path / "new" / STORE_FILE
    script = "first = int(sys.argv[2])\nfor index in range(first, first + 150):\n    put(index)\n"
    processes = [start(script, path, first) for first in (0, 100, 200)]
    assert [process.communicate() for process in processes] == 3 * [("", "")]
    with DiskStore(path) as store:
        assert held(store, *range(350)) == list(range(350))


def test_a_forked_child_has_its_own_connection(tmp_path: Path) -> None:
    script = """\
put(1)
child = os.fork()
if not child:
    put(2)
    sys.exit(0 if store.get(key_of(1)) else 1)
put(3)
assert os.waitpid(child, 0)[1] == 0
assert store.get(key_of(2))
put(4)
"""
    assert start(script, tmp_path / STORE_FILE).communicate() == ("", "")
    with DiskStore(tmp_path / STORE_FILE) as store:
        assert held(store, 1, 2, 3, 4) == [1, 2, 3, 4]


# ---- files that are not ours, or no longer -----------------------------------------------------------------------
def garbage(path: Path) -> None:
    path.write_bytes(b"this is not a database, however long one looks at it" * 100)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9000])


def flipped_bit(path: Path) -> None:
    content = path.read_bytes()
    value = np.full(500, 1).tobytes()
    place = content.index(value[:800]) + 400
    path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])


def other_version(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()


def foreign(path: Path) -> None:
    path.unlink()
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE bookmarks (address TEXT)")
    connection.close()


def opened_and_held(path: Path) -> list[int]:
    with DiskStore(path) as store:
        return held(store, *range(20))


@pytest.mark.parametrize("spoil", [garbage, cut_short, flipped_bit, other_version, foreign])
def test_a_broken_file_is_set_aside(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    path = tmp_path / STORE_FILE
    with DiskStore(path) as store:
        for index in range(20):
            put(store, index)
    spoil(path)
    spoilt = path.read_bytes()
    with pytest.warns(UserWarning, match=re.escape(f"{path} cannot be used")) as warned:
        held_after = opened_and_held(path)
    assert held_after == []
    assert len(warned) == 1
    assert "\n" not in str(warned[0].message)
    assert path.with_name("store.sqlite.broken").read_bytes() == spoilt
    with DiskStore(path) as store:
        put(store, 5)
    with DiskStore(path) as store:
        assert held(store, 5, 6) == [5]


def test_one_process_sets_aside_and_the_other_goes_on_in_the_new_file(tmp_path: Path) -> None:
    path = tmp_path / STORE_FILE
    with DiskStore(path) as store:
        put(store, 1)
    flipped_bit(path)
    first, second = DiskStore(path), DiskStore(path)
    with pytest.warns(UserWarning, match="set aside"):
        assert held(first, 1) == []
    put(first, 2)
    # It still reads the old file, and finds what is wrong there by itself; the new file must not suffer.
    assert held(second, 1) == []
    assert held(second, 2) == [2]
    first.close()
    second.close()


def test_an_empty_file_is_a_new_store(tmp_path: Path) -> None:
    (tmp_path / STORE_FILE).touch()
    with DiskStore(tmp_path / STORE_FILE) as store:
        put(store, 1)
        assert held(store, 1) == [1]


def test_where_no_file_can_be_the_store_is_in_memory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / STORE_FILE
    with pytest.raises(OSError, match="file"):
        DiskStore(path)
    with pytest.warns(UserWarning, match=re.escape(f"no store can be at {path} (")):
        store = open_store(path)
    put(store, 1)
    assert held(store, 1) == [1]


def test_a_full_disk_is_said_once(tmp_path: Path) -> None:
    """A limit on the size of files stands for it."""
    path = tmp_path / STORE_FILE
    with DiskStore(path) as store:
        put(store, 1)
    script = """\
import resource, warnings
warnings.simplefilter("always")
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
for index in range(2, 400):
    put(index)
assert store.get(key_of(399))
assert store.get(key_of(1))
"""
    _, errors = start(script, path).communicate()
    (line,) = [line for line in errors.splitlines() if "Warning" in line]
    assert re.search(r"the store .*/store.sqlite does not work \(.*\): what is measured now is not kept", line)
    assert "Error" not in errors
    with DiskStore(path) as store:
        kept = held(store, *range(400))
    assert kept == list(range(1, kept[-1] + 1))
    assert 10 < len(kept) < 390


# ---- keys and places ------------------------------------------------------------------------------------------------
PARTS = st.lists(st.one_of(st.text(), st.binary(), st.integers(), st.floats()), max_size=4)


@given(first=PARTS, second=PARTS)
def test_keys_differ_where_parts_differ(first: list[Any], second: list[Any]) -> None:
    same = [(type(part), repr(part)) for part in first] == [(type(part), repr(part)) for part in second]
    assert (key_of(*first) == key_of(*second)) == same


def test_keys() -> None:
    # Fixed: other keys would throw away everybody's stores, which takes a new SCHEMA instead.
    assert key_of("ab", b"c", 3, 0.5) == "63bd7ac6316d324418a09659a03f9357d8dff26652b86fcafd9e2d44c43f5013"
    different = [
        ("ab", "c"), ("a", "bc"), ("abc",), ("abc", ""), (b"abc",), (1,), ("1",), (1.0,), (True,), (), (0.0,), (-0.0,),
        (math.inf,), (math.nan,),
    ]  # fmt: skip
    assert len({key_of(*parts) for parts in different}) == len(different)
    number: Any = np.float32(1)
    with pytest.raises(TypeError, match="not float32"):
        key_of(number)


def test_code_version_follows_the_sources_not_the_layout(tmp_path: Path) -> None:
    """Copied as a wheel would lay it out."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "lcpaq_onnx", tmp_path / "lcpaq_onnx", ignore=ignore)
    shutil.copytree(ROOT / "passes", tmp_path / "lcpaq_onnx" / "passes", ignore=ignore)

    def version() -> str:
        code = "import sys; from lcpaq_onnx.store import code_version; print(code_version()); "
        code += "assert 'onnxruntime' not in sys.modules"
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            cwd=tmp_path, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout.strip()

    assert version() == code_version()
    with (tmp_path / "lcpaq_onnx" / "cli" / "main.py").open("a") as file:
        file.write("# decides no value\n")
    assert version() == code_version()
    with (tmp_path / "lcpaq_onnx" / "passes" / "analysis" / "sensitivity.py").open("a") as file:
        file.write("# may decide one\n")
    assert version() != code_version()


def test_default_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("LCPAQ_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert default_path() == tmp_path / ".cache" / "lcpaq" / "store.sqlite"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_path() == tmp_path / ".cache" / "lcpaq" / "store.sqlite"
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/me")
    assert default_path() == Path("/var/me/lcpaq/store.sqlite")
    monkeypatch.setenv("LCPAQ_CACHE", "/data")
    assert default_path() == Path("/data/store.sqlite")
