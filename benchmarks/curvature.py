"""The curvature engine measured: speed, exactness, ranking, memory and restarts beside the targets set for them.

    python benchmarks/curvature.py [--json OUT] [--quick] [--only PART ...] [--truth-images N]

Needs the benchmark assets, as ``main_job.py`` does. Times are of things that ran in turns (medians over rounds).
Prints tables and, last, each target with what was measured: met or missed.
Exit code: 0 all met, 1 some missed, 3 no assets.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from assets_tasks import Assets, AssetsMissingError, find_assets
from claims import Claim, claims_as_json, summary
from curvature_child import ChildError
from curvature_exact import run_exact
from curvature_large import run_large
from curvature_naive import run_naive
from curvature_part import Part
from curvature_plans import run_plans
from curvature_ranking import run_ranking
from curvature_replan import run_replan
from curvature_restart import run_restart
from curvature_whole import run_whole
from main_job import environment

_TRUTH_IMAGES, _QUICK_TRUTH_IMAGES = 5000, 500


def parts(assets: Assets, folder: Path, options: argparse.Namespace) -> dict[str, Callable[[], Part]]:
    """By name, in the order in which they run."""
    quick, store = options.quick, folder / "probes"
    truth_images = options.truth_images or (_QUICK_TRUTH_IMAGES if quick else _TRUTH_IMAGES)
    return {
        "naive": lambda: run_naive(assets, quick=quick),
        "exact": lambda: run_exact(quick=quick),
        "ranking": lambda: run_ranking(assets, store, truth_images=truth_images, quick=quick),
        "plans": lambda: run_plans(assets, store, quick=quick),
        "whole": lambda: run_whole(assets, folder, quick=quick),
        "large": lambda: run_large(assets, folder, quick=quick),
        "replan": lambda: run_replan(assets, folder, quick=quick),
        "restart": lambda: run_restart(assets, folder, quick=quick),
    }


_PARTS = ("naive", "exact", "ranking", "plans", "whole", "large", "replan", "restart")


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all figures there")
    parser.add_argument("--quick", action="store_true", help="fewer samples and rounds; figures are rough")
    parser.add_argument("--only", nargs="+", choices=_PARTS, default=_PARTS, metavar="PART", help=" ".join(_PARTS))
    parser.add_argument(
        "--truth-images", type=int, metavar="N", help='part "ranking": other images (default: 5000; quick: 500)'
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    options = parse_arguments(arguments)
    try:
        assets = find_assets()
    except AssetsMissingError as error:
        print(error, file=sys.stderr)
        return 3
    found: dict[str, object] = {}
    claims: list[Claim] = []
    with tempfile.TemporaryDirectory(prefix="lcpaq-bench-") as folder:
        run = parts(assets, Path(folder), options)
        for name in options.only:
            start = time.perf_counter()
            try:
                part = run[name]()
            except ChildError as error:
                # What a command of ours refuses is a target missed, and no reason to lose the other parts.
                part = Part(str(error), {"failed": str(error)}, [Claim(f"{name}: ran to its end", 0, ">=", 1)])
            print(f"== {name} ({time.perf_counter() - start:.0f} s)\n{part.text}\n", flush=True)
            found[name], claims = part.rows, claims + part.claims
            if options.json:
                _write(options.json, options.quick, claims, found)
    text, code = summary(claims)
    print(text)
    return code


def _write(path: Path, quick: bool, claims: list[Claim], found: dict[str, object]) -> None:
    """After every part, since all of them take long."""
    threads = "ONNX Runtime's default; the engine's probes: one thread each, a worker for each core"
    result = {
        "environment": environment() | {"threads": threads},
        "quick": quick,
        "targets": claims_as_json(claims),
        **found,
    }
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
