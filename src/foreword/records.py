"""The plain records that pass between layers. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Row = Mapping[str, Any]
"""One row of the user's data: column name -> value."""


@dataclass(frozen=True)
class Table:
    """Rows of one source, with what the source says about them.

    ``numbers[i]`` is the number of row ``i`` for messages: 1 for the first data row.
    """

    rows: tuple[Row, ...]
    columns: tuple[str, ...]
    origin: str
    numbers: tuple[int, ...]
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Names of integer labels by column, where the source declares them (ClassLabel)."""

    def pick(self, indices: Sequence[int]) -> Table:
        """The table of the rows at these indices, in this order."""
        return Table(
            tuple(self.rows[i] for i in indices),
            self.columns,
            self.origin,
            tuple(self.numbers[i] for i in indices),
            self.class_names,
        )

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Segment:
    """One example as token ids: a context and the continuations scored after it.

    Training has one branch (the target with its end token); scoring has one per class. Ids at or
    above the vocabulary are virtual tokens.
    """

    context: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]
    soft: tuple[tuple[tuple[int, ...], tuple[float, ...]], ...] = ()
    """For each token of the only branch, instead of it: likely tokens and their probabilities (distillation)."""

    @property
    def tokens(self) -> int:
        """Tokens of the context and of all branches."""
        return len(self.context) + sum(map(len, self.branches))


@dataclass(frozen=True)
class Example:
    """A labelled row, encoded: ``label`` is its class index, ``None`` for free text."""

    number: int
    context: tuple[int, ...]
    target: tuple[int, ...]
    label: int | None = None
    text: str = ""
    """The target as text (what a perfect model would say)."""

    @property
    def segment(self) -> Segment:
        """The example as training sees it: the target is its only branch."""
        return Segment(self.context, (self.target,))


@dataclass(frozen=True)
class Task:
    """What a soft prompt was trained to do: kept in the sidecar, enough to encode new rows."""

    template: str
    separator: str
    label_column: str
    classes: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    """Label words of each class, in the classes' order; empty for free-text targets."""
    max_length: int = 0
    names: tuple[str, ...] = ()
    """Names of integer labels by value, hidden ones such as "Unlabeled" included; may be empty."""
    placement: str = "front"
    """Where virtual tokens stand, if the template does not say it: front, after-bos or end."""
    biases: tuple[float, ...] = ()
    """Added to the log-probability of each class, in nats, before the classes are compared; empty: none."""

    @property
    def classifies(self) -> bool:
        """Whether targets are classes (else free text)."""
        return bool(self.classes)
