"""The command line end to end on a real model: files, output, exit codes, and what is left behind by failures."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import onnx
import pytest

from lcpaq_onnx.artefacts import ArtefactPaths, write_texts
from lcpaq_onnx.cli import arguments
from lcpaq_onnx.cli.main import build_parser, main
from lcpaq_onnx.cli.parser import Parser
from lcpaq_onnx.errors import LcpaqError
from lcpaq_onnx.verification.report import Report

MODELS = Path(__file__).resolve().parents[1] / "models"
MODEL = MODELS / "digits_resnet.onnx"
DATA = MODELS / "digits_calibration.npz"
FEW = ("--samples", "32", "--sensitivity-samples", "8")
HEAVY = {"numpy", "onnx", "onnxruntime", "onnx_graphsurgeon", "ortools", "pydantic", "rich", "scipy", "networkx"}


class Done(NamedTuple):
    code: int
    out: str
    err: str


def call(capsys: pytest.CaptureFixture[str], *words: object) -> Done:
    """Run ``lcpaq`` in this process."""
    capsys.readouterr()
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return Done(code, captured.out, captured.err)


def run(*words: object, limit_bytes: int | None = None) -> Done:
    """Run ``lcpaq`` in a process of its own; files above ``limit_bytes`` fail to be written, as on a full disk."""

    def limit() -> None:
        if limit_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    done = subprocess.run(
        [sys.executable, "-m", "lcpaq_onnx", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limit,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def refused(done: Done, code: int, *texts: str) -> None:
    """One message and one hint on stderr, nothing on stdout, no traceback."""
    assert done.code == code, done.err
    assert done.out == ""
    assert done.err.startswith("lcpaq: error: "), done.err
    assert "Traceback" not in done.err
    for text in texts:
        assert text in done.err


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one run of each step leaves: ``small.*`` by quantize, ``net.analysis.json`` and ``p.plan.json`` by steps."""
    place = tmp_path_factory.mktemp("cli")
    budget = ("--budget", "size<=0.3x", "--weights", "4,8")
    assert main(_words("quantize", MODEL, "--calibration", DATA, *FEW, *budget, "-o", place / "small.onnx")) == 0
    analysis = place / "net.analysis.json"
    assert main(_words("analyze", MODEL, "--calibration", DATA, *FEW, "-o", analysis)) == 0
    assert main(_words("plan", MODEL, "--analysis", analysis, *budget, "-o", place / "p.plan.json")) == 0
    return place


def _words(*words: object) -> list[str]:
    return [str(word) for word in words]


# ---- the main job ---------------------------------------------------------------------------------------------------
def test_quantize_writes_model_plan_and_reports(folder: Path) -> None:
    paths = ArtefactPaths.beside(folder / "small.onnx")
    assert all(path.is_file() for path in paths.all)
    onnx.checker.check_model(str(paths.model), full_check=True)
    report = Report.load(paths.report)
    assert report.passed
    assert (report.source.name, report.emitted.name) == ("digits_resnet.onnx", "small.onnx")
    assert report.emitted.size_bytes == paths.model.stat().st_size <= 0.3 * MODEL.stat().st_size
    assert report.budgets == ("size<=0.3x",)
    assert "digits_resnet.onnx" in paths.report_text.read_text(encoding="utf-8")


def test_json_files_are_strict_json(folder: Path) -> None:
    """No NaN or Infinity, which only Python would read back."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    for path in folder.glob("*.json"):
        json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def test_plan_of_quantize_applied_again_gives_the_same_bytes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = call(
        capsys,
        "apply",
        MODEL,
        folder / "small.plan.json",
        "--calibration",
        DATA,
        "--samples",
        32,
        "-o",
        folder / "again.onnx",
        "--json",
    )
    assert done.code == 0
    document = json.loads(done.out)
    assert document["size_bytes"] == (folder / "small.onnx").stat().st_size
    assert (folder / "again.onnx").read_bytes() == (folder / "small.onnx").read_bytes()


def test_steps_give_what_quantize_gives(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same data, seed and budget: the same decisions. By curvature alone, for `quantize` measures what its own plan
    depends on, and `analyze` what any may.
    """
    measured = ("--calibration", DATA, *FEW, "--estimator", "hessian-diagonal")
    budget = ("--budget", "size<=0.3x", "--weights", "4,8")
    assert call(capsys, "quantize", MODEL, *measured, *budget, "-o", tmp_path / "small.onnx").code == 0
    assert call(capsys, "plan", MODEL, *measured, *budget, "-o", tmp_path / "p.plan.json").code == 0
    whole, stepwise = (json.loads((tmp_path / f"{name}.plan.json").read_text("utf-8")) for name in ("small", "p"))
    assert (whole["layers"], whole["activations"]) == (stepwise["layers"], stepwise["activations"])
    done = call(capsys, "verify", MODEL, folder / "small.onnx", "--calibration", DATA, "--samples", 16, "--json")
    assert done.code == 0, done.err
    assert Report.from_json(done.out).passed


def test_quantize_prints_the_report_and_nothing_but_json_with_json(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("quantize", MODEL, "--calibration", DATA, *FEW, "-o", tmp_path / "o.onnx")
    text = call(capsys, *words)
    assert text.code == 0, text.err
    # The file has wider tables; headline and promises are the same.
    headline, _, _ = (tmp_path / "o.report.txt").read_text(encoding="utf-8").partition("\nLayers: ")
    assert "Promised and measured" in headline
    assert text.out.startswith(headline)
    assert text.err == ""
    document = call(capsys, *words, "--json")
    assert document.code == 0
    assert Report.from_json(document.out) == Report.load(tmp_path / "o.report.json")
    quiet = call(capsys, *words, "--quiet")
    assert quiet == (0, "", "")


def test_the_model_is_not_changed(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "net.onnx"
    copy.write_bytes(MODEL.read_bytes())
    assert (
        call(
            capsys,
            "apply",
            copy,
            folder / "small.plan.json",
            "--calibration",
            DATA,
            "--samples",
            32,
            "-o",
            tmp_path / "out.onnx",
        ).code
        == 0
    )
    assert copy.read_bytes() == MODEL.read_bytes()


def test_random_data_warn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = call(capsys, "analyze", MODEL, "--random-data", 4, "-o", tmp_path / "a.json", "--json")
    assert done.code == 0, done.err
    assert "lcpaq: warning: calibrating on random data" in done.err
    assert json.loads(done.out)["schema"] == 1


def test_verbose_reports_stretches_of_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--calibration", DATA, *FEW, "--budget", "size<=0.3x", "--no-cache", "-v", "-o", tmp_path / "o.onnx")
    done = call(capsys, "quantize", MODEL, *words)
    assert done.code == 0
    assert "lcpaq: calibrating: 32 steps in " in done.err
    assert re.search(r"^lcpaq: probing: \d+ steps? in ", done.err, re.MULTILINE)


# ---- where and how it runs ------------------------------------------------------------------------------------------
def test_an_analysis_is_kept_and_found_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same file again, under any workers, memory and name of the data; other data and settings are another one."""
    data = tmp_path / "again.npz"
    data.write_bytes(DATA.read_bytes())
    words = ("--cache", tmp_path / "cache", *FEW, "-v")

    def analyze(name: str, source: Path, *more: object) -> Done:
        return call(capsys, "analyze", MODEL, "--calibration", source, *words, *more, "-o", tmp_path / name)

    first = analyze("1.json", DATA)
    assert (first.code, "probing" in first.err) == (0, True), first.err
    second = analyze("2.json", data, "--workers", "serial", "--max-memory", "1GB")
    assert second.code == 0
    assert second.err.startswith("lcpaq: analysis from the store: 1 step in ")
    assert len(second.err.splitlines()) == 1
    documents = [json.loads((tmp_path / name).read_text(encoding="utf-8")) for name in ("1.json", "2.json")]
    assert [document.pop("calibration") for document in documents] == [
        "npz digits_calibration.npz (first 32 of 256 samples)",
        "npz again.npz (first 32 of 256 samples)",
    ]
    assert documents[0] == documents[1]
    for more in (("--samples", 31), ("--estimator", "hessian-diagonal"), ("--range", "minmax"), ("--seed", 1)):
        assert "from the store" not in analyze("3.json", DATA, *more).err, more
    listed = json.loads(call(capsys, "cache", "list", "--cache", tmp_path / "cache", "--json").out)
    assert [(e["model"], e["entries"]) for e in listed["entries"] if e["what"] == "analysis"] == [(MODEL.name, 5)]


def test_plan_and_pareto_take_the_analysis_from_the_cache(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``folder`` analysed the same: the model is not run, and the answers are those from the analysis' file."""
    kept, saved = ("--calibration", DATA, *FEW), ("--analysis", folder / "net.analysis.json")
    budget = ("--budget", "size<=0.25x")
    done = call(capsys, "plan", MODEL, *kept, *budget, "-v", "-o", tmp_path / "1.json")
    assert done.code == 0, done.err
    assert done.err.startswith("lcpaq: analysis from the store")
    assert "calibrating" not in done.err
    assert call(capsys, "plan", MODEL, *saved, *budget, "-o", tmp_path / "2.json").code == 0
    assert (tmp_path / "1.json").read_bytes() == (tmp_path / "2.json").read_bytes()
    done = call(capsys, "pareto", MODEL, *kept, "--points", 3, "-v", "--json")
    assert done.err.startswith("lcpaq: analysis from the store")
    assert done.out == call(capsys, "pareto", MODEL, *saved, "--points", 3, "--json").out


def test_plan_makes_the_analysis_where_there_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("plan", MODEL, "--calibration", DATA, *FEW, "--budget", "size<=0.3x", "-v", "-o", tmp_path / "p.json")
    first = call(capsys, *words, "--cache", tmp_path / "cache")
    assert (first.code, "probing" in first.err) == (0, True), first.err
    assert "from the store" in call(capsys, *words, "--cache", tmp_path / "cache").err
    assert "probing" in call(capsys, *words, "--no-cache").err


def test_workers_do_not_change_the_model(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--budget", "size<=0.3x", "--weights", "4,8", "--no-cache", "--workers", "processes:2")
    done = call(capsys, "quantize", MODEL, "--calibration", DATA, *FEW, *words, "-o", tmp_path / "o.onnx")
    assert done.code == 0
    assert (tmp_path / "o.onnx").read_bytes() == (folder / "small.onnx").read_bytes()


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        (("--workers", "thread"), ("workers 'thread' are not known", "use threads, threads:N")),
        (("--workers", "processes:0"), ("workers 'processes:0' are not known",)),
        (("--workers", "dask:nowhere://x"), ("no dask scheduler at 'nowhere://x'", "dask scheduler")),
        (("--provider", "NoSuchProvider"), ("no NoSuchProvider", "CPUExecutionProvider")),
        (("--max-memory", "lots"), ("--max-memory", "'lots' is not an amount of memory", "2GB")),
        (("--max-memory", "0"), ("--max-memory", "'0' is not an amount of memory")),
        (("--cache", "x", "--no-cache"), ("--no-cache", "not allowed with argument --cache")),
    ],
)
def test_what_cannot_run_is_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: Sequence[str], texts: Sequence[str]
) -> None:
    chosen = ("--calibration", DATA, *FEW, "--budget", "size<=0.3x", *words)
    refused(call(capsys, "quantize", MODEL, *chosen, "-o", tmp_path / "o.onnx"), 2, *texts)
    refused(call(capsys, "analyze", MODEL, *chosen[:6], *words, "-o", tmp_path / "a.json"), 2, *texts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_dask_scheduler_that_does_not_answer_is_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The client tries for ten seconds."""
    words = ("--calibration", DATA, *FEW, "--workers", "dask:tcp://127.0.0.1:9", "-o", tmp_path / "a.json")
    refused(call(capsys, "analyze", MODEL, *words), 2, "no dask scheduler at 'tcp://127.0.0.1:9'")


def test_a_cache_that_cannot_be_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("not a folder")
    words = ("analyze", MODEL, "--calibration", DATA, *FEW, "--cache", tmp_path / "file", "-o", tmp_path / "a.json")
    done = call(capsys, *words)
    assert done.code == 0
    (line,) = done.err.splitlines()
    assert line.startswith("lcpaq: warning: no store can be at ")
    assert "what is measured is not kept" in line
    assert (tmp_path / "a.json").is_file()


def test_without_a_home_there_is_no_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LCPAQ_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "nowhere")
    done = call(capsys, "analyze", MODEL, "--calibration", DATA, *FEW, "-o", tmp_path / "a.json")
    assert done.code == 0
    assert "lcpaq: warning: you have no home directory" in done.err
    assert "LCPAQ_CACHE" in done.err


def test_options_of_an_analysis_do_not_go_with_a_finished_one(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("plan", MODEL, "--analysis", folder / "net.analysis.json", "-o", tmp_path / "p.json")
    done = call(capsys, *words, "--samples", 8, "--estimator", "rounding-error")
    refused(done, 2, "--samples, --estimator with --analysis", "--calibration")
    refused(call(capsys, *words, "--calibration", DATA), 2, "not allowed with argument --analysis")


def test_a_typo_in_the_target_does_not_wait_for_the_analysis(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--calibration", DATA, "--no-cache", "--target", "generic-int9", "-v")
    for command in (("plan", MODEL, *words, "-o", tmp_path / "p.json"), ("pareto", MODEL, *words)):
        refused(call(capsys, *command), 3, "unknown target 'generic-int9'")


# ---- looking at things ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("small.onnx", "lcpaq:     target onnxruntime-cpu-x86_64-vnni"),
        ("small.plan.json", "optimal, gap"),
        ("small.report.json", "digits_resnet.onnx"),
        ("net.analysis.json", "Hessian trace"),
        ("net.analysis.json", "random plans, rank correlation"),
    ],
)
def test_inspect(folder: Path, capsys: pytest.CaptureFixture[str], name: str, shown: str) -> None:
    text = call(capsys, "inspect", folder / name)
    assert text.code == 0
    assert shown in text.out
    assert json.loads(call(capsys, "inspect", folder / name, "--json").out)


def test_inspect_names_stored_bits(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = json.loads((folder / "small.plan.json").read_text(encoding="utf-8"))
    summary = json.loads(call(capsys, "inspect", folder / "small.onnx", "--json").out)
    planned = {layer["name"]: layer["format"] for layer in plan["layers"]}
    stored = {layer["name"]: layer["stored_bits"] for layer in summary["layers"]}
    assert stored.keys() == planned.keys()
    for name, bits in stored.items():
        assert planned[name] == "f32" if bits == 32 else planned[name].startswith(f"w{bits}")


def test_inspect_float_model(capsys: pytest.CaptureFixture[str]) -> None:
    summary = json.loads(call(capsys, "inspect", MODEL, "--json").out)
    assert summary["inputs"] == ["image float32 [batch, 1, 8, 8]"]
    assert summary["operators"]["Conv"] == 10
    assert {layer["stored_bits"] for layer in summary["layers"]} == {32}


def test_pareto(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("pareto", MODEL, "--analysis", folder / "net.analysis.json", "--points", 4)
    done = call(capsys, *words, "--json", "-o", tmp_path / "f.json")
    assert done.code == 0, done.err
    points = json.loads(done.out)
    assert points == json.loads((tmp_path / "f.json").read_text(encoding="utf-8"))
    assert 2 <= len(points) <= 4
    sizes, losses = [p["size_bytes"] for p in points], [p["loss"] for p in points]
    assert sizes == sorted(sizes)
    assert losses == sorted(losses, reverse=True)
    assert f"{sizes[0]:,}" in call(capsys, *words).out


def test_targets(capsys: pytest.CaptureFixture[str]) -> None:
    listed = json.loads(call(capsys, "targets", "list", "--json").out)
    names = [entry["name"] for entry in listed]
    assert arguments.DEFAULT_TARGET in names
    for name in names:
        assert name in call(capsys, "targets", "list").out
        assert call(capsys, "targets", "show", name).code == 0
        assert json.loads(call(capsys, "targets", "show", name, "--json").out)["name"] == name


def test_targets_validate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "board.toml"
    own = 'schema = 1\nname = "board"\ndescription = "x"\ninherits = "generic-int8"\nsources = ["y"]\n'
    path.write_text(own, encoding="utf-8")
    assert call(capsys, "targets", "validate", path).out.startswith(f"{path}: valid target 'board'")
    path.write_text(own + "[runtime]\nopset_maxx = 13\n", encoding="utf-8")
    refused(call(capsys, "targets", "validate", path), 3, "runtime.opset_maxx", "'opset_max'")


def test_passes_list_and_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = json.loads(call(capsys, "passes", "list", "--json").out)
    kinds = {entry["name"]: entry["kind"] for entry in listed}
    assert kinds["fold-batch-norm"] == "pass"
    assert kinds["activation-ranges"] == "analysis"
    assert "broken" not in kinds.values()
    words = ("passes", "run", MODEL, "--pipeline", "fold-constants,fold-batch-norm", "-o", tmp_path / "f.onnx")
    done = call(
        capsys, *words, "--calibration", DATA, "--verify-each", "--time-passes", "--print-after", "fold-batch-norm"
    )
    assert done.code == 0, done.err
    assert "// ---- after fold-batch-norm" in done.err
    assert "100.0%  total" in done.err
    written = onnx.load(str(tmp_path / "f.onnx"))
    assert not any(node.op_type == "BatchNormalization" for node in written.graph.node)
    stopped = call(capsys, *words, "--stop-after", "fold-constants", "--json")
    assert [step["step"] for step in json.loads(stopped.out)] == ["fold-constants"]


def test_passes_run_says_what_was_left_alone_with_v(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One BatchNormalization of the model reads its bias through an Identity, which nothing folded yet."""
    words = ("passes", "run", MODEL, "--pipeline", "fold-batch-norm", "-o", tmp_path / "f.onnx")
    notes = json.loads(call(capsys, *words, "--json").out)[0]["notes"]
    assert len(notes) == 1
    assert f"lcpaq: fold-batch-norm: {notes[0]}\n" in call(capsys, *words, "-v").err


def test_third_party_pass_is_found_by_its_entry_point(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The example package, installed as an installer would leave it: its module and its metadata on the path."""
    example = MODELS.parent / "examples" / "third_party_pass"
    information = tmp_path / "lcpaq_remove_dropout-0.1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: lcpaq-remove-dropout\nVersion: 0.1.0\n")
    (information / "entry_points.txt").write_text(
        "[lcpaq_onnx.passes]\nremove-dropout = lcpaq_remove_dropout:RemoveDropout\n"
    )
    monkeypatch.syspath_prepend(str(example))
    monkeypatch.syspath_prepend(str(tmp_path))
    listed = {entry["name"]: entry for entry in json.loads(call(capsys, "passes", "list", "--json").out)}
    assert listed["remove-dropout"]["provider"] == "lcpaq-remove-dropout"
    model = tmp_path / "net.onnx"
    text = "<ir_version: 8, opset_import: ['' : 13]> g (float[2] x) => (float[2] y) {u = Dropout (x) y = Relu (u)}"
    onnx.save(onnx.parser.parse_model(text.replace("'", '"')), str(model))
    done = call(
        capsys, "passes", "run", model, "--pipeline", "remove-dropout", "--verify-each", "--random-data", 2,
        "-o", tmp_path / "out.onnx",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert [node.op_type for node in onnx.load(str(tmp_path / "out.onnx")).graph.node] == ["Relu"]


# ---- help and usage -------------------------------------------------------------------------------------------------
def all_parsers() -> list[Parser]:
    pending = [build_parser()]
    for parser in pending:
        pending.extend(parser.children.values())
    return pending


def test_help_imports_nothing_heavy() -> None:
    code = "import sys\nfrom lcpaq_onnx.cli.main import main\nmain(['--help'])\nprint(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "usage: lcpaq" in done.stdout
    assert not HEAVY & set(done.stderr.split())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "--version") == (0, "lcpaq 0.1.0\n", "")


@pytest.mark.parametrize("parser", all_parsers(), ids=lambda parser: parser.prog)
def test_every_help_has_an_example(parser: Parser) -> None:
    text = parser.format_help()
    assert re.search(rf"^  {parser.prog}\b", text, re.MULTILINE), "no example"
    if not parser.children:
        assert all(option in text for option in ("--json", "--quiet", "--verbose"))


def test_choices_are_those_of_the_library() -> None:
    from lcpaq_onnx import compiler
    from lcpaq_onnx.allocation.allocate import Objective
    from lcpaq_onnx.numeric.losses import LossName
    from lcpaq_onnx.numeric.ranges import RangeMethod
    from lcpaq_onnx.planning.bench import Estimator, Migration, Settings
    from lcpaq_onnx.runtime.workers import DEFAULT_WORKERS

    assert set(arguments.ESTIMATORS) == set(get_args(Estimator))
    assert Settings().estimator == "auto"
    assert arguments.DEFAULT_WORKERS == DEFAULT_WORKERS
    assert set(arguments.OBJECTIVES) == set(get_args(Objective))
    assert set(arguments.RANGE_METHODS) == set(get_args(RangeMethod))
    assert set(arguments.LOSSES) == set(get_args(LossName))
    assert set(arguments.MIGRATIONS) == set(get_args(Migration))
    assert arguments.DEFAULT_TARGET == compiler.DEFAULT_TARGET


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        ((), ("COMMAND",)),
        (("quantise",), ("did you mean 'quantize'?",)),
        (("quantize", "m", "--calibation", "d", "-o", "o"), ("'--calibation'", "did you mean '--calibration'?")),
        (("quantize", "m", "-o", "o"), ("--calibration --random-data",)),
        (("quantize", "m", "--calib", "d", "-o", "o"), ("unknown option '--calib'",)),
        (("quantize", "m", "--calibration", "d", "--objective", "sizes", "-o", "o"), ("did you mean 'size'?",)),
        (("quantize", "m", "--calibration", "d", "--samples", "0", "-o", "o"), ("--samples", "1 or more")),
        (("quantize", "m", "--calibration", "d", "--weights", "4;8", "-o", "o"), ("write e.g. 4,8",)),
        (("quantize", "m", "--calibration", "d", "--budget", "sise<=1MB", "-o", "o"), ("'sise'", "did you mean size")),
        (("quantize", "m", "--calibration", "d", "--budget", "size<=1parsec", "-o", "o"), ("unknown unit 'parsec'",)),
        (("targets", "lst"), ("did you mean 'list'?",)),
        (("inspect", "a", "b"), ("unrecognized arguments: b",)),
    ],
)
def test_wrong_usage_is_2(capsys: pytest.CaptureFixture[str], words: Sequence[str], texts: Sequence[str]) -> None:
    refused(call(capsys, *words), 2, *texts)


def test_an_unknown_step_is_named_with_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("passes", "run", MODEL, "--pipeline", "fold-batchnorm", "-o", tmp_path / "o.onnx")
    refused(call(capsys, *words), 3, "did you mean 'fold-batch-norm'?")


# ---- budgets and checks: exit code 1 --------------------------------------------------------------------------------
def test_unreachable_budget_names_the_least_that_works(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("plan", MODEL, "--analysis", folder / "net.analysis.json", "-o", tmp_path / "p.json")
    done = call(capsys, *words, "--budget", "size<=0.01x")
    refused(done, 1, "size<=0.01x")
    frontier = call(capsys, "pareto", MODEL, "--analysis", folder / "net.analysis.json", "--points", 2, "--json")
    least = json.loads(frontier.out)[0]["size_bytes"] / MODEL.stat().st_size
    stated = [
        float(word.rstrip("x"))
        for word in done.err.replace("size<=", " ").split()
        if word.rstrip("x,.;").replace(".", "").isdigit() and "x" in word
    ]
    assert any(abs(value - least) < 0.01 for value in stated), (done.err, least)
    assert not (tmp_path / "p.json").exists()


def test_failed_check_is_1_and_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that is not the plan's: the report is printed and written all the same."""
    model = onnx.load(str(folder / "small.onnx"))
    model.doc_string = "someone was here"
    onnx.save(model, str(tmp_path / "touched.onnx"))
    words = ("verify", MODEL, tmp_path / "touched.onnx", "--plan", folder / "small.plan.json", "--calibration", DATA)
    done = call(capsys, *words, "--samples", 8, "-o", tmp_path / "r.json", "--json")
    assert done.code == 1
    assert "check 'size' failed" in done.err
    report = Report.from_json(done.out)
    assert "size" in [check.name for check in report.failed_checks]
    assert Report.load(tmp_path / "r.json") == report


# ---- bad model, data, target, files: exit code 3 --------------------------------------------------------------------
def quantize_words(folder: Path, model: Path = MODEL, data: Path = DATA) -> list[str]:
    return _words("quantize", model, "--calibration", data, *FEW, "-o", folder / "out.onnx")


def test_missing_and_truncated_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(call(capsys, *quantize_words(tmp_path, tmp_path / "none.onnx")), 3, "none.onnx", "No such file")
    short = tmp_path / "short.onnx"
    short.write_bytes(MODEL.read_bytes()[:5000])
    refused(call(capsys, *quantize_words(tmp_path, short)), 3, "short.onnx", "cut short")
    refused(call(capsys, "inspect", short), 3, "short.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["short.onnx"]


def test_bad_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data.npz"
    refused(call(capsys, *quantize_words(tmp_path, data=data)), 3, "data.npz", "does not exist")
    np.savez(data)
    refused(call(capsys, *quantize_words(tmp_path, data=data)), 3, "data.npz")
    np.savez(data, image=np.zeros((0, 1, 8, 8), np.float32))
    refused(call(capsys, *quantize_words(tmp_path, data=data)), 3, "no samples")
    images = np.zeros((4, 1, 8, 8), np.float32)
    images[2, 0, 3, 3] = np.nan
    np.savez(data, image=images)
    refused(call(capsys, *quantize_words(tmp_path, data=data)), 3, "sample 2", "NaN")
    assert [path.name for path in tmp_path.iterdir()] == ["data.npz"]


def test_unknown_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*quantize_words(tmp_path), "--target", "generic-int9"]
    refused(call(capsys, *words), 3, "unknown target 'generic-int9'", "'generic-int8'")


def test_plan_of_another_model(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = MODELS / "digits_mobile.onnx"
    done = call(capsys, "apply", other, folder / "small.plan.json", "-o", tmp_path / "o.onnx")
    refused(done, 2, "plan was made for another model")
    done = call(capsys, "plan", other, "--analysis", folder / "net.analysis.json", "-o", tmp_path / "p.json")
    refused(done, 2, "analysis was made for another model")


def test_output_that_is_an_input_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "net.onnx"
    model.write_bytes(MODEL.read_bytes())
    link = tmp_path / "link.onnx"
    link.symlink_to(model)
    for output in (model, link, tmp_path / "x" / ".." / "net.onnx"):
        (tmp_path / "x").mkdir(exist_ok=True)
        refused(call(capsys, "quantize", model, "--calibration", DATA, "-o", output), 2, "is the input")
    assert model.read_bytes() == MODEL.read_bytes()


def test_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(call(capsys, "quantize", MODEL, "--calibration", DATA, "-o", tmp_path / "no" / "o.onnx"), 3, "no folder")
    (tmp_path / "o.onnx").mkdir()
    refused(call(capsys, "quantize", MODEL, "--calibration", DATA, "-o", tmp_path / "o.onnx"), 3, "it is a folder")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    if os.access(locked, os.W_OK):  # root may write anywhere but here
        locked = Path("/proc")
    refused(call(capsys, "quantize", MODEL, "--calibration", DATA, "-o", locked / "o.onnx"), 3, f"in folder {locked}")


def test_full_disk_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    old = tmp_path / "out.onnx"
    old.write_bytes(b"old")
    done = run(
        "apply",
        MODEL,
        folder / "small.plan.json",
        "--calibration",
        DATA,
        "--samples",
        32,
        "-o",
        old,
        limit_bytes=20_000,
    )
    refused(done, 3, "out.onnx cannot be written")
    assert [path.name for path in tmp_path.iterdir()] == ["out.onnx"]
    assert old.read_bytes() == b"old"


def test_artefacts_are_written_all_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.json").write_text("old a")
    (tmp_path / "b.json").mkdir()
    with pytest.raises(LcpaqError, match=r"cannot write .*b\.json"):
        write_texts({tmp_path / "a.json": "new a", tmp_path / "b.json": "new b"})
    assert (tmp_path / "a.json").read_text() == "old a"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]


# ---- interruption and bugs ------------------------------------------------------------------------------------------
def test_interrupted_write_leaves_no_partial_file(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    # The moment when the bytes are in the temporary file and not yet on the disk.
    monkeypatch.setattr(os, "fsync", interrupt)
    done = call(
        capsys,
        "apply",
        MODEL,
        folder / "small.plan.json",
        "--calibration",
        DATA,
        "--samples",
        32,
        "-o",
        tmp_path / "o.onnx",
    )
    refused(done, 130, "interrupted")
    assert list(tmp_path.iterdir()) == []


def test_traceback_only_with_vv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Traceback" not in call(capsys, "inspect", tmp_path / "none.onnx", "-v").err
    assert "Traceback" in call(capsys, "inspect", tmp_path / "none.onnx", "-vv").err


def test_a_bug_is_neither_0_to_3(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> tuple[str, ...]:
        raise AssertionError("unforeseen")

    monkeypatch.setattr("lcpaq_onnx.targets.loader.available", broken)
    done = call(capsys, "targets", "list")
    assert done.code == 70
    assert "internal error: AssertionError: unforeseen" in done.err


def test_closed_pipe_is_silent() -> None:
    command = f"{sys.executable} -m lcpaq_onnx targets show onnxruntime-cpu-x86_64-vnni --json | head -c 1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("{", "")


def test_real_process_returns_the_exit_codes() -> None:
    assert run("targets", "list").code == 0
    assert run("targets").code == 2
    assert run("targets", "show", "nothing").code == 3
