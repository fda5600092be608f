"""Whole processes in turns: ``lcpaq quantize`` with six weight widths beside ``quantize_static`` INT8."""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median

from assets_tasks import Assets
from claims import Claim, table
from curvature_child import lcpaq, run_child, write_feeds
from curvature_part import Part

__all__ = ["MIXED", "run_whole"]

MIXED = ("--weights", "2,3,4,5,6,8", "--activations", "8", "--budget", "size<=0.18x")
"""What makes ``quantize`` analyse six weight widths."""

_TASK, _IMAGES, _LIMIT = "resnet20", 256, 4.0
# What its users write: one image at a time, ranges by minimum and maximum (the default).
_STATIC = """
import sys
import numpy as np
import onnxruntime.quantization as q

class Reader(q.CalibrationDataReader):
    def __init__(self):
        arrays = dict(np.load(sys.argv[2]))
        count = len(next(iter(arrays.values())))
        self.feeds = iter([{name: x[i : i + 1] for name, x in arrays.items()} for i in range(count)])

    def get_next(self):
        return next(self.feeds, None)

q.quantize_static(sys.argv[1], sys.argv[3], Reader(), quant_format=q.QuantFormat.QDQ, per_channel=True)
"""


def run_whole(assets: Assets, folder: Path, *, quick: bool) -> Part:
    """Five rounds (``quick``: two); each of ours starts with an empty store."""
    task = assets.task(_TASK, _IMAGES, 0)
    data = write_feeds(folder / "whole.npz", task.calibration)
    static = [sys.executable, "-c", _STATIC, str(task.model), str(data), str(folder / "static.onnx")]
    ours = lcpaq("quantize", task.model, "--calibration", data, *MIXED, "--quiet", "-o", folder / "ours.onnx")
    seconds: dict[str, list[float]] = {"quantize_static INT8": [], "lcpaq quantize, six widths": []}
    for round_number in range(2 if quick else 5):
        for name, command in zip(seconds, (static, ours), strict=True):
            cache = folder / f"whole-{round_number}"
            seconds[name].append(run_child(command, cache).seconds)
    theirs_s, ours_s = seconds.values()
    ratio = median(a / b for a, b in zip(ours_s, theirs_s, strict=True))
    lines = [(name, f"{median(s):.2f}", " ".join(f"{x:.2f}" for x in s)) for name, s in seconds.items()]
    detail = f"quantize_static INT8, whole processes, {_IMAGES} images, median of {len(ours_s)} rounds"
    claim = Claim(f"{_TASK}: time of lcpaq quantize, six widths", ratio, "<=", _LIMIT, detail)
    return Part(table(("what", "median s", "all"), lines), {**seconds}, [claim])
