"""README and docs/ stay true: commands parse, snippets run, links lead somewhere, the report is that of a real run."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rewriting import assert_same_outputs, notes_of, ops, outputs_of, parse, rewrite

from lcpaq_onnx.cli.main import build_parser, main
from lcpaq_onnx.manager.pass_base import RewritePass
from lcpaq_onnx.manager.pipeline import parse_pipeline
from lcpaq_onnx.manager.registry import Entry, Registry, builtin_registry
from lcpaq_onnx.passes import BUILTIN_ANALYSES, BUILTIN_PASSES
from lcpaq_onnx.targets.loader import available, load
from lcpaq_onnx.verification.report import Report

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = (README, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")))
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path, language: str) -> list[str]:
    """Contents of the fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.S | re.M)


def commands(page: Path) -> list[str]:
    """Every single command of the shell blocks: continued lines joined, ``a && b`` taken apart."""
    lines = [line for block in blocks(page, "sh") for line in re.sub(r"\\\n *", "", block).splitlines()]
    return [part.strip() for line in lines for part in line.split("&&") if part.strip()]


def lcpaq_words(page: Path) -> list[list[str]]:
    """Arguments of every ``lcpaq`` command."""
    split = [shlex.split(command) for command in commands(page)]
    return [words[1:] for words in split if Path(words[0]).name == "lcpaq"]


def snippet(containing: str) -> str:
    (found,) = [block for block in blocks(README, "python") if containing in block]
    return found


def printed_by(code: str, folder: Path) -> str:
    """What Python ``code`` prints, run in ``folder`` beside the models."""
    (folder / "models").symlink_to(ROOT / "models")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- commands -------------------------------------------------------------------------------------------------------
@each_page
def test_commands_parse(page: Path) -> None:
    for words in lcpaq_words(page):
        build_parser().parse(words)


def test_there_are_exactly_two_installing_commands() -> None:
    """``.ci/run`` takes them from the README and runs them."""
    found = [command for command in commands(README) if command.startswith("python3 -m venv")]
    assert len(found) == 2
    extra = [command for command in commands(README) if "pip install" in command]
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert extra == [".venv/bin/pip install .", ".venv/bin/pip install -e '.[test]'"]
    assert "test" in declared


@each_page
def test_pipelines_name_passes_that_exist(page: Path) -> None:
    known = Registry.of([*builtin_registry().entries.values(), Entry("remove-identity", f"{__name__}:none", "README")])
    for words in lcpaq_words(page):
        if "--pipeline" in words:
            text = words[words.index("--pipeline") + 1].replace("remove-identity", "remove-unused")
            assert parse_pipeline(text, known)


def test_passes_page_names_every_pass_and_analysis() -> None:
    text = (ROOT / "docs" / "passes.md").read_text(encoding="utf-8")
    missing = [name for name in (*BUILTIN_PASSES, *BUILTIN_ANALYSES) if not re.search(rf"`{name}[`{{]", text)]
    assert missing == []


def test_targets_that_are_named_exist() -> None:
    named = set(
        re.findall(r"`(onnxruntime-[\w-]+|generic-[\w-]+)`", "".join(p.read_text(encoding="utf-8") for p in PAGES))
    )
    assert named == set(available())


# ---- links ----------------------------------------------------------------------------------------------------------
@each_page
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    headings = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)$", text, re.M)
    }
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        assert (page.parent / path).exists(), link
        assert not anchor or anchor in headings, link


# ---- Python ---------------------------------------------------------------------------------------------------------
def test_api_snippet_runs(tmp_path: Path) -> None:
    code = snippet("lq.quantize(")
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    passed, size_bytes, share = printed_by(code, tmp_path).split()
    assert passed == "True"
    assert (tmp_path / "fast.onnx").stat().st_size == int(size_bytes)
    assert (tmp_path / "small.onnx").stat().st_size <= 0.2 * (ROOT / "models" / "digits_resnet.onnx").stat().st_size
    assert 0 < float(share) <= 1


def test_snippet_of_settings_and_execution_runs(tmp_path: Path) -> None:
    printed = printed_by(snippet("lq.Execution("), tmp_path)
    assert printed.startswith("Sensitivity(estimator='rounding-error', samples=32, ")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["store.sqlite"]


def test_pass_snippet_is_a_good_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "readme_pass.py").write_text(snippet("class RemoveIdentity"), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    found = Entry("remove-identity", "readme_pass:RemoveIdentity", "the README").load()
    assert issubclass(found, RewritePass)
    remove = found()
    graph = parse("agraph (float[2] x) => (float[2] y, float[2] z) { t = Identity(x) y = Relu(t) z = Identity(t) }")
    feed = {"x": np.array([-1.0, 2.0], np.float32)}
    result = rewrite(graph, [remove], [feed])
    assert ops(result) == ["Relu", "Identity"]
    assert list(notes_of(graph, remove).values()) == ["the model returns it"]
    assert_same_outputs(outputs_of(graph, feed), outputs_of(result, feed), 0.0)


# ---- TOML -----------------------------------------------------------------------------------------------------------
def test_target_snippet_is_valid(tmp_path: Path) -> None:
    (text,) = [block for block in blocks(README, "toml") if block.startswith("schema")]
    path = tmp_path / "gateway.toml"
    path.write_text(text, encoding="utf-8")
    target = load(path)
    assert target.runtime.opset_max == 21
    assert target.storage_for(2).expression == "packed-bytes"


def test_entry_point_snippet_is_the_registrys_group() -> None:
    (text,) = [block for block in blocks(README, "toml") if "entry-points" in block]
    assert tomllib.loads(text)["project"]["entry-points"]["lcpaq_onnx.passes"]


# ---- the printed report ---------------------------------------------------------------------------------------------
def section_titles(text: str) -> list[str]:
    """Unindented lines, up to what differs from run to run."""
    lines = [line for line in text.splitlines() if line and not line.startswith((" ", "warning", "lcpaq ", "wrote"))]
    return [re.split(r"[:;]| with ", line)[0] for line in lines]


def first_words(text: str, after: str, until: str) -> list[str]:
    """First column (two blanks end it) of the indented lines between two section titles."""
    part = text.split(f"\n{after}", 1)[1].split(f"\n{until}", 1)[0]
    lines = [line.strip() for line in part.splitlines() if line.startswith("  ") and not line.startswith("   ")]
    return [re.split(r"\s{2,}|: ", line)[0] for line in lines if not line.startswith("--")]


def sizes_kb(text: str) -> tuple[float, float]:
    match = re.search(r"size +[\d.]+x smaller: ([\d.]+) KB -> ([\d.]+) KB", text)
    assert match is not None
    return float(match[1]), float(match[2])


def test_printed_report_is_that_of_a_real_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (printed,) = [block for block in blocks(README, "text") if block.startswith("digits_resnet.onnx ->")]
    (words,) = [words for words in lcpaq_words(README) if words[0] == "quantize" and "models/" in words[1]]
    out = tmp_path / words[words.index("-o") + 1]
    absolute = [str(ROOT / word) if word.startswith("models/") else word for word in words[:-1]]
    capsys.readouterr()
    assert main([*absolute, str(out)]) == 0
    actual = capsys.readouterr().out

    assert section_titles(printed) == section_titles(actual)
    for after, until in (
        ("target", "Promised"),
        ("Promised", "Layers"),
        ("Layers", "Activations"),
        ("Checks", "Measured"),
    ):
        assert first_words(printed, after, until) == first_words(actual, after, until), after
    assert "checks passed" in printed
    # Formats may differ a little between machines: losses are floating point sums.
    assert sizes_kb(printed) == pytest.approx(sizes_kb(actual), rel=0.05)
    report = Report.load(tmp_path / "digits_int.report.json")
    share = re.search(r"integer MACs ([\d.]+)%", printed)
    assert share is not None
    assert report.kernels is not None
    assert float(share[1]) / 100 == pytest.approx(report.kernels.integer_share, abs=0.3)
    error = re.search(r"error +([\d.]+)% of the output's range", printed)
    assert error is not None
    assert report.measured.relative_error is not None
    assert float(error[1]) / 100 == pytest.approx(report.measured.relative_error, rel=0.5)
