"""95 % intervals: the bootstrap over rows, how far a confusion table's posterior reaches, and what folds hide.

Percentiles of resampled rows (Efron 1979) know no mistake that isn't there: of 32 rows that are all right every
resample is all right. So what a confusion table says has an interval that also reaches as far as the table's posterior
(Goutte & Gaussier 2005, ECIR). ``docs/log.md`` has how often each holds the truth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
LEVEL = 0.95

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


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


def occurring(confusion: Ints | Floats) -> NDArray[np.bool_]:
    """Classes ``[..., C]`` that a table ``[..., C, C]`` has rows of, truly or predicted."""
    found: NDArray[np.bool_] = (confusion.sum(-2) + confusion.sum(-1)) > 0
    return found


def tables(confusion: Ints, seed: int = 0) -> tuple[Ints, Floats]:
    """What the confusion table ``[C, C]`` could as well have been, twice ``[RESAMPLES, C, C]``.

    First the bootstrap: its rows drawn again. Then the posterior, a Dirichlet distribution over its cells, scaled to
    the same rows. The prior weighs one row, half of it right and half wrong, so that the accuracy's is that of Jeffreys
    (Brown, Cai & DasGupta 2001, Statistical Science 16, section 4.1).
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    n, occur = int(confusion.sum()), occurring(confusion)
    drawn = rng.multinomial(n, confusion.ravel() / n, RESAMPLES).reshape(-1, *confusion.shape)
    wrong = (occur[:, None] | occur) & ~np.eye(len(occur), dtype=bool)
    prior = 0.5 * wrong / wrong.sum() + 0.5 * np.diag(occur / occur.sum())
    believed = rng.standard_gamma(confusion + prior, (RESAMPLES, *confusion.shape))
    believed *= n / believed.sum((1, 2), keepdims=True)
    return drawn, believed


def reach(statistic: Callable[[Ints | Floats], Ints | Floats], confusion: Ints, drawn: tuple[Ints, Floats]) -> Floats:
    """95 % bounds ``[2, ...]`` of a statistic of tables: whichever of both kinds reaches further."""
    bounds = np.stack([_percentiles(statistic(t)) for t in drawn])
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
