"""The model as it is, as a candidate of ``foreword tune``: nothing is trained, and classes have biases by the rows.

Calibration with labelled rows, as in Zhao et al. 2021 (arXiv 2102.09690, who have none). What is left is one virtual
token that says nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from foreword.config import Recipe
from foreword.data.template import parse
from foreword.evaluation.biases import PLAIN, class_biases
from foreword.evaluation.evaluate import Outcome
from foreword.jobs.candidates import Workshop
from foreword.jobs.trial import Trial
from foreword.records import Task
from foreword.tuning.space import Candidate


def untrained_too(recipe: Recipe, task: Task) -> bool:
    """Whether the model as it is is a candidate: not where text is written or the virtual tokens have a place."""
    in_front = recipe.prompt.placement == "front" and not parse(task.template).soft_tokens
    return recipe.tune.untrained == "auto" and task.classifies and in_front


def untrained_trial(
    workshop: Workshop, candidate: Candidate, folds: Sequence[tuple[Sequence[int], Sequence[int]]],
    fold_words: Sequence[tuple[str, ...]],
) -> Trial:  # fmt: skip
    """What it says of each fold's rows, with biases by its other rows and in the words that these teach.

    Args:
        workshop: backbone, rows and the task.
        candidate: ``UNTRAINED``, in whatever wording.
        folds: training and held-out rows of each.
        fold_words: label words of each fold.
    """
    began, words_of_all, tune = time.monotonic(), workshop.words(candidate), workshop.recipe.tune

    def biases_by(outcome: Outcome) -> tuple[float, ...]:
        return class_biases(outcome, PLAIN, tune.balance) if tune.biases == "auto" else ()

    rows = [row for _, out in folds for row in out]
    place = {row: i for i, row in enumerate(rows)}
    said = {words: workshop.untrained(candidate, rows, words) for words in dict.fromkeys((*fold_words, words_of_all))}
    outcomes = []
    for (keep, out), words in zip(folds, fold_words, strict=True):
        others, mine = (said[words].rows([place[row] for row in part]) for part in (keep, out))
        outcomes.append(mine.rebalanced(biases_by(others)))
    biases = biases_by(said[words_of_all])
    seconds = time.monotonic() - began
    return Trial(0, candidate, 0, tuple(outcomes), len(folds), seconds, balance=tune.balance, fitted=biases)
