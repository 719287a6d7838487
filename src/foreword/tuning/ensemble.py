"""Which soft prompts are averaged, and how often each: shares by expectation-maximisation, with a prior.

The shares under which the mean's out-of-fold probabilities are likeliest (Smyth & Wolpert 1999, "Linearly combining
density estimators via stacking", Machine Learning 36). Few rows rank candidates badly, so a Dirichlet prior draws the
shares together: by the rows alone some ensembles of 32 rows were a single, bad candidate (docs/log.md).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
TINY = 1e-6
"""Least probability of the true class in a loss: a single sure mistake must not decide."""
PRIOR_ROWS = 12
"""Rows that the prior weighs as much as, in all."""
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


def row_weights(truth: Sequence[int], balance: float) -> Floats:
    """How much each row counts ``[n]``, 1 on average.

    Args:
        truth: class of each row ``[n]``.
        balance: a row counts by the number of rows of its class to the power of minus this. 0: all rows the same;
            1: all classes the same.
    """
    each = np.bincount(truth)[np.asarray(truth, dtype=np.int64)] ** -float(balance)
    found: Floats = each * (len(each) / each.sum())
    return found


def weighted_losses(truth: Sequence[int], probabilities: Floats, balance: float) -> Floats:
    """``log_losses`` as much as each row counts ``[n]``; see ``row_weights``."""
    found: Floats = log_losses(truth, probabilities) * row_weights(truth, balance)
    return found


def log_loss(truth: Sequence[int], probabilities: Floats, balance: float = 0.0) -> float:
    """The mean of ``weighted_losses``."""
    return float(weighted_losses(truth, probabilities, balance).mean())


def beyond_chance(gains: Floats) -> bool:
    """Whether the mean of what each row gains ``[n]`` is above its standard error."""
    return bool(gains.mean() > gains.std(ddof=1) / len(gains) ** 0.5)


def prior_shares(kinds: Sequence[object]) -> Floats:
    """What each candidate's share is before a row is seen ``[K]``: equal between kinds ``[K]``, and within each.

    So that many wordings of one model do not outvote a few trainings by their number.
    """
    counts = Counter(kinds)
    return np.array([1 / (len(counts) * counts[kind]) for kind in kinds])


def shares(
    truth: Sequence[int], tables: Sequence[Floats], prior_rows: float = PRIOR_ROWS, balance: float = 0.0,
    kinds: Sequence[object] = (),
) -> Floats:  # fmt: skip
    """Weight of each candidate in the mean ``[K]``, above 0 and 1 in all.

    Args:
        truth: class of each row ``[n]``.
        tables: out-of-fold probabilities of each candidate ``[n, C]``.
        prior_rows: rows that say nothing but what ``prior_shares`` does.
        balance: of the rows' weights, see ``row_weights``.
        kinds: of each candidate ``[K]``; none: all are of one.
    """
    each = np.array([likelihoods(truth, t) for t in tables])
    rows, prior = row_weights(truth, balance), prior_shares(kinds or (None,) * len(tables))
    weights = prior
    for _ in range(STEPS):
        joint = weights[:, None] * each
        counts = (joint / joint.sum(axis=0) * rows).sum(axis=1) + prior_rows * prior
        weights = counts / counts.sum()
    return weights


def select(
    truth: Sequence[int], tables: Sequence[Floats], count: int, balance: float = 0.0, kinds: Sequence[object] = ()
) -> list[int]:
    """Indices of ``count`` members, the first the best alone; some may stand there several times.

    The rest have places by their shares (Webster's method): the first of them are what fewer members would be.
    See ``shares`` for the arguments.
    """
    weights = shares(truth, tables, balance=balance, kinds=kinds)
    chosen = [int(np.argmin([log_loss(truth, t, balance) for t in tables]))]
    while len(chosen) < count:
        places = np.bincount(chosen, minlength=len(tables))
        chosen.append(int(np.argmax(weights / (2 * places + 1))))
    return chosen
