"""Metrics as sums and weights: added up over batches, devices and hosts, divided once at the end.

A standard error needs more than a sum: tokens of one row say much the same, so rows are what is independent. While
evaluating, a loss hands over each row's sums, and `row_moments` keeps what the errors of their ratios need.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Sums = Mapping[str, Any]  # name -> float, or float64 array such as a confusion matrix


def language_model(sums: Sums) -> dict[str, float]:
    """Turns the sums of a language-model loss into what is reported.

    Args:
      sums: `loss` (nats), `correct` and `weight` (scored tokens), each added over all tokens; with `row_moments` of the
        three also their standard errors.

    Returns:
      `loss` (nats per token), `perplexity` and `accuracy` (share of tokens whose highest logit was right); with moments
      of two rows or more `loss_se`, `perplexity_se` (delta method) and `accuracy_se`.
    """
    loss = ratio(sums, "loss")
    result = {"loss": loss, "perplexity": perplexity(loss), "accuracy": ratio(sums, "correct")}
    if sums.get("rows", 0) >= 2:
        result["loss_se"] = ratio_error(sums, "loss")
        result["perplexity_se"] = result["perplexity"] * result["loss_se"]
        result["accuracy_se"] = ratio_error(sums, "correct")
    return result


def classification(sums: Sums) -> dict[str, float]:
    """Turns the sums of a classifier's loss into what is reported.

    Args:
      sums: `loss` (nats), `weight` (scored rows) and `confusion` (from the function of that name), added over all rows;
        with `row_moments` of `loss` and `weight` also the loss's standard error.

    Returns:
      `loss` (nats per row), `accuracy` with `accuracy_se` (binomial: `sqrt(p (1 - p) / n)`), `micro_f1` (which equals
      the accuracy where each row has one label) and `macro_f1`: the mean over the classes that occur as a label or as
      a prediction. `micro_f1_se` is that of the accuracy, `macro_f1_se` by the delta method over the matrix's cells.
      With moments of two rows or more also `loss_se`.
    """
    confusion = np.asarray(sums["confusion"], np.float64)
    n, right = confusion.sum(), np.diag(confusion)
    labelled, predicted = confusion.sum(axis=1), confusion.sum(axis=0)
    occurs = labelled + predicted > 0
    f1 = 2 * right[occurs] / (labelled + predicted)[occurs]
    accuracy = float(right.sum() / n) if n else math.nan
    result = {
        "loss": ratio(sums, "loss"),
        "accuracy": accuracy,
        "accuracy_se": math.sqrt(accuracy * (1 - accuracy) / n) if n else math.nan,
        "micro_f1": accuracy,
        "macro_f1": float(f1.mean()) if n else math.nan,
        "macro_f1_se": _macro_f1_error(confusion) if n else math.nan,
    }
    result["micro_f1_se"] = result["accuracy_se"]
    if sums.get("rows", 0) >= 2:
        result["loss_se"] = ratio_error(sums, "loss")
    return result


def multi_label(sums: Sums) -> dict[str, float]:
    """Turns the sums of a classifier of rows that may have several classes into what is reported.

    Args:
      sums: `loss` (nats), `correct` (rows with all classes right), `weight` (scored rows), `counts` and, for errors of
        F1, `products` (from `class_counts`), added over all rows; with `row_moments` of `loss` and `weight` also the
        loss's standard error.

    Returns:
      `loss` (nats per row and class), `accuracy` with `accuracy_se` (binomial), of whole sets of classes; `micro_f1`,
      of all classes of all rows together, and `macro_f1`, the mean over the classes that occur as a label or as a
      prediction, each with its error by linearisation, rows as the independent units. With moments of two rows or more
      also `loss_se`.
    """
    n = float(sums["weight"])
    right, labelled, told = np.asarray(sums["counts"], np.float64)
    size = labelled + told
    occurs = size > 0
    total, classes = size.sum(), max(occurs.sum(), 1)
    f1 = np.where(occurs, 2 * right / np.where(occurs, size, 1.0), 0.0)
    micro = 2 * right.sum() / total if total else math.nan
    macro = f1.sum() / classes if total else math.nan
    accuracy = ratio(sums, "correct")
    # What a row adds to an F1, in first order: 2 / size for each hit, -F1 / size for each label and each prediction.
    shares = np.where(occurs, 1 / np.where(occurs, size, 1.0), 0.0) / classes
    by_class = np.concatenate([2 * shares, -f1 * shares])
    together = np.repeat([2 / total, -micro / total] if total else [math.nan] * 2, len(size))
    result = {
        "loss": ratio(sums, "loss"),
        "accuracy": accuracy,
        "accuracy_se": math.sqrt(accuracy * (1 - accuracy) / n) if n else math.nan,
        "micro_f1": float(micro),
        "macro_f1": float(macro),
    }
    for name, slope in (("micro_f1_se", together), ("macro_f1_se", by_class)) if "products" in sums else ():
        known = n >= 2 and total
        square = float(slope @ np.asarray(sums["products"], np.float64) @ slope)
        result[name] = math.sqrt(max(square, 0.0) * n / (n - 1)) if known else math.nan
    if sums.get("rows", 0) >= 2:
        result["loss_se"] = ratio_error(sums, "loss")
    return result


def _macro_f1_error(confusion: np.ndarray) -> float:
    """Standard error of macro F1: rows are independent draws of a cell, and each cell moves the F1 of two classes."""
    n, right = confusion.sum(), np.diag(confusion)
    counted = confusion.sum(axis=1) + confusion.sum(axis=0)
    occurs = counted > 0
    size = np.where(occurs, counted, 1.0)
    slope = np.where(occurs, -2 * right / size**2, 0.0)  # of a class's F1, by a row that is labelled or told so
    gradient = slope[:, None] + slope[None, :] + np.diag(np.where(occurs, 2 / size, 0.0))
    gradient *= n / max(occurs.sum(), 1)
    share = confusion / n
    return math.sqrt(max(float((share * gradient**2).sum() - (share * gradient).sum() ** 2), 0.0) / n)


def ratio(sums: Sums, name: str, weight: str = "weight") -> float:
    """`sums[name] / sums[weight]`, not a number where nothing was scored."""
    return float(sums[name] / sums[weight]) if sums[weight] else math.nan


def ratio_error(sums: Sums, name: str, weight: str = "weight") -> float:
    """Standard error of `ratio`, by linearisation, with rows as the independent units.

    The sandwich of a ratio of sums: with each row's remainder `d = value - ratio * weight`, the variance is
    `n / (n - 1) * sum(d^2) / sum(weight)^2`. It is what a bootstrap over rows finds (tests/test_metrics.py).

    Args:
      sums: with the `row_moments` of both names.
      name: the numerator.
      weight: the denominator.

    Returns:
      The error; not a number for fewer than two rows or where nothing was scored.
    """
    return sum_of_ratios_error(sums, [(name, weight)])


def sum_of_ratios_error(sums: Sums, ratios: Sequence[tuple[str, str]]) -> float:
    """`ratio_error` of the sum of several ratios, each of a numerator and its denominator, of the same rows."""
    n = float(sums["rows"])
    if n < 2 or any(math.isnan(ratio(sums, *one)) for one in ratios):
        return math.nan
    # A row's remainder is linear in its sums: name -> its factor.
    factors: dict[str, float] = {}
    for name, weight in ratios:
        factors[name] = factors.get(name, 0.0) + 1 / float(sums[weight])
        factors[weight] = factors.get(weight, 0.0) - ratio(sums, name, weight) / float(sums[weight])
    squares = sum(f * g * float(sums[_product(a, b)]) for a, f in factors.items() for b, g in factors.items())
    return math.sqrt(max(squares, 0.0) * n / (n - 1))


def row_moments(rows: Mapping[str, np.ndarray]) -> dict[str, np.float64]:
    """What errors of ratios need of each row's sums, itself to be added over batches.

    In float64, on the host: remainders are small differences of large products, which float32 would lose.

    Args:
      rows: name -> `[B]`, each row's own sum; a row of padding is 0 in all.

    Returns:
      The sum of each name, of the product of every two names, and `rows`, how many rows were not all 0.
    """
    values = {name: np.asarray(value, np.float64) for name, value in rows.items()}
    moments = {name: value.sum() for name, value in values.items()}
    for a, b in itertools.combinations_with_replacement(sorted(values), 2):
        moments[_product(a, b)] = values[a] @ values[b]
    moments["rows"] = np.float64(np.any([value != 0 for value in values.values()], axis=0).sum())
    return moments


def row_sums(values: Mapping[str, jax.Array], weights: jax.Array) -> dict[str, jax.Array]:
    """Each row's weighted sums, for `row_moments`.

    Args:
      values: name -> float32 `[B, T]`, of each token.
      weights: float32 `[B, T]`, 0 = not scored.

    Returns:
      Each name and `weight`: float32 `[B]`.
    """
    sums = {name: jnp.sum(value * weights, axis=1) for name, value in values.items()}
    return sums | {"weight": jnp.sum(weights, axis=1)}


def confusion(labels: jax.Array, predictions: jax.Array, weights: jax.Array, n_classes: int) -> jax.Array:
    """How often each label got each prediction.

    Args:
      labels: int32 `[N]`, from 0 to `n_classes - 1`.
      predictions: int32 `[N]`, the same.
      weights: float32 `[N]`, 0 = not scored.
      n_classes: C.

    Returns:
      float32 `[C, C]`, labels down, predictions across.
    """
    classes = jnp.arange(n_classes)
    labelled = (labels[:, None] == classes) * weights[:, None]
    # In full precision: matrix units round to fewer bits, and weights need not be whole.
    return jnp.matmul(labelled.T, (predictions[:, None] == classes).astype(jnp.float32), precision="highest")


def is_better(name: str, value: float, best: float | None) -> bool:
    """Whether a metric is better than the best so far (None = none yet); what is not finite never is.

    Losses, perplexity and bits per byte are better where they are lower, everything else where it is higher.
    """
    if not math.isfinite(value) or best is None:
        return math.isfinite(value)
    lower = name.endswith("loss") or name in ("perplexity", "bits_per_byte")
    return value < best if lower else value > best


def by_class(sums: Sums, names: Sequence[str]) -> dict[str, Any]:
    """What the sums of a classifier say of each class, JSON-ready.

    Args:
      sums: with `confusion` or, where rows may have several classes, with `counts`; of any other task nothing is said.
      names: of all classes.

    Returns:
      `classes`, an object for each with its `name`, how many rows are of it (`labelled`), are told so (`predicted`) and
      are both (`right`), and its `f1` (None where it occurs nowhere); with `confusion` also that: for each class as a
      label, in how many rows each was told.
    """
    found: dict[str, Any] = {}
    if "confusion" in sums:
        confusion = np.rint(np.asarray(sums["confusion"])).astype(int)
        right, labelled, told = (x.tolist() for x in (np.diag(confusion), confusion.sum(1), confusion.sum(0)))
        found["confusion"] = confusion.tolist()
    elif "counts" in sums:
        right, labelled, told = np.rint(np.asarray(sums["counts"])).astype(int).tolist()
    else:
        return found
    found["classes"] = [
        {"name": name, "labelled": n, "predicted": m, "right": k, "f1": 2 * k / (n + m) if n + m else None}
        for name, n, m, k in zip(names, labelled, told, right, strict=True)
    ]
    return found


def class_counts(labels: jax.Array, predictions: jax.Array, weights: jax.Array) -> dict[str, jax.Array]:
    """What the F1 of classes, of which a row may have several, and their errors need.

    Args:
      labels: bool `[N, C]`.
      predictions: bool `[N, C]`.
      weights: float32 `[N]`, 0 = not scored.

    Returns:
      `counts`, float32 `[3, C]`: rows that are of a class and told so, that are of it, that are told so; and for up to
      1,024 classes `products`, float32 `[2 C, 2 C]`: with a row's vector of hits, then of labels and predictions
      together, the sum over rows of its products with itself.
    """
    hits, size = labels & predictions, labels.astype(jnp.float32) + predictions
    found = {"counts": jnp.stack([jnp.sum(one * weights[:, None], axis=0) for one in (hits, labels, predictions)])}
    if labels.shape[1] <= 1024:  # beyond, it would be larger than many a model
        both = jnp.concatenate([hits.astype(jnp.float32), size], axis=1)
        found["products"] = jnp.matmul((both * weights[:, None]).T, both, precision="highest")
    return found


def perplexity(loss: float) -> float:
    """`exp` of nats per token; infinite where that overflows."""
    return math.inf if loss >= 700 else math.exp(loss)


def bits_per_byte(loss: float, tokens: float, n_bytes: float) -> float:
    """Nats per token as bits per byte of the text that those tokens spell: comparable across tokenizers."""
    return loss * tokens / (n_bytes * math.log(2))


def _product(a: str, b: str) -> str:
    """The name of the sum of products of two names."""
    return "*".join(sorted((a, b)))
