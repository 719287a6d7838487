"""Classification metrics with intervals.

Definitions as in scikit-learn (tests compare); expected calibration error with 15 bins as in
Guo et al. 2017 (arXiv 1706.04599). Intervals are 95 % percentile bootstraps over rows. Of what a confusion table says
they also reach as far as the table's posterior does (Goutte & Gaussier 2005, ECIR): of 32 rows that are all right every
resample is all right, and the bootstrap alone would promise 1.0. ``docs/log.md`` has how often each holds the truth.
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
    occur = _occurring(confusion) & _occurring(observed)
    return _ratio((precision_recall_f1(confusion)[..., 2] * occur).sum(-1), occur.sum(-1))


def _occurring(confusion: Ints | Floats) -> NDArray[np.bool_]:
    occurring: NDArray[np.bool_] = (confusion.sum(-2) + confusion.sum(-1)) > 0
    return occurring


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


def bootstrap(n: int, statistic: Callable[[Ints], Any], seed: int = 0) -> Floats:
    """95 % percentile-bootstrap bounds ``[2, ...]`` (low, high) of a statistic of row indices ``[n]``."""
    rng = np.random.Generator(np.random.PCG64(seed))
    values = [statistic(rng.integers(0, n, n)) for _ in range(RESAMPLES)]
    return _percentiles(np.asarray(values, dtype=float))


def _percentiles(values: Ints | Floats) -> Floats:
    """95 % bounds ``[2, ...]`` of values ``[RESAMPLES, ...]``."""
    tail = (1 - LEVEL) / 2
    bounds: Floats = np.quantile(values, [tail, 1 - tail], axis=0)
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
    n = len(y)
    confusion = confusion_matrix(y, probabilities.argmax(1), len(classes))
    tables = _tables(confusion)
    low, high = _reach(lambda t: t, confusion, tables)
    return {
        "n": n,
        "accuracy": accuracy(confusion),
        "macro_f1": macro_f1(confusion),
        "calibration_error": calibration_error(y, probabilities),
        "per_class": _per_class(classes, confusion, _reach(precision_recall_f1, confusion, tables)),
        "confusion": {
            "classes": list(classes),
            "counts": confusion.tolist(),
            "low": low.tolist(),
            "high": high.tolist(),
        },
        "intervals": {
            "accuracy": _reach(_on_diagonal, confusion, tables).tolist(),
            "macro_f1": _reach(lambda t: _mean_f1(t, confusion), confusion, tables).tolist(),
            "calibration_error": interval(n, lambda i: calibration_error(y[i], probabilities[i])),
        },
    }


def share_interval(right: NDArray[np.bool_]) -> list[float]:
    """``[low, high]`` of the share of rows ``[n]`` that are right."""
    confusion = np.array([[right.sum(), (~right).sum()], [0, 0]])
    bounds: list[float] = _reach(_on_diagonal, confusion, _tables(confusion)).tolist()
    return bounds


def _tables(confusion: Ints, seed: int = 0) -> tuple[Floats, Floats]:
    """What the confusion table ``[C, C]`` could as well have been, twice ``[RESAMPLES, C, C]``.

    First the bootstrap: its rows drawn again. Then the posterior, a Dirichlet distribution over its cells, scaled to
    the same rows. The prior weighs one row, half of it right and half wrong, so that the accuracy's is that of Jeffreys
    (Brown, Cai & DasGupta 2001, Statistical Science 16, section 4.1).
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    n, occur = int(confusion.sum()), _occurring(confusion)
    drawn = rng.multinomial(n, confusion.ravel() / n, RESAMPLES).reshape(-1, *confusion.shape)
    wrong = (occur[:, None] | occur) & ~np.eye(len(occur), dtype=bool)
    prior = 0.5 * wrong / wrong.sum() + 0.5 * np.diag(occur / occur.sum())
    believed = rng.standard_gamma(confusion + prior, (RESAMPLES, *confusion.shape))
    believed *= n / believed.sum((1, 2), keepdims=True)
    return drawn.astype(float), believed


def _reach(
    statistic: Callable[[Ints | Floats], Ints | Floats], confusion: Ints, tables: tuple[Floats, Floats]
) -> Floats:
    """95 % bounds ``[2, ...]`` of a statistic of tables: whichever of both kinds reaches further."""
    bounds = np.stack([_percentiles(statistic(t)) for t in tables])
    value = statistic(confusion)  # the posterior of what is all right ends below it
    return np.stack([np.minimum(bounds[:, 0].min(0), value), np.maximum(bounds[:, 1].max(0), value)])


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
