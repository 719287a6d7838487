"""How a budget of trainings is spent: rungs of successive halving, then the members.

Successive halving (Jamieson & Talwalkar 2016, arXiv 1502.07943) with folds as its resource: all candidates are judged
by one fold, the better ones by the others too. Every training is whole: cut short, it flatters high learning rates
(docs/log.md). A unit is one training on all rows; leaving a fold out makes it that much cheaper, and so does a search
that reads only some of the rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SEARCH_SHARE = 0.55
"""Of the budget; the rest trains the members on all rows."""
ETA = 5 / 3
"""One candidate in so many goes on to the other folds: one fold of few rows ranks them badly (docs/log.md)."""
LEAST = 2
"""So many go on at least: one fold of few rows is too little to choose by."""


@dataclass(frozen=True)
class Rung:
    """So many candidates, each trained without so many of the folds, in turn."""

    candidates: int
    folds: int


@dataclass(frozen=True)
class Budget:
    """What is affordable."""

    rungs: tuple[Rung, ...]
    members: int
    share: float = 1.0
    """What a training on the rows of the search costs, in trainings on all rows."""

    def units(self, folds: int) -> float:
        """What it costs, in trainings on all rows."""
        return sum(r.candidates * self.share * cost(r.folds, folds) for r in self.rungs) + self.members


def cost(left_out: int, folds: int) -> float:
    """What training without each of so many of the ``folds`` costs, in trainings on the rows of all of them."""
    return left_out * (folds - 1) / folds


def plan(units: float, space: int, folds: int, members: int, share: float = 1.0) -> Budget:
    """Rungs and members for a budget; at least two candidates and one member.

    Args:
        units: trainings on all rows that are affordable.
        space: candidates there are.
        folds: of the cross-validation.
        members: the most that are wanted.
        share: what a training on the rows of the search costs, in trainings on all rows.
    """

    def search(count: int) -> float:
        return Budget(_rungs(count, folds), 0, share).units(folds)

    count = min(LEAST, space)
    least, wanted = search(count), search(space)
    kept = max(1, min(members, math.floor(units - max(least, min(units * SEARCH_SHARE, wanted)))))
    while count < space and search(count + 1) <= max(least, units - kept):
        count += 1
    return Budget(_rungs(count, folds), kept, share)


def _rungs(candidates: int, folds: int) -> tuple[Rung, ...]:
    kept = min(candidates, max(LEAST, math.ceil(candidates / ETA)))
    return Rung(candidates, 1), Rung(kept, folds - 1)
