"""Low bits measured: accuracy, size and speed of files of 8 bits and below, beside the targets set for them.

    python benchmarks/low_bits.py [--json OUT] [--quick] [PART ...]

Needs the benchmark assets, as ``main_job.py`` does; part ``rounding_time`` needs none. Prints tables and, last, each
target with what was measured: met or missed.
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

from assets_tasks import AssetsMissingError, find_assets
from claims import Claim, claims_as_json, summary
from curvature_child import ChildError
from curvature_part import Part
from low_bits_classes import run_others
from low_bits_language import run_minilm, run_stories
from low_bits_pictures import run_photographs, run_resnet20
from low_bits_time import run_rounding_time
from main_job import environment

from lcpaq_onnx import LcpaqError

_Run = Callable[[Path, bool], Part]
_PARTS: dict[str, _Run] = {
    "resnet20": lambda folder, quick: run_resnet20(find_assets(), folder, quick=quick),
    "photographs": lambda folder, quick: run_photographs(find_assets(), folder, quick=quick),
    "minilm": lambda folder, quick: run_minilm(find_assets(), folder, quick=quick),
    "stories": lambda folder, quick: run_stories(find_assets(), folder, quick=quick),
    "others": lambda folder, quick: run_others(find_assets(), folder, quick=quick),
    "rounding_time": lambda folder, quick: run_rounding_time(folder, quick=quick),
}


def main(arguments: Sequence[str]) -> int:
    options = _options(arguments)
    found: dict[str, object] = {}
    claims: list[Claim] = []
    with tempfile.TemporaryDirectory(prefix="lcpaq-bench-") as folder:
        for name in options.parts or _PARTS:
            start = time.perf_counter()
            try:
                part = _PARTS[name](Path(folder), options.quick)
            except AssetsMissingError as error:
                print(error, file=sys.stderr)
                return 3
            except (ChildError, LcpaqError) as error:
                # What is refused is a target missed, and no reason to lose the other parts.
                part = Part(str(error), {"failed": str(error)}, [Claim(f"{name}: ran to its end", 0, ">=", 1)])
            print(f"== {name} ({time.perf_counter() - start:.0f} s)\n{part.text}\n", flush=True)
            found[name], claims = part.rows, claims + part.claims
            if options.json:
                result = {
                    "environment": environment(),
                    "quick": options.quick,
                    "targets": claims_as_json(claims),
                    **found,
                }
                options.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    text, code = summary(claims)
    print(text)
    return code


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all figures there, anew after every part")
    parser.add_argument("--quick", action="store_true", help="fewer samples and rounds; figures are rough")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"only these of {', '.join(_PARTS)}")
    options = parser.parse_args(arguments)
    unknown = set(options.parts) - set(_PARTS)
    if unknown:
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(_PARTS)}")
    return options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
