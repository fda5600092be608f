"""The main job measured: accuracy, speed, size and time of quantizing, beside the targets set for them.

    python benchmarks/main_job.py [--json OUT] [--quick] [--only int8 mixed time models] [--models resnet8 ...]

Needs the benchmark assets (README.md here says what they are): the folder that LCPAQ_ASSETS names, else
``shared/assets`` in or beside the project. Every ratio is of two things that ran in turns in this one process (medians
over rounds). Prints tables and, last, each target with what was measured: met or missed.
Exit code: 0 all met, 1 some missed, 3 no assets.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import onnxruntime
from assets_tasks import Assets, AssetsMissingError, find_assets
from claims import Claim, claims_as_json, summary
from job_int8 import run_int8
from job_mixed import run_mixed
from job_models import run_models
from job_time import run_time

import lcpaq_onnx

_PARTS = ("int8", "mixed", "time", "models")
_TASK = "resnet20"
_CALIBRATION, _EVALUATION = 256, 5000
_QUICK_EVALUATION = 1000
_MODELS_CALIBRATION = 64


def run(assets: Assets, options: argparse.Namespace, folder: Path) -> tuple[dict[str, object], list[Claim]]:
    """Run the parts asked for, print each part's table as it is ready."""
    task = assets.task(_TASK, _CALIBRATION, _QUICK_EVALUATION if options.quick else _EVALUATION)
    found: dict[str, object] = {}
    claims: list[Claim] = []
    for part in options.only:
        start = time.perf_counter()
        if part == "int8":
            int8 = run_int8(assets, task, folder, quick=options.quick)
            text, claims = int8.text(), claims + int8.claims
            found[part] = {"files": int8.rows, "best_static": int8.best, "checks_failed": int8.checks_failed}
        elif part == "mixed":
            mixed = run_mixed(assets, task, folder, quick=options.quick)
            text, claims = mixed.text(), claims + mixed.claims
            found[part] = {"files": mixed.rows}
        elif part == "time":
            timed = run_time(task, folder, quick=options.quick)
            text, claims = timed.text(), claims + timed.claims
            found[part] = {"seconds": timed.seconds, "profiles": timed.profiles}
        else:
            models = run_models(
                assets,
                folder,
                options.models or assets.classifiers(),
                calibration=_MODELS_CALIBRATION,
                evaluation=100 if options.quick else 300,
                timing_s=1.0 if options.quick else 3.0,
            )
            text, claims = models.text(), claims + models.claims
            found[part] = models.rows
        print(f"== {part} ({time.perf_counter() - start:.0f} s)\n{text}\n", flush=True)
    return found, claims


def environment() -> dict[str, object]:
    return {
        "lcpaq": lcpaq_onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "threads": 1,
    }


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all figures there")
    parser.add_argument("--quick", action="store_true", help="fewer images, settings and rounds; figures are rough")
    parser.add_argument("--only", nargs="+", choices=_PARTS, default=_PARTS, metavar="PART", help=" ".join(_PARTS))
    parser.add_argument("--models", nargs="+", metavar="TASK", help='part "models": only these; default: all')
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    options = parse_arguments(arguments)
    try:
        assets = find_assets()
    except AssetsMissingError as error:
        print(error, file=sys.stderr)
        return 3
    with tempfile.TemporaryDirectory(prefix="lcpaq-bench-") as folder:
        found, claims = run(assets, options, Path(folder))
    text, code = summary(claims)
    print(text)
    if options.json:
        result = {
            "environment": environment(),
            "quick": options.quick,
            "targets": claims_as_json(claims),
            **found,
        }
        options.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
