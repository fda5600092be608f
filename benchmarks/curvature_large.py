"""A larger model: time and peak memory of a whole ``lcpaq quantize``."""

from __future__ import annotations

from pathlib import Path

from assets_tasks import Assets
from claims import Claim, table
from curvature_child import lcpaq, run_child, write_feeds
from curvature_part import Part
from curvature_whole import MIXED

__all__ = ["run_large"]

_TASK, _IMAGES, _QUICK_IMAGES = "effnet_lite0", 64, 8
_LIMIT_S, _LIMIT_GB = 180.0, 2.5


def run_large(assets: Assets, folder: Path, *, quick: bool) -> Part:
    """Once, with an empty store (``quick``: 8 images and 4 of them for sensitivities)."""
    images = _QUICK_IMAGES if quick else _IMAGES
    task = assets.task(_TASK, images, 0)
    data = write_feeds(folder / "large.npz", task.calibration)
    command = lcpaq("quantize", task.model, "--calibration", data, *MIXED, "--quiet", "-o", folder / "large.onnx")
    run = run_child([*command, *(("--sensitivity-samples", "4") if quick else ())], folder / "large-store")
    peak_gb = run.peak_bytes / 1e9
    detail = f"{images} images, {' '.join(MIXED)}, whole process"
    claims = [
        Claim(f"{_TASK}: seconds of lcpaq quantize", run.seconds, "<=", _LIMIT_S, detail),
        Claim(f"{_TASK}: peak memory of lcpaq quantize, GB", peak_gb, "<=", _LIMIT_GB, detail),
    ]
    lines = [(_TASK, str(images), f"{run.seconds:.1f}", f"{peak_gb:.2f}")]
    rows: dict[str, object] = {"images": images, "seconds": run.seconds, "peak_bytes": run.peak_bytes}
    return Part(table(("model", "images", "s", "peak GB"), lines), rows, claims)
