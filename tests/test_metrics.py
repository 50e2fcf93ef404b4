"""Metrics and their standard errors against bootstraps, a jackknife and counting by hand."""

import math

import jax
import numpy as np
import pytest

from lm import metrics


def some_rows(n: int = 400, seed: int = 0) -> dict[str, np.ndarray]:
    """Sums of rows whose tokens say much the same: unequal weights, and a longer row is a harder one."""
    rng = np.random.default_rng(seed)
    weight = rng.integers(1, 60, n).astype(np.float64)
    nats = 2.0 + 0.02 * weight + rng.normal(0, 0.5, n)
    return {"loss": nats * weight, "correct": np.floor(weight * rng.beta(4, 6, n)), "weight": weight}


def add(*parts: dict) -> dict:
    return {name: sum(part[name] for part in parts) for name in parts[0]}


def test_errors_are_those_of_a_bootstrap_and_a_jackknife_over_rows():
    rows = some_rows()
    found = metrics.language_model(metrics.row_moments(rows))
    assert found["loss"] == pytest.approx(rows["loss"].sum() / rows["weight"].sum(), rel=1e-12)
    n, rng = len(rows["weight"]), np.random.default_rng(1)
    drawn = rng.integers(0, n, (4000, n))
    weight = rows["weight"][drawn].sum(axis=1)
    left = {name: value.sum() - value for name, value in rows.items()}
    for name, error in (("loss", found["loss_se"]), ("correct", found["accuracy_se"])):
        assert error == pytest.approx((rows[name][drawn].sum(axis=1) / weight).std(), rel=0.05)
        without = left[name] / left["weight"]
        jackknife = math.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum())
        assert error == pytest.approx(jackknife, rel=0.02)
    perplexities = np.exp(rows["loss"][drawn].sum(axis=1) / weight)
    assert found["perplexity_se"] == pytest.approx(perplexities.std(), rel=0.05)
    # Tokens taken as independent would promise far more: here each row's tokens share what they are off by.
    assert found["loss_se"] > 3 * 0.5 / math.sqrt(rows["weight"].sum())


def test_with_equal_rows_it_is_the_error_of_a_mean():
    means = np.random.default_rng(0).normal(3, 1, 50)
    moments = metrics.row_moments({"loss": means * 7, "correct": means, "weight": np.full(50, 7.0)})
    assert metrics.ratio_error(moments, "loss") == pytest.approx(means.std(ddof=1) / math.sqrt(50), rel=1e-9)


def test_moments_add_up_over_any_batches_and_padding_counts_for_nothing():
    rows = some_rows(30)
    whole = metrics.row_moments(rows)
    parts = [{name: value[i : i + 7] for name, value in rows.items()} for i in range(0, 30, 7)]
    parts[-1] = {name: np.append(value, np.zeros(5)) for name, value in parts[-1].items()}
    added = add(*(metrics.row_moments(part) for part in parts))
    assert added["rows"] == 30
    assert metrics.language_model(added) == pytest.approx(metrics.language_model(whole), rel=1e-12)


def test_a_small_error_on_a_large_mean_survives():
    rng = np.random.default_rng(0)
    weight = np.full(1000, 1024.0)
    nats = 9.0 + 1e-4 * rng.standard_normal(1000)  # float32 sums of squares would leave noise of this size
    moments = metrics.row_moments({"loss": (nats * weight).astype(np.float32), "weight": weight.astype(np.float32)})
    assert metrics.ratio_error(moments, "loss") == pytest.approx(nats.std(ddof=1) / math.sqrt(1000), rel=0.05)


def test_one_row_has_no_error_and_no_row_no_mean():
    one = metrics.language_model(metrics.row_moments({name: value[:1] for name, value in some_rows().items()}))
    assert set(one) == {"loss", "perplexity", "accuracy"}
    none = metrics.language_model(metrics.row_moments({name: value * 0 for name, value in some_rows().items()}))
    assert all(math.isnan(value) for value in none.values())
    assert metrics.language_model({"loss": 6.0, "correct": 1.0, "weight": 4.0}) == {
        "loss": 1.5,
        "perplexity": math.exp(1.5),
        "accuracy": 0.25,
    }


def test_identical_rows_have_no_error_whatever_rounding_leaves():
    third = np.full(10, 1 / 3)
    moments = metrics.row_moments({"loss": third * 0.1, "correct": third, "weight": third})
    assert metrics.ratio_error(moments, "loss") == pytest.approx(0, abs=1e-8)


def test_sums_of_rows_are_weighted():
    rng = np.random.default_rng(0)
    values, weights = rng.random((3, 5)).astype(np.float32), rng.random((3, 5)).astype(np.float32)
    weights[2] = 0
    sums = jax.jit(metrics.row_sums)({"loss": values}, weights)
    for name, want in (("loss", values * weights), ("weight", weights)):
        np.testing.assert_allclose(sums[name], [row.sum() for row in want.astype(np.float64)], rtol=1e-6)


LABELS = [0, 0, 0, 1, 1, 2, 2, 2, 2, 0, 1]
PREDICTIONS = [0, 1, 0, 1, 1, 2, 0, 2, 4, 4, 0]
WEIGHTS = [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0]


def some_confusion(n_classes: int = 5) -> np.ndarray:
    counted = jax.jit(metrics.confusion, static_argnums=3)
    arrays = np.array(LABELS, np.int32), np.array(PREDICTIONS, np.int32), np.array(WEIGHTS, np.float32)
    return np.asarray(counted(*arrays, n_classes))


def test_confusion_counts_labels_down_and_predictions_across():
    want = np.zeros((5, 5))
    for label, prediction, weight in zip(LABELS, PREDICTIONS, WEIGHTS):
        want[label, prediction] += weight
    np.testing.assert_array_equal(some_confusion(), want)


def f1_by_hand(cls: int) -> float:
    pairs = [(a, b) for a, b, w in zip(LABELS, PREDICTIONS, WEIGHTS) if w]
    hits = sum(a == b == cls for a, b in pairs)
    if not hits:
        return 0.0
    precision = hits / sum(b == cls for _, b in pairs)
    recall = hits / sum(a == cls for a, _ in pairs)
    return 2 * precision * recall / (precision + recall)


def test_classification_by_hand():
    found = metrics.classification({"loss": 4.5, "weight": 9.0, "confusion": some_confusion().astype(np.float64)})
    assert found["loss"] == 0.5
    assert found["accuracy"] == found["micro_f1"] == pytest.approx(6 / 9)
    assert found["accuracy_se"] == pytest.approx(math.sqrt(6 / 9 * 3 / 9 / 9))
    # Class 3 occurs nowhere and class 4 only as a prediction: the first does not count, the second is 0.
    assert found["macro_f1"] == pytest.approx(sum(f1_by_hand(cls) for cls in (0, 1, 2, 4)) / 4)


def test_classification_as_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 4, 200), rng.integers(0, 6, 200)
    matrix = metrics.confusion(labels, predictions, np.ones(200, np.float32), 7)
    found = metrics.classification({"loss": 0.0, "weight": 200.0, "confusion": matrix})
    for average in ("micro", "macro"):
        want = sklearn.f1_score(labels, predictions, average=average, zero_division=0)
        assert found[f"{average}_f1"] == pytest.approx(want)


def test_nothing_classified_is_not_a_number():
    found = metrics.classification({"loss": 0.0, "weight": 0.0, "confusion": np.zeros((3, 3))})
    assert all(math.isnan(value) for value in found.values())


def test_perplexity_overflows_to_infinity():
    assert metrics.perplexity(800.0) == math.inf
    assert metrics.perplexity(math.log(7)) == pytest.approx(7)
    assert metrics.bits_per_byte(math.log(2), 3, 12) == pytest.approx(0.25)


def test_the_error_of_a_sum_of_ratios_is_that_of_a_bootstrap():
    """Two losses of the same rows that know of each other, each over its own weight."""
    rows = some_rows()
    rng = np.random.default_rng(2)
    rows["next_loss"] = 0.3 * rows["loss"] / rows["weight"] + rng.normal(0.5, 0.2, 400)
    rows["next_weight"] = np.ones(400)
    moments = metrics.row_moments(rows)
    found = metrics.sum_of_ratios_error(moments, [("loss", "weight"), ("next_loss", "next_weight")])
    drawn = rng.integers(0, 400, (4000, 400))
    sums = {name: value[drawn].sum(axis=1) for name, value in rows.items()}
    both = sums["loss"] / sums["weight"] + sums["next_loss"] / sums["next_weight"]
    assert found == pytest.approx(both.std(), rel=0.05)
    one = metrics.sum_of_ratios_error(moments, [("loss", "weight")])
    assert one == pytest.approx(metrics.ratio_error(moments, "loss"), rel=1e-12)
    assert found > 1.1 * math.hypot(one, metrics.ratio_error(moments, "next_loss", "next_weight"))


def test_the_error_of_macro_f1_is_that_of_a_bootstrap():
    rng = np.random.default_rng(0)
    labels = rng.choice(4, 600, p=[0.5, 0.3, 0.15, 0.05])
    told = np.where(rng.random(600) < 0.7, labels, rng.choice(3, 600))

    def matrix(index):
        counts = np.zeros((4, 4))
        np.add.at(counts, (labels[index], told[index]), 1)
        return metrics.classification({"confusion": counts, "loss": 0.0, "weight": 600.0})

    found = matrix(np.arange(600))
    drawn = [matrix(rng.integers(0, 600, 600))["macro_f1"] for _ in range(2000)]
    assert found["macro_f1_se"] == pytest.approx(np.std(drawn), rel=0.06)
    assert found["micro_f1_se"] == found["accuracy_se"]
    right = metrics.classification({"confusion": np.diag([5.0, 0.0, 7.0]), "loss": 0.0, "weight": 12.0})
    assert (right["macro_f1"], right["macro_f1_se"]) == (1.0, 0.0)


@pytest.mark.parametrize("name", ["loss", "masked_loss", "perplexity", "bits_per_byte"])
def test_lower_is_better_of_losses(name: str):
    assert metrics.is_better(name, 1.0, None)
    assert metrics.is_better(name, 1.0, 1.5)
    assert not metrics.is_better(name, 1.5, 1.0)
    assert not metrics.is_better(name, 1.0, 1.0)


@pytest.mark.parametrize("name", ["accuracy", "next_accuracy", "macro_f1", "micro_f1"])
def test_higher_is_better_of_scores(name: str):
    assert metrics.is_better(name, 0.5, None)
    assert metrics.is_better(name, 0.6, 0.5)
    assert not metrics.is_better(name, 0.5, 0.6)
    assert not metrics.is_better(name, 0.5, 0.5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["loss", "accuracy"])
def test_what_is_not_finite_is_never_better(name: str, value: float):
    assert not metrics.is_better(name, value, None)
    assert not metrics.is_better(name, value, 0.5)


def several_classes(n: int = 500, classes: int = 5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels and predictions bool `[n, classes]`, wrong together in some rows, and nats of each row."""
    rng = np.random.default_rng(0)
    mood = rng.random((n, 1))
    labels = rng.random((n, classes)) < mood * [0.9, 0.6, 0.4, 0.2, 0.1]
    told = np.where(rng.random((n, 1)) < 0.7, labels, rng.random((n, classes)) < mood * 0.5)
    return labels, told, rng.gamma(2.0, 0.3, n)


def of_several(labels: np.ndarray, told: np.ndarray, nats: np.ndarray, weights: np.ndarray | None = None) -> dict:
    weights = np.ones(len(labels), np.float32) if weights is None else weights
    sums = {name: np.asarray(value) for name, value in metrics.class_counts(labels, told, weights).items()}
    rows = {"loss": nats * weights, "correct": (labels == told).all(axis=1) * weights, "weight": weights}
    return metrics.multi_label(sums | metrics.row_moments(rows))


def test_several_classes_as_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    labels, told, nats = several_classes()
    labels[:, 4] = told[:, 4] = False  # occurs nowhere, and doesn't count
    found = of_several(labels, told, nats)
    assert found["accuracy"] == pytest.approx(sklearn.accuracy_score(labels, told))
    assert found["micro_f1"] == pytest.approx(sklearn.f1_score(labels, told, average="micro"))
    assert found["macro_f1"] == pytest.approx(sklearn.f1_score(labels[:, :4], told[:, :4], average="macro"))
    assert found["loss"] == pytest.approx(nats.mean())


def test_several_classes_by_hand():
    """Two rows and a row of padding; the third class only as a prediction."""
    labels = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]], bool)
    told = np.array([[1, 0, 0, 0], [0, 1, 1, 0], [1, 1, 1, 0]], bool)
    found = of_several(labels, told, np.array([0.5, 1.5, 9.0]), np.array([1, 1, 0], np.float32))
    assert found["accuracy"] == 0.5
    assert found["accuracy_se"] == pytest.approx(math.sqrt(0.25 / 2))
    assert found["micro_f1"] == pytest.approx(2 * 2 / (3 + 3))
    assert found["macro_f1"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert found["loss"] == 1.0


def test_errors_of_several_classes_are_those_of_a_bootstrap():
    labels, told, nats = several_classes()
    found = of_several(labels, told, nats)
    rng = np.random.default_rng(1)
    drawn = [of_several(labels[i], told[i], nats[i]) for i in rng.integers(0, len(nats), (1500, len(nats)))]
    for name in ("loss", "accuracy", "micro_f1", "macro_f1"):
        spread = np.std([one[name] for one in drawn])
        assert found[f"{name}_se"] == pytest.approx(spread, rel=0.07), name
    # Classes of a row know of each other: taken for independent rows, errors would be too small.
    flat = of_several(labels.reshape(-1, 1), told.reshape(-1, 1), np.repeat(nats, 5))
    assert flat["micro_f1"] == pytest.approx(found["micro_f1"])
    assert found["micro_f1_se"] > 1.1 * flat["micro_f1_se"]


def test_nothing_of_several_classes_is_not_a_number():
    nothing = np.zeros((2, 3), bool)
    found = of_several(nothing, nothing, np.zeros(2), np.zeros(2, np.float32))
    assert all(math.isnan(value) for value in found.values())
    found = of_several(nothing, nothing, np.ones(2))  # nowhere a class, and all right
    assert (found["accuracy"], found["loss"]) == (1.0, 1.0)
    assert math.isnan(found["macro_f1"])
    assert math.isnan(found["micro_f1_se"])


def test_very_many_classes_have_no_errors_of_f1():
    labels = np.random.default_rng(0).random((3, 1025)) < 0.5
    counted = metrics.class_counts(labels, labels, np.ones(3, np.float32))
    assert "products" not in counted
    found = metrics.multi_label(counted | {"loss": 1.0, "correct": 3.0, "weight": 3.0})
    assert found["macro_f1"] == 1.0
    assert "macro_f1_se" not in found
