"""The audit: random plans measured whole, on samples that the table has not seen; found again only as themselves."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from analysing import analyses_of, model_of, rounding_error, singles

from lcpaq_onnx.manager.analysis import AnalysisManager
from lcpaq_onnx.numeric.losses import teacher_loss
from lcpaq_onnx.passes import CalibrationRun, ErrorTables, RandomPlans, audit, every_entry
from lcpaq_onnx.passes.analysis.batch_size import BatchSize
from lcpaq_onnx.passes.analysis.reliability import split_half_reliability
from lcpaq_onnx.runtime.session import Session

RNG = np.random.default_rng(7)
X = RNG.normal(size=(64, 3, 5, 5)).astype(np.float32)
WEIGHTS = {
    "w1": RNG.normal(size=(6, 3, 3, 3)).astype(np.float32) / 5,
    "w2": RNG.normal(size=(6, 6, 3, 3)).astype(np.float32) / 7,
    "w3": RNG.normal(size=(6, 4)).astype(np.float32),
}
TEXT = """g (float[n, 3, 5, 5] x) => (float[n, 4] y) {
    [one] a = Conv <pads = [1, 1, 1, 1]> (x, w1) [relu] b = Relu(a) [two] c = Conv <pads = [1, 1, 1, 1]> (b, w2)
    [pool] p = GlobalAveragePool(c) [flat] f = Flatten(p) [fc] y = MatMul(f, w3)
}"""
AXES = {"one": 0, "two": 0, "fc": 1}
WEIGHT_OF = {"one": "w1", "two": "w2", "fc": "w3"}


def analyses(samples: int = 64) -> AnalysisManager:
    return analyses_of(model_of(TEXT, WEIGHTS), singles("x", X[:samples]), loss="kl-logits")


def loss_of(plan: dict[str, int], rows: slice, manager: AnalysisManager) -> float:
    changed = {
        WEIGHT_OF[name]: WEIGHTS[WEIGHT_OF[name]] + rounding_error(WEIGHTS[WEIGHT_OF[name]], bits, AXES[name])
        for name, bits in plan.items()
    }
    before, after = (Session(model_of(TEXT, WEIGHTS | w)).run({"x": X[rows]}) for w in ({}, changed))
    return float(teacher_loss("kl-logits", manager.get(CalibrationRun).output_scale)(before, after).mean())


@pytest.mark.parametrize(
    ("samples", "available", "rows"),
    [(16, 64, slice(16, 32)), (20, 64, slice(20, 40)), (48, 64, slice(48, 64)), (64, 64, slice(0, 64))],
)
@pytest.mark.parametrize("batch", [4, 32])
def test_plans_are_measured_whole_on_unseen_samples(samples: int, available: int, rows: slice, batch: int) -> None:
    manager = analyses(available)
    manager.put(BatchSize(), batch)
    plans = manager.get(RandomPlans(every_entry(manager, (2, 3, 4)), samples))
    assert len(plans) == 8
    for plan, loss in plans:
        assert set(plan) == set(WEIGHT_OF)
        assert set(plan.values()) <= {2, 3, 4}
        assert loss == pytest.approx(loss_of(dict(plan), rows, manager), rel=1e-3)


def test_another_number_of_samples_is_another_question() -> None:
    """One store: what was measured on some samples does not answer for others."""
    manager = analyses()
    entries = every_entry(manager, (2, 4))
    few, all_of_them = (manager.get(RandomPlans(entries, samples)) for samples in (32, 64))
    for (plan, first), (same_plan, second) in zip(few, all_of_them, strict=True):
        assert plan == same_plan
        assert first != second


def test_layers_that_share_a_weight_take_a_width_that_both_have() -> None:
    text = """g (float[n, 3, 5, 5] x) => (float[n, 3, 5, 5] y) {
        [one] a = Conv(x, w) [relu] b = Relu(a) [two] c = Conv(b, w) [three] y = Conv(c, v)
    }"""
    square = {name: RNG.normal(size=(3, 3, 1, 1)).astype(np.float32) for name in "wv"}
    manager = analyses_of(model_of(text, square), singles("x", X), loss="squared-error")
    entries = frozenset({("one", 3), ("one", 4), ("two", 4), ("two", 5), ("three", 3), ("three", 8)})
    for plan, _ in manager.get(RandomPlans(entries, 16)):
        assert plan["one"] == plan["two"] == 4
        assert plan["three"] in (3, 8)


def test_an_audit_ranks_as_the_table_does() -> None:
    manager = analyses()
    entries = every_entry(manager, (2, 3, 4, 6))
    plans = manager.get(RandomPlans(entries, 32))
    found = audit(manager.get(ErrorTables(entries, 32)), plans, 32)
    assert found is not None
    assert found.measured == tuple(loss for _, loss in plans)
    # Four widths and three layers: losses from 1 to 100, which any table in its senses ranks.
    assert found.rank_correlation > 0.7
    assert -1 <= found.low <= found.rank_correlation <= found.high <= 1
    by_prediction = sorted(zip(found.predicted, found.measured, strict=True))
    assert sum(a[1] <= b[1] for a, b in pairwise(by_prediction)) >= 4


def test_noise_is_not_reliable_however_entries_are_spread_over_widths() -> None:
    rng = np.random.default_rng(1)
    spread = []
    for _ in range(20):
        noise = {
            (f"layer{layer}", width): width**2 * rng.exponential(size=32)
            for width, layers in ((2, 12), (4, 6), (6, 4), (8, 2))
            for layer in range(layers)
        }
        spread.append(split_half_reliability(noise))
    # Nothing to find: 0 on average, but for the negative correlations that count as 0.
    assert np.mean(spread) < 0.4
    signal = {(f"layer{n}", 4): (n + 1) * (1 + 0.1 * rng.normal(size=32)) for n in range(10)}
    assert split_half_reliability(signal) > 0.95
