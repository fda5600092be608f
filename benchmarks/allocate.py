"""Time the allocator on made-up networks of several sizes; prints one JSON object.

    python benchmarks/allocate.py [--repeat 3]

Sizes follow a lognormal law, losses fall by 4 per bit with noise, latencies are sub-linear in bits; the boundaries join
random neighbours whose activations differ in kind. Times include building the programme and the shadow prices.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np

from lcpaq_onnx.allocation.allocate import allocate
from lcpaq_onnx.allocation.problem import AllocationProblem, Boundary, Decision, Option, Reference
from lcpaq_onnx.budget import Budget

BITS = (32, 16, 8, 6, 5, 4, 3, 2)
INTEGER = ("w8", "w6", "w5", "w4")
FLOAT = ("w32", "w16", "w3", "w2")


def network(layers: int, boundaries: int, seed: int) -> AllocationProblem:
    """``layers`` decisions of eight formats and ``boundaries`` conversions between layers at most five apart."""
    rng = np.random.default_rng(seed)
    weights = np.maximum(rng.lognormal(9, 1.5, layers), 64).astype(int)
    macs = weights * rng.integers(1, 200, layers)
    sensitivity = rng.lognormal(0, 1.5, layers)
    noise = rng.lognormal(0, 0.3, (layers, len(BITS)))
    decisions = []
    for i in range(layers):
        loss = np.sort(sensitivity[i] * 4.0 ** -np.array(BITS) * noise[i])
        options = tuple(
            Option(
                f"w{bits}",
                float(loss[k]),
                float(loss[k] / 1000),
                int(weights[i] * bits // 8 + 8),
                float(macs[i] / 1e4 * (0.3 + bits / 32)),
                float(macs[i] * bits * 8),
            )
            for k, bits in enumerate(BITS)
        )
        decisions.append(Decision(f"layer{i}", "layer", options))
    starts = rng.integers(0, layers - 6, boundaries)
    joined = [(int(a), int(a + d)) for a, d in zip(starts, rng.integers(1, 6, boundaries), strict=True)]
    conversions = tuple(
        Boundary(f"layer{a}", formats, f"layer{b}", others, 16, float(rng.uniform(0.1, 2.0)))
        for a, b in joined
        for formats, others in ((INTEGER, FLOAT), (FLOAT, INTEGER))
    )
    widest = [decision.options[0] for decision in decisions]
    reference = Reference(
        sum(o.size_bytes for o in widest), sum(o.latency_us for o in widest), sum(o.bops for o in widest), 0
    )
    return AllocationProblem(tuple(decisions), reference, boundaries=conversions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3, help="networks per size (different seeds)")
    repeat = parser.parse_args().repeat
    texts = ("size<=0.16x", "latency<=0.345x", "bops<=0.155x")
    budgets = [Budget.parse(text) for text in texts]
    allocate(network(10, 4, 0), budgets[:1])  # loads the solver
    rows = []
    for layers, boundaries in ((50, 60), (200, 0), (200, 250), (2000, 0), (2000, 2500)):
        seconds, gaps, proved, tight = [], [], [], []
        for seed in range(repeat):
            problem = network(layers, boundaries, seed)
            started = time.perf_counter()
            found = allocate(problem, budgets)
            seconds.append(time.perf_counter() - started)
            gaps.append(found.gap)
            proved.append(found.proved_optimal)
            used = [(getattr(found.totals, column), cap) for column, cap in map(problem.cap, budgets)]
            tight.append(sum(value >= 0.98 * cap for value, cap in used))
        rows.append(
            {
                "decisions": layers,
                "formats": len(BITS),
                "budgets": texts,
                "boundaries": boundaries,
                "seconds_median": round(statistics.median(seconds), 3),
                "seconds_max": round(max(seconds), 3),
                "gap_max": max(gaps),
                "budgets_within_2_percent": tight,
                "all_proved": all(proved),
            }
        )
    print(json.dumps({"allocate": rows}, indent=2))


if __name__ == "__main__":
    main()
