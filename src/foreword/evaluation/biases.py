"""A bias for each class, added to its log-probability: on few rows a model leans to one class more than it errs.

The maximum of the posterior of a logistic regression that has intercepts alone, with the label words' log-probabilities
as offsets. After Zhao et al. 2021 (arXiv 2102.09690), who fit biases without labelled rows, and King & Zeng 2001
("Logistic Regression in Rare Events Data", prior correction and weighting).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from foreword.evaluation.evaluate import Outcome
from foreword.evaluation.scoring import Floats, softmax
from foreword.tuning.ensemble import beyond_chance, row_weights, weighted_losses

TRAINED, PLAIN = 1.0, 5.0
"""Standard deviations of a bias before a row is seen, in nats: of a soft prompt, and of the plain model, which may lean
to a class by any amount. On 12 trainings of 50 rows each deviation from 0.5 to 5 lowers the loss alike, and none of
12 losses rises by more than 0.01."""
STEPS, SETTLED = 2000, 1e-6
"""Most steps of a fit, and nats of a step that is the last."""
PARTS = 5
"""Of rows that are each left out once."""
SMALLEST = 1e-30
"""Probability that a logarithm is taken of, at least."""


def fitted_biases(scores: Floats, labels: Sequence[int], deviation: float = TRAINED, balance: float = 0.0) -> Floats:
    """The likeliest biases ``[C]`` of classes, in nats; they sum to 0.

    Args:
        scores: log-probabilities ``[n, C]``, up to a constant a row, by who was not trained on these rows.
        labels: class index of each row.
        deviation: of the normal distribution that a bias is drawn from.
        balance: of the rows' weights, see ``row_weights``.
    """
    if not len(labels):
        return np.zeros(scores.shape[1])
    weights = row_weights(labels, balance)
    counts = np.bincount(labels, weights, minlength=scores.shape[1])
    biases = np.zeros(scores.shape[1])
    # No second derivative is above this (Böhning 1992), so that no step leads downhill.
    steepest = len(scores) / 2 + deviation**-2
    for _ in range(STEPS):
        step = (counts - weights @ softmax(scores + biases) - biases / deviation**2) / steepest
        biases += step
        if np.abs(step).max() < SETTLED:
            break
    return biases


def says_shares(counts: Sequence[int]) -> bool:
    """Whether rows of each class ``[C]`` say how often a class comes: not if somebody drew the same number of each."""
    return max(counts) - min(counts) > 1


def class_biases(outcome: Outcome, deviation: float = TRAINED, balance: float = 0.0) -> tuple[float, ...]:
    """The biases of a classifier by its outcome on rows that it was not trained on; none of free text.

    See ``fitted_biases`` for the arguments.
    """
    if outcome.probabilities is None:
        return ()
    return tuple(fitted_biases(logarithms(outcome.probabilities), outcome.truth, deviation, balance).tolist())


def biased_by_others(
    tables: Sequence[Floats], labels: Sequence[int], folds: Sequence[tuple[Sequence[int], Sequence[int]]],
    deviation: float = TRAINED, balance: float = 0.0,
) -> Floats:  # fmt: skip
    """Probabilities ``[n, C]`` of rows with biases that were fitted without them.

    Args:
        tables: log-probabilities ``[n, C]`` as each fold has them.
        labels: class index of each row.
        folds: of each, the rows that its biases are fitted on and those that get them.
        deviation: see ``fitted_biases``.
        balance: see ``row_weights``.
    """
    found = np.zeros_like(tables[0])
    for (keep, out), table in zip(folds, tables, strict=True):
        biases = fitted_biases(table[keep], [labels[i] for i in keep], deviation, balance)
        found[out] = softmax(table[out] + biases)
    return found


def cross_biased(outcome: Outcome, balance: float = 0.0) -> Outcome:
    """The outcome with biases: those of a row are fitted without it, on four fifths of the rows.

    The parts have the classes' shares. Free text stays as it is.
    """
    if outcome.probabilities is None:
        return outcome
    part = np.argsort(np.argsort(outcome.truth, kind="stable"), kind="stable") % PARTS
    folds = [(np.flatnonzero(part != k).tolist(), np.flatnonzero(part == k).tolist()) for k in range(PARTS)]
    tables = [logarithms(outcome.probabilities)] * PARTS
    return replace(outcome, probabilities=biased_by_others(tables, outcome.truth, folds, balance=balance))


def helpful(outcome: Outcome, balance: float = 0.0) -> Outcome | None:
    """The outcome with biases (``cross_biased``) if they lower the weighted loss by more than a standard error."""
    if outcome.probabilities is None or len(outcome.truth) < PARTS:
        return None
    found = cross_biased(outcome, balance)
    assert found.probabilities is not None
    before, after = (weighted_losses(outcome.truth, o, balance) for o in (outcome.probabilities, found.probabilities))
    return found if beyond_chance(before - after) else None


def logarithms(probabilities: Floats) -> Floats:
    """Log-probabilities, finite where one is 0."""
    found: Floats = np.log(np.maximum(probabilities, SMALLEST))
    return found
