"""A decoder that takes its cache as an input: empty at first, one entry longer at every step."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

import lcpaq_onnx
from lcpaq_onnx.graph import graph_io
from lcpaq_onnx.manager.analysis import AnalysisInputs, AnalysisManager
from lcpaq_onnx.passes import ActivationRanges, BatchSize, RecordedTensors
from lcpaq_onnx.runtime.calibration import open_calibration
from lcpaq_onnx.runtime.session import Session

TOKENS, WIDTH = 20, 16


def decoder() -> onnx.ModelProto:
    """One step of single-head attention; the cache holds keys, which are values too."""
    model = parser.parse_model(
        '<ir_version: 10, opset_import: ["": 21]> g (int64[n, 1] token, float[n, past, 16] cache)'
        " => (float[n, 1, 20] logits, float[n, total, 16] present) {"
        " x = Gather(table, token) q = MatMul(x, wq) k = MatMul(x, wk) present = Concat <axis = 1> (cache, k)"
        " kt = Transpose <perm = [0, 2, 1]> (present) s = MatMul(q, kt) p = Softmax <axis = -1> (s)"
        " a = MatMul(p, present) y = Add(x, a) logits = MatMul(y, wo) }"
    )
    rng = np.random.default_rng(0)
    shapes = {"table": (TOKENS, WIDTH), "wq": (WIDTH, WIDTH), "wk": (WIDTH, WIDTH), "wo": (WIDTH, TOKENS)}
    for name, shape in shapes.items():
        model.graph.initializer.append(numpy_helper.from_array((rng.normal(size=shape) / 3).astype(np.float32), name))
    return model


def decoded(model: onnx.ModelProto, steps: int, seed: int = 0) -> list[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Feeds of ``steps`` steps, the first with an empty cache, and the logits."""
    session, rng = Session(model), np.random.default_rng(seed)
    cache, done = np.zeros((1, 0, WIDTH), np.float32), []
    for _ in range(steps):
        feed = {"token": rng.integers(0, TOKENS, (1, 1)), "cache": cache}
        outputs = session.run(feed)
        cache = outputs["present"]
        done.append((feed, outputs["logits"]))
    return done


def manager(feeds: list[dict[str, np.ndarray]]) -> AnalysisManager:
    model = decoder()
    data = open_calibration(feeds, Session(model).inputs)
    return AnalysisManager(graph_io.load(model), AnalysisInputs(calibration=data))


@pytest.mark.parametrize("budget", ["", "size<=0.6x"])
def test_a_cache_that_starts_empty_is_no_obstacle(budget: str) -> None:
    steps = [step for seed in range(4) for step in decoded(decoder(), 5, seed)]
    done = lcpaq_onnx.quantize(decoder(), [feed for feed, _ in steps], budget=budget or (), weights=[8])
    assert all(check.passed for check in done.report.checks), [c for c in done.report.checks if not c.passed]
    assert {layer.op for layer in done.report.layers} == {"Gather", "MatMul"}
    found = decoded(done.model, 8, seed=9)
    for (_, expected), (_, logits) in zip(decoded(decoder(), 8, seed=9), found, strict=True):
        # Errors of a step stay in the cache for all later ones.
        assert np.abs(logits - expected).max() <= 0.05 * np.ptp(expected)


def test_what_was_never_seen_has_no_range_and_stays_in_float() -> None:
    first = [decoded(decoder(), 1, seed)[0][0] for seed in range(8)]
    ranges = manager(first).get(ActivationRanges())
    assert "cache" not in ranges
    assert "k" in ranges
    done = lcpaq_onnx.quantize(decoder(), first, weights=[8], activations=[8])
    assert {group.name: group.format for group in done.plan.activations}.get("cache", "f32") == "f32"
    for (_, expected), (_, logits) in zip(decoded(decoder(), 4), decoded(done.model, 4), strict=True):
        # Ranges of one step only: the rest is clipped, and still not lost.
        assert np.abs(logits - expected).max() <= 0.3 * np.ptp(expected)


def test_shapes_are_those_of_a_step_that_has_a_cache() -> None:
    feeds = [feed for feed, _ in decoded(decoder(), 3)]
    assert manager(feeds).get(RecordedTensors())["present"].shape == (1, 2, WIDTH)
    assert manager(feeds[:1]).get(RecordedTensors())["present"].shape == (1, 1, WIDTH)


def test_steps_of_one_length_run_as_a_batch() -> None:
    feeds = [step[0] for seed in range(8) for step in decoded(decoder(), 3, seed)]
    feeds.sort(key=lambda feed: feed["cache"].shape[1])
    analyses = manager(feeds)
    assert analyses.get(BatchSize()) > 1
    lengths = [feed["cache"].shape[:2] for feed in analyses.inputs.samples().batches(8)]
    assert lengths == [(8, 0), (8, 1), (8, 2)]
