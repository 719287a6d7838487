"""A candidate of ``foreword tune`` at a rung of its search."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from foreword.evaluation.biases import class_biases, helpful
from foreword.evaluation.evaluate import Outcome, pooled
from foreword.evaluation.metrics import point_scores
from foreword.tuning.ensemble import log_loss
from foreword.tuning.space import Candidate


@dataclass(frozen=True)
class Trial:
    """A candidate at a rung: what it did on rows it was not trained on, of all folds so far."""

    rung: int
    candidate: Candidate
    epochs: int
    folds: tuple[Outcome, ...]
    fresh: int
    """Folds of this rung."""
    seconds: float
    """Of this rung."""
    biasing: bool = False
    """Whether classes may have biases that the outcomes are without."""
    balance: float = 0.0
    """Of the rows' weights (``row_weights``) where biases are fitted and candidates compared."""
    fitted: tuple[float, ...] = ()
    """Those that the outcomes have already: of the classes, by all rows."""

    @cached_property
    def _pooled(self) -> Outcome:
        return pooled(self.folds)

    @cached_property
    def _biased(self) -> Outcome | None:
        return helpful(self._pooled, self.balance) if self.biasing else None

    @property
    def outcome(self) -> Outcome:
        """All folds pooled; where classes have biases, each row with those that were fitted without it."""
        return self._biased or self._pooled

    @property
    def biases(self) -> tuple[float, ...]:
        """Of the classes, by all folds, where they help; else none."""
        return class_biases(self._pooled, balance=self.balance) if self._biased else self.fitted

    @property
    def loss(self) -> float:
        """What candidates are compared by: of classes, else per target token."""
        table = self.outcome.probabilities
        if table is not None:
            return log_loss(self.outcome.truth, table, self.balance)
        return -sum(self.outcome.logprobs) / sum(self.outcome.target_tokens)

    def facts(self) -> dict[str, Any]:
        """For metrics.jsonl and the report."""
        table = self.outcome.probabilities
        scores = {"loss": self.loss, **(point_scores(self.outcome.truth, table) if table is not None else {})}
        named = {} if self.candidate.trained else {"method": "untrained", "init": "none"}
        return {"event": "trial", "rung": self.rung, **self.candidate.settings, **named,
                **self.candidate.wording, "epochs": self.epochs, **scores,
                "folds": len(self.folds), "seconds": round(self.seconds, 1)}  # fmt: skip
