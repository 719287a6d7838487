"""What a report tells: plain data, gathered by ``jobs/report.py``. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from foreword.artifact.sidecar import Sidecar

Point = tuple[float, float]
Near = tuple[str, float]
"""A vocabulary token as text, and its cosine or distance."""
Trial = Mapping[str, Any]
"""One training among several: ``init``, ``lr``, ``virtual_tokens``, ``method``, ``score``; where known ``rung``
(tuning), ``seed``, ``kept``."""


@dataclass(frozen=True)
class Curves:
    """What ``metrics.jsonl`` says, member by member ``[K]``; a run of one soft prompt has one member."""

    loss: Sequence[Sequence[Point]] = ()
    """(step, training loss in nats a target token)."""
    validation: Mapping[str, Sequence[Sequence[Point]]] = field(default_factory=dict)
    """The same of each validation score, by its name."""
    kept: int = 0
    steps_per_epoch: int = 1


@dataclass(frozen=True)
class Bin:
    """Rows whose likeliest class has a probability in one of the reliability diagram's bins."""

    rows: int
    confidence: float
    """Mean probability of the class it said."""
    accuracy: float


@dataclass(frozen=True)
class WrongRow:
    """A scored row that got a wrong class."""

    number: int
    text: str
    truth: str
    said: str
    p_truth: float
    p_said: float


@dataclass(frozen=True)
class Sample:
    """A scored row of a free-text task."""

    number: int
    text: str
    target: str
    wrote: str
    loss: float
    """Of its target, nats a token."""


@dataclass(frozen=True)
class VirtualToken:
    """One virtual token; what could not be told is empty or None."""

    by_cosine: Sequence[Near] = ()
    by_distance: Sequence[Near] = ()
    moved: float | None = None
    """L2 distance from its start."""
    moved_share: float | None = None
    """The same as a share of the start's norm."""


@dataclass(frozen=True)
class LeftOut:
    """The soft prompt without one virtual token after the other, on some of the scored rows."""

    rows: int
    scored: int
    loss: float
    """With all virtual tokens, nats a target token, on the same rows."""
    accuracy: float | None
    loss_change: Mapping[int, float]
    """By virtual token, counted from 0: loss without it less loss with all."""
    loss_interval: Mapping[int, tuple[float, float]]
    """Its 95 % bootstrap interval over the rows read."""
    accuracy_change: Mapping[int, float]
    trained_on: bool = False
    """Whether the soft prompt was trained on these rows (cross-validation)."""


@dataclass(frozen=True)
class Spread:
    """Several trainings side by side. ``measure`` says in words what ``score`` is, ``lower`` that less is better."""

    trials: Sequence[Trial] = ()
    measure: str = "score"
    lower: bool = False


@dataclass(frozen=True)
class ReportFacts:
    """Everything on one page."""

    name: str
    sidecar: Sidecar
    kind: str
    """``rows`` or ``prefix``."""
    tokens: Sequence[VirtualToken]
    curves: Curves = Curves()
    bins: Sequence[Bin] = ()
    wrong: Sequence[WrongRow] = ()
    wrong_count: int = 0
    samples: Sequence[Sample] = ()
    left_out: LeftOut | None = None
    spread: Spread = Spread()
    recipe: str = ""
    """As YAML."""
    changed: Mapping[str, Any] = field(default_factory=dict)
    """Keys that differ from their defaults."""
