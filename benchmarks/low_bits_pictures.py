"""Image classifiers at 8 bits and below."""

from __future__ import annotations

from pathlib import Path

from assets_tasks import Assets
from claims import Claim
from curvature_part import Part
from low_bits_files import WIDTHS, Made, Recipe, Workshop, claim, joined, run_recipes

__all__ = ["run_photographs", "run_resnet20"]

_KL_LIMITS = {2.5: 0.13, 3: 0.055, 4: 0.0125, 5: 0.0028}
_CALIBRATION = 1024
_PHOTOGRAPHS = 128
_EVERYTHING = 1 << 20
# Of quantizing to 8 bits alone; paired medians of the same kernels differ by as much.
_SAME_SPEED = 1.05

_INT8 = Recipe("w8a8", weights=(8,), activations=(8,))
_FOUR = Recipe("4 bits a8", budget=("bits<=4",), weights=WIDTHS, activations=(8,))


def run_resnet20(assets: Assets, folder: Path, *, quick: bool) -> Part:
    """Weights only, by mean width; then 4 bits with activations of 8, beside uniform int8."""
    task = assets.task("resnet20", _CALIBRATION, 1000 if quick else _EVERYTHING)
    shop = Workshop(assets, task, folder, timing_s=1.0 if quick else 6.0)
    weights_only = [
        (
            Recipe(f"{bits:g} bits", (f"bits<={bits:g}",), WIDTHS, (32,), objective="error"),
            lambda made, limit=limit: [claim(made, "KL", made.divergence, limit)],
        )
        for bits, limit in _KL_LIMITS.items()
    ]
    files: dict[str, Path] = {}

    def of_int8(made: Made) -> list[Claim]:
        files["int8"] = made.path
        return []

    def of_four(made: Made) -> list[Claim]:
        return [
            claim(made, "points of top-1 lost", made.points_lost, 0.5),
            claim(made, "size", made.size_ratio, 0.18, "float file"),
            claim(made, "time", shop.time_ratio(made.path, files["int8"]), _SAME_SPEED, "our uniform w8a8 file"),
        ]

    return run_recipes(shop, [*weights_only, (_INT8, of_int8), (_FOUR, of_four)])


def run_photographs(assets: Assets, folder: Path, *, quick: bool) -> Part:
    """A thousand classes and ten; the first photographs calibrate and the others judge."""

    def effnet_int8(made: Made) -> list[Claim]:
        agreement = Claim(f"{made.task} {made.recipe}: agreement", made.agreement, ">=", 0.96)
        return [claim(made, "points of top-1 lost", made.points_lost, 0.5), agreement]

    def effnet_four(made: Made) -> list[Claim]:
        agreement = Claim(f"{made.task} {made.recipe}: agreement", made.agreement, ">=", 0.90)
        return [
            agreement,
            claim(made, "KL", made.divergence, 0.12),
            claim(made, "size", made.size_ratio, 0.16, "float file"),
        ]

    def int8(made: Made) -> list[Claim]:
        return [claim(made, "points of top-1 lost", made.points_lost, 0.5)]

    def four(made: Made) -> list[Claim]:
        return [claim(made, "points of top-1 lost", made.points_lost, 1.5)]

    claims_of = {
        "effnet_lite0": (effnet_int8, effnet_four),
        "mobilenetv2_160_coarse10": (int8, four),
        "resnet50thin_coarse10": (int8, four),
    }
    parts = []
    for name, (of_int8, of_four) in claims_of.items():
        task = assets.task(name, 32 if quick else _PHOTOGRAPHS, 100 if quick else _EVERYTHING)
        shop = Workshop(assets, task, folder, timing_s=1.0 if quick else 3.0)
        parts.append(run_recipes(shop, [(_INT8, of_int8), (_FOUR, of_four)]))
    return joined(parts)
