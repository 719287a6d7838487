"""Which soft prompts are averaged: greedy selection with replacement (Caruana et al. 2004, ICML).

Chosen on out-of-fold probabilities: starting from nothing, the candidate is added whose addition lowers the loss of
the mean most; who is added twice gets twice the weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
TINY = 1e-6
"""Least probability of the true class in a loss: a single sure mistake must not decide."""


def log_losses(truth: Sequence[int], probabilities: Floats) -> Floats:
    """Negative log-probability of each row's true class ``[n]``, in nats; ``probabilities`` ``[n, C]``."""
    own = probabilities[np.arange(len(truth)), np.asarray(truth)]
    found: Floats = -np.log(np.maximum(own, TINY))
    return found


def log_loss(truth: Sequence[int], probabilities: Floats) -> float:
    """Their mean."""
    return float(log_losses(truth, probabilities).mean())


def beyond_chance(gains: Floats) -> bool:
    """Whether the mean of what each row gains ``[n]`` is above its standard error."""
    return bool(gains.mean() > gains.std(ddof=1) / len(gains) ** 0.5)


def select(truth: Sequence[int], tables: Sequence[Floats], count: int) -> list[int]:
    """Indices of ``count`` members, the first the best alone; some may stand there several times.

    Args:
        truth: class of each row ``[n]``.
        tables: out-of-fold probabilities of each candidate ``[n, C]``.
        count: members wanted.
    """
    chosen: list[int] = []
    total = np.zeros_like(tables[0])
    for _ in range(count):
        losses = [log_loss(truth, (total + t) / (len(chosen) + 1)) for t in tables]
        best = int(np.argmin(losses))
        chosen.append(best)
        total = total + tables[best]
    return chosen


def mean_table(tables: Sequence[Floats], chosen: Sequence[int]) -> Floats:
    """Mean probabilities of the chosen ``[n, C]``."""
    found: Floats = np.mean([tables[i] for i in chosen], axis=0)
    return found
