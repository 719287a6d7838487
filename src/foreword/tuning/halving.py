"""How a budget of trainings is spent: rungs of successive halving, then the members.

Successive halving (Jamieson & Talwalkar 2016, arXiv 1502.07943): many candidates train a little, the better ones
longer. A candidate costs ``folds - 1`` trainings at each rung, as every fold is left out once; a unit is one training
on all rows for all epochs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SEARCH_SHARE = 0.55
"""Of the budget; the rest trains the members on all rows."""
ETA = 3
"""One candidate in so many goes on to the next rung, which trains so many times longer."""
FIRST_EPOCHS = 1 / 3
"""Share of the epochs at the first of two rungs."""


@dataclass(frozen=True)
class Rung:
    """So many candidates, each trained for so many epochs on all rows but a fold's, fold by fold."""

    candidates: int
    epochs: int


@dataclass(frozen=True)
class Budget:
    """What is affordable."""

    rungs: tuple[Rung, ...]
    members: int

    def units(self, folds: int, epochs: int) -> float:
        """What it costs, in trainings on all rows."""
        search = sum(r.candidates * cost(r.epochs, epochs, folds) for r in self.rungs)
        return search + self.members


def cost(spent: int, epochs: int, folds: int) -> float:
    """What a candidate costs that trains ``spent`` of ``epochs`` without each fold, in trainings on all rows."""
    return (folds - 1) * spent / epochs


def plan(units: float, space: int, epochs: int, folds: int, members: int) -> Budget:
    """Rungs and members for a budget; at least two candidates, each a third of the epochs, and one member.

    Args:
        units: trainings on all rows that are affordable.
        space: candidates there are.
        epochs: of a whole training.
        folds: of the cross-validation.
        members: the most that are wanted.
    """
    first = max(1, math.ceil(epochs * FIRST_EPOCHS))
    little, whole = cost(first, epochs, folds), cost(epochs, epochs, folds)
    wanted = space * little + math.ceil(space / ETA) * whole
    share = min(units * SEARCH_SHARE, wanted)
    kept = max(1, min(members, math.floor(units - share)))
    share = max(share, units - kept)
    count = round(share / (little + whole / ETA))  # one in ETA trains for all epochs as well
    count = max(2, min(count, space)) if space > 1 else 1
    if count == 1:
        return Budget((Rung(1, epochs),), kept)
    return Budget((Rung(count, first), Rung(max(1, count // ETA), epochs)), kept)
