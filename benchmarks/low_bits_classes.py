"""Every other class of models in the assets: 8-bit weights, and what is fastest among the activations' formats."""

from __future__ import annotations

from pathlib import Path

from assets_tasks import Assets
from claims import Claim
from curvature_part import Part
from low_bits_files import Made, Recipe, Workshop, claim, joined, run_recipes

__all__ = ["run_others"]

# Calibration samples; of few labelled ones most must be left to judge.
_TASKS = {
    "resnet8": 256,
    "keywords": 64,
    "visual_wake_words": 32,
    "fastestdet": 32,
    "ocr_orientation": 64,
    "ocr_recognize": 32,
}
_EVERYTHING, _QUICK = 1 << 20, 200
_RELATIVE = 0.01
# An int8 file is worth its trouble if it is smaller and no slower; a tenth is the noise of a busy machine.
_NO_SLOWER = 1.1
_RECIPE = Recipe("w8a8 mixed", weights=(8,))


def run_others(assets: Assets, folder: Path, *, quick: bool) -> Part:
    """The default of ``lcpaq quantize``: the fastest plan that keeps the error low."""
    parts = []
    for name, calibration in _TASKS.items():
        task = assets.task(name, calibration, _QUICK if quick else _EVERYTHING)
        shop = Workshop(assets, task, folder, timing_s=1.0 if quick else 3.0)
        parts.append(run_recipes(shop, [(_RECIPE, _claims)]))
    return joined(parts)


def _claims(made: Made) -> list[Claim]:
    kept, whole = (_share_right(made, value) for value in (made.metric, made.float_metric))
    detail = f"{made.metric_name} {made.metric:.4f}, float {made.float_metric:.4f}"
    return [
        claim(made, "metric lost, relative", (whole - kept) / whole, _RELATIVE, detail),
        claim(made, "time", made.time_ratio, _NO_SLOWER, "float model"),
    ]


def _share_right(made: Made, value: float) -> float:
    """What is right instead of what is wrong: 1 % of an error rate of 3 % would be less than one character."""
    return 1 - value if "error" in made.metric_name else value
