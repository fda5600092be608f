"""ResNet-20 in int8: our file beside every file that ``quantize_static`` gives."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from assets_tasks import Assets, Task
from claims import Claim, table
from judging import Judge, Judgement, Times, batch_of, kernel_counts, runner, take_turns
from static_files import make_static, settings_to_try

import lcpaq_onnx

__all__ = ["Int8Result", "run_int8"]

OURS, FLOAT = "lcpaq w8a8", "float"
_BATCHES = (1, 8)
# A file that lost more top-1 than this does not count as "best", however fast.
_USABLE_LOSS = 0.01
_FINALISTS = 3


@dataclass(frozen=True)
class Int8Result:
    """``rows``: by file. ``best``: the fastest usable file of quantize_static, by batch size."""

    rows: dict[str, dict[str, object]]
    best: dict[int, str]
    claims: list[Claim]
    checks_failed: list[str] = field(default_factory=list)

    def text(self) -> str:
        header = ("file", "bytes", "top-1", "agree", "KL", "SQNR dB", "batch 1", "batch 8", "operators run")
        return table(header, [self._line(name, row) for name, row in self.rows.items()])

    def _line(self, name: str, row: dict[str, object]) -> tuple[str, ...]:
        ops = row["kernels"]
        assert isinstance(ops, dict)
        return (
            name,
            f"{row['size_bytes']:,}",
            f"{100 * float(str(row['top1'])):.2f} %",
            f"{100 * float(str(row['agreement'])):.2f} %",
            f"{row['kl']:.6f}",
            f"{row['sqnr_db']:.1f}",
            f"{row['time_ratio_batch1']:.3f}",
            f"{row['time_ratio_batch8']:.3f}",
            " ".join(f"{op}:{count}" for op, count in ops.items()),
        )


def run_int8(assets: Assets, task: Task, folder: Path, *, quick: bool) -> Int8Result:
    """``folder``: where the files are written."""
    judge = Judge(assets, task)
    quantized = lcpaq_onnx.quantize(task.model, task.calibration, weights=[8], activations=[8])
    files = {FLOAT: task.model, OURS: folder / "ours_w8a8.onnx"}
    quantized.save(files[OURS])
    for index, setting in enumerate(settings_to_try(quick=quick)):
        files[str(setting)] = folder / f"static_{index}.onnx"
        make_static(task.model, task.calibration, setting, files[str(setting)])
    judged = {name: judge.judge(path) for name, path in files.items()}
    times = {batch: _times(files, task, batch, 3.0 if quick else 15.0) for batch in _BATCHES}
    usable = [n for n in files if n not in (FLOAT, OURS) and judged[n].top1 >= judge.reference_top1 - _USABLE_LOSS]
    best = {}
    for batch in _BATCHES:
        fastest = sorted(usable, key=lambda name: times[batch].ratio(name, FLOAT))[:_FINALISTS]
        finalists = {name: files[name] for name in (FLOAT, OURS, *fastest)}
        final = _times(finalists, task, batch, 3.0 if quick else 10.0)
        times[batch] = Times({**times[batch].seconds, **{f"final {n}": s for n, s in final.seconds.items()}})
        best[batch] = min(fastest, key=lambda name: final.ratio(name, FLOAT))
    kernels = quantized.report.kernels
    claims = _claims(judge, judged[OURS], times, best, files, kernels.integer_share if kernels else 0.0)
    rows = {
        name: {
            "size_bytes": path.stat().st_size,
            **asdict(judged[name]),
            **{f"time_ratio_batch{b}": times[b].ratio(name, FLOAT) for b in _BATCHES},
            **{f"median_us_batch{b}": times[b].median_us(name) for b in _BATCHES},
            "kernels": kernel_counts(path),
        }
        for name, path in files.items()
    }
    return Int8Result(rows, best, claims, [f"{c.name}: {c.detail}" for c in quantized.report.failed_checks])


def _times(files: dict[str, Path], task: Task, batch: int, seconds: float) -> Times:
    feed = batch_of(task.evaluation[:batch])
    return take_turns({name: runner(path, feed) for name, path in files.items()}, seconds)


def _claims(
    judge: Judge,
    ours: Judgement,
    times: dict[int, Times],
    best: dict[int, str],
    files: dict[str, Path],
    integer_share: float,
) -> list[Claim]:
    loss = 100 * (judge.reference_top1 - ours.top1)
    claims = [Claim("w8a8: points of top-1 lost", loss, "<=", 0.3, f"float has {100 * judge.reference_top1:.2f} %")]
    for batch in _BATCHES:
        pair = (f"final {OURS}", f"final {best[batch]}")
        low, high = times[batch].range_of_ratio(*pair)
        detail = f"quantize_static {best[batch]} ({low:.3f} to {high:.3f} by set of sessions)"
        claims.append(Claim(f"w8a8: time at batch {batch}", times[batch].ratio(*pair), "<=", 1.0, detail))
    claims.append(Claim("w8a8: share of MACs in integer kernels", integer_share, ">=", 0.99))
    size, theirs = files[OURS].stat().st_size, files[best[1]].stat().st_size
    detail = f"quantize_static {best[1]}: {theirs:,} bytes"
    claims.append(Claim("w8a8: file size", size / theirs, "<=", 1.0, detail))
    smallest = min((n for n in files if n not in (OURS, FLOAT)), key=lambda name: files[name].stat().st_size)
    size_of_smallest = files[smallest].stat().st_size
    detail = f"its smallest, {smallest}: {size_of_smallest:,} bytes"
    claims.append(Claim("w8a8: file size", size / size_of_smallest, "<=", 1.0, detail))
    return claims
