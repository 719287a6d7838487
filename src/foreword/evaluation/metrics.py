"""Classification metrics and token loss, with their intervals.

Definitions as in scikit-learn (tests compare); expected calibration error with 15 bins as in
Guo et al. 2017 (arXiv 1706.04599).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foreword.evaluation.intervals import Floats, Ints, bootstrap, interval, occurring, reach, tables

BINS = 15


def confusion_matrix(truth: Ints, predicted: Ints, classes: int) -> Ints:
    """Counts ``[C, C]``: row = true class, column = predicted class."""
    return np.bincount(truth * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def accuracy(confusion: Ints) -> float:
    """Share of rows on the diagonal."""
    return float(_on_diagonal(confusion))


def precision_recall_f1(confusion: Ints | Floats) -> Floats:
    """``[..., C, 3]``: precision, recall and F1 of each class of tables ``[..., C, C]``; 0 where undefined."""
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    predicted, true = confusion.sum(-2), confusion.sum(-1)
    return np.stack([_ratio(hits, predicted), _ratio(hits, true), _ratio(2 * hits, predicted + true)], axis=-1)


def macro_f1(confusion: Ints) -> float:
    """Mean F1 over the classes that occur, truly or predicted."""
    return float(_mean_f1(confusion, confusion))


def _on_diagonal(confusion: Ints | Floats) -> Floats:
    return _ratio(np.trace(confusion, axis1=-2, axis2=-1), confusion.sum((-2, -1)))


def _mean_f1(confusion: Ints | Floats, observed: Ints) -> Floats:
    """Over the classes that occur both in it and in what was observed."""
    occur = occurring(confusion) & occurring(observed)
    return _ratio((precision_recall_f1(confusion)[..., 2] * occur).sum(-1), occur.sum(-1))


def _ratio(part: NDArray[Any], whole: NDArray[Any]) -> Floats:
    part, whole = np.asarray(part, dtype=float), np.asarray(whole, dtype=float)
    ratio: Floats = np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)
    return ratio


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


def classification_scores(truth: Sequence[int], probabilities: Floats, classes: Sequence[str]) -> dict[str, Any]:
    """Accuracy, macro-F1, per-class figures, confusion and calibration, each with its interval.

    Args:
        truth: class index of each row ``[n]``.
        probabilities: ``[n, C]``, each row summing to 1.
        classes: names, in the order of the columns.
    """
    y = np.asarray(truth, dtype=np.int64)
    n = len(y)
    confusion = confusion_matrix(y, probabilities.argmax(1), len(classes))
    drawn = tables(confusion)
    low, high = reach(lambda t: t, confusion, drawn)
    return {
        "n": n,
        "accuracy": accuracy(confusion),
        "macro_f1": macro_f1(confusion),
        "calibration_error": calibration_error(y, probabilities),
        "per_class": _per_class(classes, confusion, reach(precision_recall_f1, confusion, drawn)),
        "confusion": {
            "classes": list(classes),
            "counts": confusion.tolist(),
            "low": low.tolist(),
            "high": high.tolist(),
        },
        "intervals": {
            "accuracy": reach(_on_diagonal, confusion, drawn).tolist(),
            "macro_f1": reach(lambda t: _mean_f1(t, confusion), confusion, drawn).tolist(),
            "calibration_error": interval(n, lambda i: calibration_error(y[i], probabilities[i])),
        },
    }


def share_interval(right: NDArray[np.bool_]) -> list[float]:
    """``[low, high]`` of the share of rows ``[n]`` that are right."""
    confusion = np.array([[right.sum(), (~right).sum()], [0, 0]])
    bounds: list[float] = reach(_on_diagonal, confusion, tables(confusion)).tolist()
    return bounds


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
