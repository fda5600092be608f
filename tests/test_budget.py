"""Budget texts: every accepted form, the round trip, and messages that say what to write instead."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcpaq_onnx.budget import Budget, parse_budgets
from lcpaq_onnx.errors import UsageError


@pytest.mark.parametrize(
    ("text", "dimension", "limit", "unit"),
    [
        ("size<=2.5MB", "size", 2_500_000, "absolute"),
        ("size<=1KiB", "size", 1024, "absolute"),
        ("size <= 640 kb", "size", 640_000, "absolute"),
        ("size<=0.25x", "size", 0.25, "relative"),
        ("latency<=3.2ms", "latency", 3200, "absolute"),
        ("latency<=450us", "latency", 450, "absolute"),
        ("latency<=450µs", "latency", 450, "absolute"),
        ("latency<=0.6x", "latency", 0.6, "relative"),
        ("bops<=1.2G", "bops", 1.2e9, "absolute"),
        ("bops<=1e9", "bops", 1e9, "absolute"),
        ("bops<=0.1x", "bops", 0.1, "relative"),
        ("peak_memory<=512KB", "peak_memory", 512_000, "absolute"),
        (" peak_memory<=.5x ", "peak_memory", 0.5, "relative"),
        ("bits<=4", "bits", 4, "absolute"),
        ("bits <= 2.5", "bits", 2.5, "absolute"),
        ("error<=1%", "error", 1, "percent"),
        ("error<=0.05", "error", 0.05, "absolute"),
        ("error<=0", "error", 0, "absolute"),
    ],
)
def test_accepted_forms(text: str, dimension: str, limit: float, unit: str) -> None:
    budget = Budget.parse(text)
    assert (budget.dimension, budget.limit, budget.unit) == (dimension, limit, unit)
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize(
    "text", ["size<=2.5MB", "size<=173.25KB", "latency<=3.2ms", "bops<=1.2G", "error<=1%", "size<=100B", "bits<=2.5"]
)
def test_printed_as_people_write_it(text: str) -> None:
    assert str(Budget.parse(text)) == text


@given(
    st.sampled_from(["size", "latency", "bops", "peak_memory"]),
    st.floats(0, 1e15),
    st.sampled_from(["absolute", "relative"]),
)
def test_every_budget_survives_its_text(dimension: str, limit: float, unit: str) -> None:
    budget = Budget(dimension, limit, unit)  # type: ignore[arg-type] # drawn from the literals
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sise<=1MB", "did you mean size<=2.5MB"),
        ("peak-memory<=1MB", "did you mean peak_memory"),
        ("colour<=3", "budgets are size<="),
        ("size<=0.25", "has no unit"),
        ("size<=3ms", "unknown unit 'ms'"),
        ("latency<=3", "write latency<="),
        ("size<1MB", "'size<1MB' is not a budget"),
        ("size<=-1MB", "write size<="),
        ("error<=0.5x", "cannot be relative"),
        ("bits<=0.1x", "cannot be relative"),
        ("bits<=4KB", "unknown unit 'KB'"),
        ("size<=16%", "cannot be percent"),
        ("", "is not a budget"),
        ("size<=1e999B", "finite"),
    ],
)
def test_refusals_name_the_form_to_write(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Budget.parse(text)
    assert message in str(caught.value)


def test_one_dimension_twice_is_an_error() -> None:
    with pytest.raises(UsageError, match="two budgets for error"):
        parse_budgets(["error<=1%", "size<=1MB", "error<=0.1"])
    assert len(parse_budgets(["error<=1%", "size<=1MB"])) == 2
