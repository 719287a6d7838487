"""The space that ``foreword tune`` searches: methods, initialisers, lengths and learning rates.

What stands first is tried first: the order is what did best on small data sets (docs/log.md).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from foreword.config import TuneConfig
from foreword.errors import ForewordError


@dataclass(frozen=True)
class Candidate:
    """One point of the space. ``lr`` 0 is the method's own."""

    method: str
    init: str
    virtual_tokens: int
    lr: float

    def __str__(self) -> str:
        """As in messages."""
        return f"{self.method} init={self.init} P={self.virtual_tokens} lr={self.lr:g}"


class Sampler(Protocol):
    """Proposes candidates and may learn from how they did."""

    def ask(self, count: int) -> list[Candidate]:
        """At most so many that were not asked for before."""

    def tell(self, candidate: Candidate, loss: float) -> None:
        """The loss of one of them on rows it was not trained on."""


class Listed:
    """The space in its own order: no two neighbours of one method, so that few candidates differ much."""

    def __init__(self, config: TuneConfig, rates: Mapping[str, float]) -> None:
        self._left = list(interleaved(candidates(config, rates)))

    def ask(self, count: int) -> list[Candidate]:
        """See ``Sampler``."""
        asked, self._left = self._left[:count], self._left[count:]
        return asked

    def tell(self, candidate: Candidate, loss: float) -> None:
        """See ``Sampler``; a list learns nothing."""


def candidates(config: TuneConfig, rates: Mapping[str, float]) -> list[Candidate]:
    """Every combination, in the order of the lists.

    Args:
        config: the lists; ``lr_factors`` multiply each method's own rate.
        rates: that rate, by method.
    """
    # The rate changes first: it moves the score more than the others do (docs/log.md).
    product = itertools.product(config.methods, config.inits, config.virtual_tokens, config.lr_factors)
    return [Candidate(method, init, tokens, round(rates[method] * f, 8)) for method, init, tokens, f in product]


def interleaved(found: Sequence[Candidate]) -> Iterator[Candidate]:
    """The first of every method, the second of every method, and so on."""
    by_method: dict[str, list[Candidate]] = {}
    for candidate in found:
        by_method.setdefault(candidate.method, []).append(candidate)
    for row in itertools.zip_longest(*by_method.values()):
        yield from (c for c in row if c is not None)


class Optuna:
    """The same space through optuna's tree-structured Parzen estimator (Bergstra et al. 2011)."""

    def __init__(self, config: TuneConfig, rates: Mapping[str, float], seed: int) -> None:
        try:
            import optuna
        except ImportError:
            fix = "pip install 'foreword[tune]', or tune.sampler=list"
            raise ForewordError("the sampler optuna needs the library optuna", "key tune.sampler", fix) from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._config, self._rates = config, rates
        self._study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=4))
        self._trials: dict[Candidate, Any] = {}

    def ask(self, count: int) -> list[Candidate]:
        """See ``Sampler``; rates are any between the smallest and the largest factor."""
        asked: list[Candidate] = []
        for _ in range(4 * count):  # it may propose one again
            trial = self._study.ask()
            found = self._candidate(trial)
            if found not in self._trials:
                self._trials[found] = trial
                asked.append(found)
            if len(asked) == count:
                break
        return asked

    def tell(self, candidate: Candidate, loss: float) -> None:
        """See ``Sampler``."""
        self._study.tell(self._trials[candidate], loss)

    def _candidate(self, trial: Any) -> Candidate:
        config = self._config
        method = trial.suggest_categorical("method", list(config.methods))
        low, high = min(config.lr_factors), max(config.lr_factors)
        factor = trial.suggest_float("lr_factor", low, high, log=True) if low < high else low
        return Candidate(
            method,
            trial.suggest_categorical("init", list(config.inits)),
            trial.suggest_categorical("virtual_tokens", list(config.virtual_tokens)),
            float(f"{self._rates[method] * factor:.3g}"),
        )
