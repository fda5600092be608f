"""Teacher losses against scipy and against figures worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import special, stats

from lcpaq_onnx.errors import UsageError
from lcpaq_onnx.numeric.losses import (
    BuiltinLoss,
    KullbackLeibler,
    OutputScale,
    OutputScaleStream,
    SquaredError,
    agreement,
    choose_loss,
    fitting_loss,
    relative_squared_error,
    softening_temperature,
    teacher_loss,
)

UNIT = OutputScale({"y": 1.0}, {"y": 1.0})


def logits(seed: int, *shape: int) -> np.ndarray:
    return (4 * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


# ---- Kullback-Leibler -----------------------------------------------------------------------------------------------
def test_kl_of_logits_is_scipys() -> None:
    teacher, changed = logits(0, 9, 5), logits(1, 9, 5)
    p, q = (special.softmax(z.astype(np.float64), axis=1) for z in (teacher, changed))
    found = teacher_loss("kl-logits", UNIT)({"y": teacher}, {"y": changed})
    # Both are float64: what is left is the order of a few sums.
    np.testing.assert_allclose(found, stats.entropy(p, q, axis=1), rtol=1e-12)


def test_kl_of_probabilities_is_scipys() -> None:
    p, q = (special.softmax(logits(seed, 9, 5), axis=1) for seed in (0, 1))
    found = teacher_loss("kl-probabilities", UNIT)({"y": p}, {"y": q})
    # scipy normalises the rows, which are float32 softmaxes that miss 1 by up to 1e-7.
    np.testing.assert_allclose(found, stats.entropy(p.astype(np.float64), q.astype(np.float64), axis=1), atol=1e-6)


def test_kl_of_a_probability_that_vanished_is_finite() -> None:
    p, q = np.array([[0.5, 0.5, 0.0]], np.float32), np.array([[1.0, 0.0, 0.0]], np.float32)
    (found,) = teacher_loss("kl-probabilities", UNIT)({"y": p}, {"y": q})
    assert found == pytest.approx(0.5 * np.log(0.5) + 0.5 * np.log(0.5 / 1e-12))


def test_kl_ignores_a_shift_of_all_logits_and_huge_ones() -> None:
    teacher = logits(0, 4, 6)
    loss = teacher_loss("kl-logits", UNIT)
    # A shift of 3 moves float32 logits of size 10 by one rounding, 1e-6; the loss is quadratic in that.
    assert loss({"y": teacher}, {"y": teacher + np.float32(3)}).max() < 1e-10
    assert np.isfinite(loss({"y": teacher}, {"y": teacher * np.float32(1e30)})).all()


@pytest.mark.parametrize("name", ["kl-logits", "squared-error"])
def test_no_change_costs_nothing_exactly(name: str) -> None:
    outputs = {"y": logits(0, 7, 3)}
    assert teacher_loss(name, UNIT)(outputs, outputs).tolist() == [0.0] * 7  # type: ignore[arg-type]


def test_losses_of_two_outputs_add_up_and_further_axes_average() -> None:
    a, b = logits(0, 6, 5), logits(1, 6, 5)
    c, d = logits(2, 6, 3, 5), logits(3, 6, 3, 5)
    loss = teacher_loss("kl-logits", UNIT)
    one, two = loss({"y": a}, {"y": b}), loss({"z": c}, {"z": d})
    np.testing.assert_allclose(loss({"y": a, "z": c}, {"y": b, "z": d}), one + two, rtol=1e-12)
    rows = loss({"z": c.reshape(18, 5)}, {"z": d.reshape(18, 5)}).reshape(6, 3)
    np.testing.assert_allclose(two, rows.mean(axis=1), rtol=1e-12)


def test_kl_without_float_outputs_is_refused() -> None:
    with pytest.raises(UsageError, match="no float output"):
        teacher_loss("kl-logits", UNIT)({"y": np.zeros((2, 3), np.int64)}, {"y": np.zeros((2, 3), np.int64)})


# ---- squared error --------------------------------------------------------------------------------------------------
def test_relative_error_by_hand() -> None:
    teacher = {"y": np.array([[0.0, 2.0], [4.0, 0.0]], np.float32)}
    changed = {"y": np.array([[1.0, 2.0], [4.0, 2.0]], np.float32)}
    stream = OutputScaleStream()
    stream.update(teacher)
    scale = stream.result()
    assert scale.range["y"] == 4.0
    assert scale.mean_square["y"] == 5.0
    # Mean squares per sample 0.5 and 2, over the squared range 16 and over the mean square 5.
    assert relative_squared_error(teacher, changed, scale).tolist() == [0.5 / 16, 2 / 16]
    assert teacher_loss("squared-error", scale)(teacher, changed).tolist() == [0.1, 0.4]


def test_the_worst_output_counts_for_the_relative_error_and_all_for_the_loss() -> None:
    teacher = {"a": np.zeros((2, 2), np.float32), "b": np.zeros((2, 4), np.float32)}
    changed = {"a": np.ones((2, 2), np.float32), "b": np.full((2, 4), 3, np.float32)}
    scale = OutputScale({"a": 1.0, "b": 10.0}, {"a": 1.0, "b": 100.0})
    assert relative_squared_error(teacher, changed, scale).tolist() == [1.0, 1.0]
    np.testing.assert_allclose(teacher_loss("squared-error", scale)(teacher, changed), [1.09, 1.09], rtol=1e-12)


def test_an_output_without_samples_stands_for_every_sample() -> None:
    teacher = {"a": np.zeros((3, 2), np.float32), "b": np.zeros((), np.float32)}
    changed = {"a": np.zeros((3, 2), np.float32), "b": np.array(2, np.float32)}
    scale = OutputScale({"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 1.0})
    assert relative_squared_error(teacher, changed, scale).tolist() == [4.0, 4.0, 4.0]


def test_equal_infinities_are_equal() -> None:
    masked = {"y": np.array([[1.0, -np.inf]], np.float32)}
    moved = {"y": np.array([[2.0, -np.inf]], np.float32)}
    stream = OutputScaleStream()
    stream.update({"y": np.array([[1.0, -np.inf], [3.0, 2.0]], np.float32)})
    assert stream.result().range["y"] == 2.0
    with np.errstate(invalid="ignore"):
        found = relative_squared_error(masked, moved, stream.result())
    assert found.tolist() == [1 / 2 / 4]


def test_output_scale_does_not_depend_on_batches() -> None:
    values = logits(4, 24, 5)
    whole, parts = OutputScaleStream(), OutputScaleStream()
    whole.update({"y": values, "index": np.arange(24)})
    for part in np.split(values, [1, 7, 8]):
        parts.update({"y": part})
    assert parts.result().range == whole.result().range == {"y": float(values.max() - values.min())}
    mean_square = float((values.astype(np.float64) ** 2).mean())
    assert parts.result().mean_square["y"] == pytest.approx(mean_square, rel=1e-12)


def test_a_constant_output_has_scale_one() -> None:
    stream = OutputScaleStream()
    stream.update({"y": np.zeros((2, 2), np.float32), "n": np.full((2, 2), np.inf, np.float32)})
    assert stream.result() == OutputScale({"y": 1.0, "n": 1.0}, {"y": 1.0, "n": 1.0})


# ---- decisions and the choice of a loss -----------------------------------------------------------------------------
def test_agreement_counts_kept_decisions() -> None:
    teacher = {"y": np.array([[1, 2], [3, 1], [0, 5], [7, 6]], np.float32), "n": np.zeros(4, np.int64)}
    changed = {"y": np.array([[1, 9], [0, 1], [0, 5], [8, 6]], np.float32), "n": np.ones(4, np.int64)}
    assert agreement(teacher, changed) == 0.75


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        ({"y": logits(0, 4, 10)}, "kl-logits"),
        ({"y": special.softmax(logits(0, 4, 10), axis=1)}, "kl-probabilities"),
        ({"y": np.abs(logits(0, 4, 10))}, "kl-logits"),
        ({"y": logits(0, 4, 10), "label": np.arange(4)}, "kl-logits"),
        ({"y": logits(0, 4, 10), "z": logits(0, 4, 10)}, "squared-error"),
        ({"y": logits(0, 4, 1)}, "squared-error"),
        ({"y": logits(0, 4, 3, 8, 8)}, "squared-error"),
        ({"y": logits(0, 4)}, "squared-error"),
        ({"label": np.arange(4)}, "squared-error"),
    ],
    ids=["logits", "softmax", "positive", "with-label", "two", "scalar", "image", "vector", "integers"],
)
def test_loss_that_fits_the_outputs(outputs: dict[str, np.ndarray], expected: str) -> None:
    assert choose_loss([outputs, outputs]) == expected


def test_no_outputs_seen_gives_the_general_loss() -> None:
    assert choose_loss([]) == "squared-error"


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(UsageError, match="'mse' is not known"):
        teacher_loss("mse", UNIT)  # type: ignore[arg-type]


# ---- softened teachers ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("of_probabilities", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_softened_kl_is_that_of_softened_distributions(of_probabilities: bool, temperature: float) -> None:
    teacher, changed = logits(0, 9, 5).astype(np.float64), logits(1, 9, 5).astype(np.float64)
    p, q = (special.softmax(z / temperature, axis=1) for z in (teacher, changed))
    given = [{"y": special.softmax(z, axis=1) if of_probabilities else z} for z in (teacher, changed)]
    found = KullbackLeibler(of_probabilities, temperature)(*given)
    # Both are float64; the log of a softmax takes a few digits.
    np.testing.assert_allclose(found, temperature**2 * special.rel_entr(p, q).sum(axis=1), rtol=1e-9)


@pytest.mark.parametrize("name", ["kl-logits", "kl-probabilities"])
def test_a_teacher_that_is_too_sure_is_softened_to_the_stated_confidence(name: str) -> None:
    rows = logits(2, 200, 10).astype(np.float64) / 4
    rows[np.arange(200), np.arange(200) % 10] += 8
    outputs = {"y": special.softmax(rows, axis=1) if name == "kl-probabilities" else rows}
    temperature = softening_temperature([outputs, outputs], name)  # type: ignore[arg-type]
    assert special.softmax(rows, axis=1).max(axis=1).mean() > 0.95
    assert 1 < temperature < 20
    # At most that; a hundredth of the temperature is two thousandths of the confidence here.
    assert 0.948 < special.softmax(rows / temperature, axis=1).max(axis=1).mean() <= 0.95
    assert fitting_loss([outputs], UNIT) == KullbackLeibler(name == "kl-probabilities", temperature)


def test_an_undecided_teacher_keeps_its_temperature_and_an_absurd_one_stops_at_twenty() -> None:
    assert softening_temperature([{"y": logits(0, 50, 10) / np.float32(8)}], "kl-logits") == 1.0
    assert softening_temperature([{"y": 1e6 * logits(0, 50, 10)}], "kl-logits") == 20.0
    assert str(fitting_loss([{"y": logits(0, 50, 10) / np.float32(8)}], UNIT)) == "kl-logits"
    assert str(fitting_loss([{"y": 1e6 * logits(0, 50, 10)}], UNIT)) == "kl-logits at temperature 20"


def test_what_fits_an_image_is_squared_error() -> None:
    assert fitting_loss([{"y": logits(0, 4, 3, 8, 8)}], UNIT) == SquaredError((("y", 1.0),))


# ---- embeddings -----------------------------------------------------------------------------------------------------
LOSSES = {
    "logits": KullbackLeibler(),
    "softened": KullbackLeibler(temperature=3.0),
    "probabilities": KullbackLeibler(of_probabilities=True),
    "squared error": SquaredError((("a", 4.0), ("y", 2.0))),
}


@pytest.mark.parametrize("name", LOSSES)
def test_half_an_embeddings_square_is_the_loss_of_a_small_change(name: str) -> None:
    loss = LOSSES[name]
    assert isinstance(loss, BuiltinLoss)
    rng = np.random.default_rng(0)

    def outputs(a: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
        return (
            {"a": special.softmax(a, -1), "y": special.softmax(y, -1)} if name == "probabilities" else {"a": a, "y": y}
        )

    a, y = rng.normal(size=(7, 3, 5)), rng.normal(size=(7, 4))
    da, dy = 1e-3 * rng.normal(size=(7, 3, 5)), 1e-3 * rng.normal(size=(7, 4))
    teacher, changed = outputs(a, y), outputs(a + da, y + dy)
    rows = loss.embed(teacher, changed)
    # The next order is a thousandth of the second at changes of a thousandth.
    np.testing.assert_allclose(0.5 * (rows**2).sum(axis=1), loss(teacher, changed), rtol=5e-3)
    # Rows of changes add up where the changes do; probabilities are curved, so to first order there.
    both = loss.embed(teacher, outputs(a + 2 * da, y + 2 * dy))
    np.testing.assert_allclose(both, 2 * rows, rtol=1e-6 if name != "probabilities" else 5e-3, atol=1e-8)


def test_an_output_without_samples_is_in_the_embedding_of_every_sample() -> None:
    loss = SquaredError((("a", 1.0), ("b", 1.0)))
    teacher = {"a": np.zeros((3, 2)), "b": np.zeros(())}
    rows = loss.embed(teacher, {"a": np.ones((3, 2)), "b": np.array(2.0)})
    assert rows.shape == (3, 3)
    np.testing.assert_allclose(0.5 * (rows**2).sum(axis=1), [5.0] * 3)


def test_losses_are_values() -> None:
    assert KullbackLeibler(False, 2.0) == KullbackLeibler(False, 2.0)
    assert repr(KullbackLeibler(False, 2.0)) != repr(KullbackLeibler(False, 2.1))
    assert len({SquaredError((("y", 1.0),)), SquaredError((("y", 1.0),)), KullbackLeibler()}) == 2
    assert [loss.decides for loss in LOSSES.values()] == [True, True, True, False]
