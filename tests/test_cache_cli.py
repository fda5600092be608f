"""``lcpaq cache``: what is shown, what is removed, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lcpaq_onnx.cli.main import main
from lcpaq_onnx.store import STORE_FILE, DiskStore, key_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store with 12 probes and one analysis of net.onnx, and 3 probes of other.onnx."""
    with DiskStore(tmp_path / "cache" / STORE_FILE) as store:
        for index in range(15):
            subject = "net.onnx" if index < 12 else "other.onnx"
            store.put(key_of(index), {"x": np.zeros(2000)}, subject=subject, what="probe")
        store.put(key_of("all"), {"x": np.zeros(3)}, subject="net.onnx", what="analysis")
    return tmp_path / "cache"


def call(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main(["cache", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_list(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = (folder / STORE_FILE).stat().st_size
    code, out, err = call(capsys, "list", "--cache", folder)
    assert (code, err) == (0, "")
    assert f"{folder / STORE_FILE}: {size:,} bytes" in out
    titles, _, *rows = [line.split() for line in out.splitlines()]
    assert titles[:4] == ["model", "what", "entries", "bytes"]
    assert [row[:3] for row in rows[:3]] == [
        ["net.onnx", "analysis", "1"],
        ["net.onnx", "probe", "12"],
        ["other.onnx", "probe", "3"],
    ]
    code, out, err = call(capsys, "list", "--cache", folder, "--json")
    document = json.loads(out)
    assert (document["path"], document["size_bytes"]) == (str(folder / STORE_FILE), size)
    assert [(entry["model"], entry["what"], entry["entries"]) for entry in document["entries"]] == [
        ("net.onnx", "analysis", 1),
        ("net.onnx", "probe", 12),
        ("other.onnx", "probe", 3),
    ]
    assert document["entries"][0]["last_used"].endswith("+00:00")


def test_clear_one_model_and_all(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = (folder / STORE_FILE).stat().st_size
    code, out, err = call(capsys, "clear", "net.onnx", "--cache", folder)
    assert (code, err) == (0, "")
    assert "removed 13 entries of net.onnx" in out
    assert (folder / STORE_FILE).stat().st_size < size / 2
    code, out, err = call(capsys, "clear", "--cache", folder, "--json")
    assert json.loads(out)["removed"] == 3
    assert json.loads(call(capsys, "list", "--cache", folder, "--json")[1])["entries"] == []


def test_an_unknown_model_is_refused_with_those_there_are(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "clear", "nett.onnx", "--cache", folder)
    assert (code, out) == (2, "")
    assert "nothing is stored for 'nett.onnx'" in err
    assert "net.onnx, other.onnx" in err
    assert json.loads(call(capsys, "list", "--cache", folder, "--json")[1])["entries"]


def test_no_store_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is created by looking."""
    monkeypatch.setenv("LCPAQ_CACHE", str(tmp_path / "none"))
    path = tmp_path / "none" / STORE_FILE
    assert call(capsys, "list") == (0, f"{path}: nothing stored\n", "")
    assert call(capsys, "clear") == (0, f"{path}: removed 0 entries, 0 bytes left\n", "")
    assert call(capsys, "clear", "net.onnx")[0] == 2
    assert list(tmp_path.iterdir()) == []


def test_a_broken_store_is_one_line_of_warning(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / STORE_FILE).write_bytes(b"no database" * 1000)
    code, out, err = call(capsys, "list", "--cache", folder)
    assert (code, len(err.splitlines())) == (0, 1)
    assert err.startswith(f"lcpaq: warning: the store {folder / STORE_FILE} cannot be used")
    assert "nothing stored" in out


def test_a_file_that_cannot_be_opened_is_3(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / STORE_FILE).unlink()
    (folder / STORE_FILE).mkdir()
    code, out, err = call(capsys, "list", "--cache", folder)
    assert (code, out) == (3, "")
    assert err.startswith(f"lcpaq: error: {folder / STORE_FILE}: unable to open")
