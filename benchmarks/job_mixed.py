"""ResNet-20 in mixed widths: the planned file beside uniform widths and the same bits dealt out at random."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from assets_tasks import Assets, Task
from claims import Claim, table
from judging import Judge, batch_of, runner, take_turns

import lcpaq_onnx
from lcpaq_onnx.graph.graph_io import to_proto
from lcpaq_onnx.planning.plan import LayerPlan, Plan

__all__ = ["WIDTHS", "MixedResult", "run_mixed"]

WIDTHS = (2, 3, 4, 5, 6, 8)
_TIGHTEST = 0.18
_ROOM = 0.02
_MOST_SHUFFLES = 200_000
_MOST_RETRIES = 5
_SLOWER = 1.05
_BATCHES = (1, 8)


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
        graph = to_proto(lcpaq_onnx.prepare(lcpaq_onnx.load(task.model))).graph
        self.parameters = {tensor.name: math.prod(tensor.dims) for tensor in graph.initializer}
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
            "stored_bits": _stored_bits(plan, self.parameters),
            **asdict(judged),
            "widths": " ".join(f"{width}:{widths[width]}" for width in sorted(widths)),
        }
        return size

    def drop(self, name: str) -> None:
        """Forget a file."""
        del self.files[name], self.rows[name], self.kl[name]


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


def _random_claims(
    shop: _Workshop, name: str, plan: Plan, uniform: Mapping[int, Plan], budget_bytes: int, draws: int
) -> list[Claim]:
    """The plan's own bits dealt to other layers, the file within 2 % below the budget."""
    rng = np.random.default_rng(0)
    for index in range(draws):
        for _ in range(_MOST_RETRIES):
            dealt = _dealt_again(plan, uniform, shop, budget_bytes, rng)
            if dealt is None:
                return [Claim(f"{name}: random draws of the same bits that fit the budget", index, ">=", draws)]
            label = f"random {index} for {name}"
            size = shop.add(label, dealt)
            if (1 - _ROOM) * budget_bytes <= size <= budget_bytes:
                break
            shop.drop(label)
        else:
            return [Claim(f"{name}: random draws of the same bits that fit the budget", index, ">=", draws)]
    drawn = sorted(shop.kl[f"random {index} for {name}"] for index in range(draws))
    detail = f"best of {draws} random deals of the same bits (median {drawn[draws // 2]:.4g})"
    return [Claim(f"{name}: KL", shop.kl[name], "<", drawn[0], detail)]


def _dealt_again(
    plan: Plan, uniform: Mapping[int, Plan], shop: _Workshop, budget_bytes: int, rng: np.random.Generator
) -> Plan | None:
    """A random permutation of the plan's widths that by its weights' bits comes near the budget; None: none found."""
    movable = [layer for layer in plan.layers if layer.layer_format.weight_bits is not None]
    bits = np.array([layer.layer_format.weight_bits for layer in movable])
    counts = np.array([shop.parameters[layer.weight] for layer in movable])
    room = budget_bytes - plan.predicted.size_bytes
    for _ in range(_MOST_SHUFFLES):
        dealt = rng.permutation(bits)
        growth = float(((dealt - bits) * counts).sum()) / 8
        if room - _ROOM * budget_bytes <= growth <= room and (dealt != bits).any():
            break
    else:
        return None
    by_name = {(width, layer.name): layer for width, other in uniform.items() for layer in other.layers}
    chosen = {layer.name: by_name[int(width), layer.name] for layer, width in zip(movable, dealt, strict=True)}
    layers = tuple(_with_width(layer, chosen.get(layer.name, layer)) for layer in plan.layers)
    return plan.model_copy(update={"layers": layers})


def _with_width(layer: LayerPlan, other: LayerPlan) -> LayerPlan:
    """``layer`` in the format that it has in another plan."""
    fields = ("format", "executed", "weight_format", "storage", "scale_source")
    return layer.model_copy(update={field: getattr(other, field) for field in fields})


def _time_claims(shop: _Workshop, name: str, seconds: float) -> list[Claim]:
    plain = "uniform w8a8"
    claims = []
    for batch in _BATCHES:
        feed = batch_of(shop.task.evaluation[:batch])
        runs = {key: runner(shop.files[key], feed) for key in (plain, name)}
        runs["float"] = runner(shop.task.model, feed)
        times = take_turns(runs, seconds)
        ratio = times.ratio(name, plain)
        shop.rows[name][f"time_ratio_to_int8_batch{batch}"] = ratio
        shop.rows[name][f"time_ratio_to_float_batch{batch}"] = times.ratio(name, "float")
        low, high = times.range_of_ratio(name, plain)
        detail = f"our plain int8 file ({low:.3f} to {high:.3f} by set of sessions)"
        claims.append(Claim(f"{name}: time at batch {batch}", ratio, "<=", _SLOWER, detail))
    return claims


def _stored_bits(plan: Plan, parameters: Mapping[str, int]) -> float:
    """Average over the weights of all layers; float counts 32."""
    bits = {layer.weight: layer.layer_format.weight_bits or 32 for layer in plan.layers}
    return sum(bits[name] * parameters[name] for name in bits) / sum(parameters[name] for name in bits)
