"""Shrinking measured errors towards second order: what it must keep, whatever the numbers are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcpaq_onnx.numeric.shrinkage import Observed, shrunk


@dataclass(frozen=True, eq=False)
class Case:
    """``predicted`` [layers, widths], ``relative`` [layers], ``measured`` with nan where nothing was."""

    predicted: np.ndarray
    relative: np.ndarray
    measured: Observed

    def answer(self, scale: float = 1.0) -> np.ndarray:
        observed = Observed(scale * self.measured.value, self.measured.relative_stderr)
        return shrunk(scale * self.predicted, self.relative, observed)


def case(seed: int, *, noise: float, share: float = 1.0, layers: int = 6, widths: int = 5) -> Case:
    """Errors that fall fourfold with each bit; truth is off the prediction by layer, width and entry."""
    rng = np.random.default_rng(seed)
    predicted = np.exp(rng.normal(size=(layers, 1))) * 4.0 ** -np.arange(widths)
    truth = predicted * np.exp(
        0.3 * rng.normal(size=(layers, 1)) + 0.3 * rng.normal(size=widths) + 0.2 * rng.normal(size=(layers, widths))
    )
    value = truth * np.exp(noise * rng.normal(size=truth.shape))
    known = rng.uniform(size=truth.shape) < share
    stderr = np.where(known, noise, np.nan)
    return Case(predicted, np.full(layers, 0.1), Observed(np.where(known, value, np.nan), stderr))


SEEDS = st.integers(0, 10_000)


@given(SEEDS)
def test_where_nothing_is_measured_the_prediction_stands(seed: int) -> None:
    asked = case(seed, noise=0.1, share=0.0)
    # Through logarithms and back.
    np.testing.assert_allclose(asked.answer(), asked.predicted, rtol=1e-12)


@given(SEEDS)
def test_what_agrees_with_the_prediction_stays(seed: int) -> None:
    asked = case(seed, noise=0.1)
    agreeing = Case(asked.predicted, asked.relative, Observed(asked.predicted, asked.measured.relative_stderr))
    np.testing.assert_allclose(agreeing.answer(), asked.predicted, rtol=1e-12)


@given(SEEDS)
def test_without_noise_measured_values_stay(seed: int) -> None:
    asked = case(seed, noise=0.0)
    # Errors below 3 % are not believed, so an entry's own rest is kept up to a few per cent of itself.
    np.testing.assert_allclose(asked.answer(), asked.measured.value, rtol=0.03)


@given(SEEDS, st.sampled_from([0.05, 0.2, 0.5]), st.sampled_from([0.0, 0.4, 1.0]))
def test_answers_scale_with_the_errors(seed: int, noise: float, share: float) -> None:
    """Units do not matter: nats, bits, or a squared error."""
    asked = case(seed, noise=noise, share=share)
    np.testing.assert_allclose(asked.answer(scale=1e-5), 1e-5 * asked.answer(), rtol=1e-9)


@given(SEEDS, st.sampled_from([0.05, 0.5]))
def test_the_order_of_layers_does_not_matter(seed: int, noise: float) -> None:
    asked = case(seed, noise=noise, share=0.6)
    order = np.random.default_rng(seed).permutation(len(asked.predicted))
    observed = Observed(asked.measured.value[order], asked.measured.relative_stderr[order])
    np.testing.assert_allclose(
        shrunk(asked.predicted[order], asked.relative[order], observed), asked.answer()[order], rtol=1e-9
    )


@given(SEEDS, st.sampled_from([0.05, 0.5]), st.sampled_from([0.3, 1.0]))
def test_answers_lie_in_what_was_seen(seed: int, noise: float, share: float) -> None:
    """In logarithms no answer is further from its prediction than the layers', widths' and entries' parts together."""
    asked = case(seed, noise=noise, share=share)
    ratio = np.log(asked.measured.value / asked.predicted)
    if np.isnan(ratio).all():
        return
    answer = np.log(asked.answer() / asked.predicted)
    assert np.isfinite(answer).all()
    assert np.abs(answer).max() <= 3 * np.nanmax(np.abs(ratio)) + 1e-9


def test_noise_is_taken_out() -> None:
    """On average over cases the answer is nearer to the truth than what was measured, and than what was predicted."""
    errors = []
    for seed in range(60):
        exact, noisy = case(seed, noise=0.0), case(seed, noise=0.4)
        truth = np.log(exact.measured.value)
        found = [np.log(table) - truth for table in (noisy.answer(), noisy.measured.value, noisy.predicted)]
        errors.append([float((error**2).mean()) for error in found])
    answer, measured, predicted = np.mean(errors, axis=0)
    assert answer < 0.8 * measured
    assert answer < 0.8 * predicted


def test_a_measured_layer_corrects_its_other_widths_and_a_width_its_other_layers() -> None:
    predicted = np.ones((4, 3)) * 4.0 ** -np.arange(3)
    # Layer 0 is twice what second order says wherever it was looked at.
    value = np.full((4, 3), np.nan)
    value[:, 0] = predicted[:, 0]
    value[0, :2] = 2 * predicted[0, :2]
    value[1:, 1] = predicted[1:, 1]
    relative = np.full(4, 0.5)
    answer = shrunk(predicted, relative, Observed(value, np.where(np.isnan(value), np.nan, 0.05))) / predicted
    assert answer[0, 2] > 1.4
    # Layers 1 to 3 are as predicted: what layer 0 adds to the widths' means is all that moves them.
    assert np.abs(np.log(answer[1:])).max() < 0.2
    # Width 0 costs three times what second order says, in all layers that were measured: in the others, too.
    value = np.full((4, 3), np.nan)
    value[:3, 0] = 3 * predicted[:3, 0]
    value[:3, 2] = predicted[:3, 2]
    answer = shrunk(predicted, relative, Observed(value, np.where(np.isnan(value), np.nan, 0.05))) / predicted
    assert answer[3, 0] == pytest.approx(3, rel=0.1)
    assert answer[3, 2] == pytest.approx(1, rel=0.1)
    # Between measured widths the correction is between theirs.
    assert 1 < answer[3, 1] < 3


def test_entries_predicted_as_nothing_stay_nothing() -> None:
    predicted = np.array([[0.0, 0.0], [1.0, 0.25]])
    value = np.array([[0.0, np.nan], [1.5, 0.3]])
    answer = shrunk(predicted, np.zeros(2), Observed(value, np.array([[np.nan, np.nan], [0.1, 0.1]])))
    assert answer[0].tolist() == [0.0, 0.0]
    assert (answer[1] > 0).all()
