"""Classification metrics with bootstrap intervals.

Definitions as in scikit-learn (tests compare); expected calibration error with 15 bins as in
Guo et al. 2017 (arXiv 1706.04599); intervals by the percentile bootstrap over rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
LEVEL = 0.95
BINS = 15

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def confusion_matrix(truth: Ints, predicted: Ints, classes: int) -> Ints:
    """Counts ``[C, C]``: row = true class, column = predicted class."""
    return np.bincount(truth * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def accuracy(confusion: Ints) -> float:
    """Share of rows on the diagonal."""
    return float(np.trace(confusion) / max(confusion.sum(), 1))


def precision_recall_f1(confusion: Ints) -> Floats:
    """``[C, 3]``: precision, recall and F1 of each class; 0 where undefined."""
    hits = np.diag(confusion).astype(float)
    predicted, true = confusion.sum(0), confusion.sum(1)
    precision = hits / np.maximum(predicted, 1)
    recall = hits / np.maximum(true, 1)
    f1 = 2 * hits / np.maximum(predicted + true, 1)
    return np.stack([precision, recall, f1], axis=1)


def macro_f1(confusion: Ints) -> float:
    """Mean F1 over the classes that occur, truly or predicted."""
    present = (confusion.sum(0) + confusion.sum(1)) > 0
    return float(precision_recall_f1(confusion)[present, 2].mean())


def calibration_error(truth: Ints, probabilities: Floats) -> float:
    """Expected calibration error of the predicted class's probability."""
    counts, confidence, correct = reliability(truth, probabilities)
    return float(np.abs((confidence - correct)[counts > 0]).sum() / len(truth))


def reliability(truth: Ints, probabilities: Floats) -> tuple[Ints, Floats, Floats]:
    """Bin by bin ``[BINS]``: rows, the sum of the predicted class's probabilities, and rows that were right."""
    confidence = probabilities.max(1)
    correct = (probabilities.argmax(1) == truth).astype(float)
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    counts, said, right = (np.bincount(bins, w, BINS).astype(float) for w in (None, confidence, correct))
    return counts.astype(np.int64), said, right


def bootstrap(n: int, statistic: Callable[[Ints], Any], seed: int = 0) -> Floats:
    """95 % percentile-bootstrap bounds ``[2, ...]`` (low, high) of a statistic of row indices ``[n]``."""
    rng = np.random.Generator(np.random.PCG64(seed))
    values = [statistic(rng.integers(0, n, n)) for _ in range(RESAMPLES)]
    tail = (1 - LEVEL) / 2
    bounds: Floats = np.quantile(np.asarray(values, dtype=float), [tail, 1 - tail], axis=0)
    return bounds


def interval(n: int, statistic: Callable[[Ints], float], seed: int = 0) -> list[float]:
    """The same of one number: ``[low, high]``."""
    bounds: list[float] = bootstrap(n, statistic, seed).tolist()
    return bounds


def classification_scores(truth: Sequence[int], probabilities: Floats, classes: Sequence[str]) -> dict[str, Any]:
    """Accuracy, macro-F1, per-class figures, confusion and calibration, each with its interval.

    Args:
        truth: class index of each row ``[n]``.
        probabilities: ``[n, C]``, each row summing to 1.
        classes: names, in the order of the columns.
    """
    y = np.asarray(truth, dtype=np.int64)
    predicted = probabilities.argmax(1)

    def of(i: Ints) -> Ints:
        return confusion_matrix(y[i], predicted[i], len(classes))

    n = len(y)
    confusion = of(np.arange(n))
    low, high = bootstrap(n, of)
    return {
        "n": n,
        "accuracy": accuracy(confusion),
        "macro_f1": macro_f1(confusion),
        "calibration_error": calibration_error(y, probabilities),
        "per_class": _per_class(classes, confusion, bootstrap(n, lambda i: precision_recall_f1(of(i)))),
        "confusion": {
            "classes": list(classes),
            "counts": confusion.tolist(),
            "low": low.tolist(),
            "high": high.tolist(),
        },
        "intervals": {
            "accuracy": interval(n, lambda i: accuracy(of(i))),
            "macro_f1": interval(n, lambda i: macro_f1(of(i))),
            "calibration_error": interval(n, lambda i: calibration_error(y[i], probabilities[i])),
        },
    }


def for_new_rows(scores: Mapping[str, Any], folds: int) -> dict[str, Any]:
    """Cross-validated scores with intervals as they hold for what is trained on all rows and scored on new ones.

    Folds are trained on much the same rows, so their scores vary together; the bootstrap over rows does not see that.
    The variance grows by ``1 + k / (k - 1)`` for ``k`` folds (Nadeau & Bengio 2003, Machine Learning 52, section 4).

    Args:
        scores: with the key ``intervals``, ``{name: [low, high]}``; accuracy, F1 and errors stay within 0 and 1.
        folds: of the cross-validation, ``k``.
    """
    by = math.sqrt(1 + folds / (folds - 1))

    def wider(name: str, low: float, high: float) -> list[float]:
        value, most = scores[name], math.inf if name in ("loss", "perplexity") else 1.0
        return [max(0.0, value - by * (value - low)), min(most, value + by * (high - value))]

    return {**scores, "intervals": {name: wider(name, *bounds) for name, bounds in scores["intervals"].items()}}


def point_scores(truth: Sequence[int], probabilities: Floats) -> dict[str, float]:
    """Accuracy and macro-F1 alone, without intervals: what validation asks for every epoch."""
    confusion = confusion_matrix(np.asarray(truth, dtype=np.int64), probabilities.argmax(1), probabilities.shape[1])
    return {"accuracy": accuracy(confusion), "macro_f1": macro_f1(confusion)}


def _per_class(classes: Sequence[str], confusion: Ints, bounds: Floats) -> dict[str, Any]:
    """Rows, precision, recall and F1 of each class; ``bounds`` is ``[2, C, 3]``."""
    table, names = precision_recall_f1(confusion), ("precision", "recall", "f1")
    return {
        name: {
            "n": int(confusion[c].sum()),
            **dict(zip(names, table[c].tolist(), strict=True)),
            "intervals": dict(zip(names, bounds[:, c].T.tolist(), strict=True)),
        }
        for c, name in enumerate(classes)
    }


def token_loss(logprobs: Sequence[float], tokens: Sequence[int]) -> dict[str, Any]:
    """Loss over target tokens (not rows, not batches) and perplexity, with their intervals.

    Args:
        logprobs: summed log-probability of each row's target ``[n]``.
        tokens: tokens of each target, end token included ``[n]``.
    """
    sums, counts = np.asarray(logprobs, dtype=float), np.asarray(tokens, dtype=float)

    def loss(i: Ints) -> float:
        return float(-sums[i].sum() / counts[i].sum())

    bounds = bootstrap(len(sums), loss)
    value = loss(np.arange(len(sums)))
    return {
        "loss": value,
        "perplexity": _exp(value),
        "intervals": {"loss": bounds.tolist(), "perplexity": [_exp(x) for x in bounds]},
    }


def _exp(x: float) -> float:
    return float(np.exp(min(x, 700.0)))  # beyond lies infinity, which JSON has no word for
