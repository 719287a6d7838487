"""Which soft prompts are averaged, and how often each: shares by expectation-maximisation, with a prior for equal ones.

The shares under which the mean's out-of-fold probabilities are likeliest (Smyth & Wolpert 1999, "Linearly combining
density estimators via stacking", Machine Learning 36). Few rows rank candidates badly, so a Dirichlet prior draws the
shares together: by the rows alone some ensembles of 32 rows were a single, bad candidate (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
TINY = 1e-6
"""Least probability of the true class in a loss: a single sure mistake must not decide."""
PRIOR_ROWS = 12
"""Rows that the prior for equal shares weighs as much as, in all."""
STEPS = 300
"""Of expectation-maximisation."""


def likelihoods(truth: Sequence[int], probabilities: Floats) -> Floats:
    """Probability of each row's true class ``[n]``, at least ``TINY``; ``probabilities`` ``[n, C]``."""
    found: Floats = np.maximum(probabilities[np.arange(len(truth)), np.asarray(truth)], TINY)
    return found


def log_losses(truth: Sequence[int], probabilities: Floats) -> Floats:
    """Negative logarithms of ``likelihoods`` ``[n]``, in nats."""
    found: Floats = -np.log(likelihoods(truth, probabilities))
    return found


def log_loss(truth: Sequence[int], probabilities: Floats) -> float:
    """Their mean."""
    return float(log_losses(truth, probabilities).mean())


def beyond_chance(gains: Floats) -> bool:
    """Whether the mean of what each row gains ``[n]`` is above its standard error."""
    return bool(gains.mean() > gains.std(ddof=1) / len(gains) ** 0.5)


def shares(truth: Sequence[int], tables: Sequence[Floats], prior_rows: float = PRIOR_ROWS) -> Floats:
    """Weight of each candidate in the mean ``[K]``, above 0 and 1 in all.

    Args:
        truth: class of each row ``[n]``.
        tables: out-of-fold probabilities of each candidate ``[n, C]``.
        prior_rows: rows that say nothing but that all are as good.
    """
    each = np.array([likelihoods(truth, t) for t in tables])
    weights = np.full(len(tables), 1 / len(tables))
    for _ in range(STEPS):
        joint = weights[:, None] * each
        counts = (joint / joint.sum(axis=0)).sum(axis=1) + prior_rows / len(tables)
        weights = counts / counts.sum()
    return weights


def select(truth: Sequence[int], tables: Sequence[Floats], count: int) -> list[int]:
    """Indices of ``count`` members, the first the best alone; some may stand there several times.

    The rest have places by their shares (Webster's method): the first of them are what fewer members would be.
    See ``shares`` for the arguments.
    """
    weights = shares(truth, tables)
    chosen = [int(np.argmin([log_loss(truth, t) for t in tables]))]
    while len(chosen) < count:
        places = np.bincount(chosen, minlength=len(tables))
        chosen.append(int(np.argmax(weights / (2 * places + 1))))
    return chosen
