"""ResNet-20 in mixed widths: the planned file beside uniform widths and the same bits dealt out at random."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from assets_tasks import Assets, Task
from claims import Claim, table
from judging import Judge, batch_of, runner, take_turns

import lcpaq_onnx
from lcpaq_onnx.planning.plan import Plan

__all__ = ["WIDTHS", "MixedResult", "run_mixed"]

WIDTHS = (2, 3, 4, 5, 6, 8)
_TIGHTEST = 0.18
_ROOM = 0.02
_MOST_SHUFFLES = 200_000
_OPTIMIZED_OVERHEAD = 1.05


@dataclass(frozen=True)
class MixedResult:
    """``rows``: by file."""

    rows: dict[str, dict[str, object]]
    claims: list[Claim]

    def text(self) -> str:
        header = ("file", "bytes", "x float", "bits", "top-1", "agree", "KL", "layers by width")
        return table(header, [self._line(name, row) for name, row in self.rows.items()])

    @staticmethod
    def _line(name: str, row: dict[str, object]) -> tuple[str, ...]:
        return (
            name,
            f"{row['size_bytes']:,}",
            f"{row['size_ratio']:.4f}",
            f"{row['stored_bits']:.2f}",
            f"{100 * float(str(row['top1'])):.2f} %",
            f"{100 * float(str(row['agreement'])):.2f} %",
            f"{row['kl']:.5f}",
            str(row["widths"]),
        )


class _Workshop:
    """Makes and judges files of one model."""

    def __init__(self, assets: Assets, task: Task, folder: Path) -> None:
        self.task = task
        self._folder = folder
        self._judge = Judge(assets, task)
        self.measurements = lcpaq_onnx.analyze(task.model, task.calibration)
        self.float_bytes = task.model.stat().st_size
        self.files: dict[str, Path] = {}
        self.rows: dict[str, dict[str, object]] = {}
        self.kl: dict[str, float] = {}

    def plan(self, widths: tuple[int, ...], budget: str = "") -> Plan:
        """Uniform plans are what ``objective="size"`` leaves of one width: every layer that may take it does."""
        budgets = [budget] if budget else []
        return lcpaq_onnx.allocate(
            self.task.model,
            self.measurements,
            weights=widths,
            activations=[8],
            budget=budgets,
            objective=None if budget else "size",
        )

    def add(self, name: str, plan: Plan) -> int:
        """Emit, judge, remember; returns the size of the file."""
        path = self._folder / f"mixed_{len(self.files)}.onnx"
        lcpaq_onnx.save(lcpaq_onnx.apply(self.task.model, plan), path)
        judged = self._judge.judge(path)
        size = path.stat().st_size
        self.files[name], self.kl[name] = path, judged.kl
        widths = Counter(layer.format for layer in plan.layers)
        self.rows[name] = {
            "size_bytes": size,
            "size_ratio": size / self.float_bytes,
            "stored_bits": _stored_bits(plan, self._parameters),
            **asdict(judged),
            "widths": " ".join(f"{width}:{widths[width]}" for width in sorted(widths)),
        }
        return size

    @property
    def _parameters(self) -> dict[str, int]:
        """Weights of each layer."""
        import onnx

        graph = onnx.load(self.task.model).graph
        counts = {t.name: int(np.prod(t.dims)) for t in graph.initializer}
        return {node.name: counts[node.input[1]] for node in graph.node if len(node.input) > 1 and node.input[1] in counts}


def run_mixed(assets: Assets, task: Task, folder: Path, *, quick: bool) -> MixedResult:
    """``folder``: where the files are written."""
    shop = _Workshop(assets, task, folder)
    uniform = {bits: shop.plan((bits,)) for bits in WIDTHS}
    sizes = {bits: shop.add(f"uniform w{bits}a8", plan) for bits, plan in uniform.items()}
    claims: list[Claim] = []
    for label, budget_bytes in (("0.18x", int(_TIGHTEST * shop.float_bytes)), ("as w4", sizes[4])):
        name = f"mixed {label}"
        plan = shop.plan(WIDTHS, f"size<={budget_bytes}B")
        size = shop.add(name, plan)
        rivals = [f"uniform w{bits}a8" for bits in WIDTHS if sizes[bits] <= budget_bytes]
        best = min(rivals, key=lambda rival: shop.kl[rival])
        claims.append(Claim(f"{name}: file size x float", size / shop.float_bytes, "<=", _TIGHTEST))
        claims.append(Claim(f"{name}: bytes within the budget", size, "<=", budget_bytes))
        claims.append(Claim(f"{name}: KL", shop.kl[name], "<", shop.kl[best], f"best uniform width, {best}"))
        claims += _random_claims(shop, name, plan, uniform, budget_bytes, 3 if quick else 10)
        claims += _time_claims(shop, name, 2.0 if quick else 8.0)
    return MixedResult(shop.rows, claims)
