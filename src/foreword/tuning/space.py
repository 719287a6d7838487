"""The space that ``foreword tune`` searches: methods, initialisers, lengths and learning rates.

What stands first is tried first: the order is what did best on small data sets (docs/log.md).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from foreword.config import TuneConfig
from foreword.errors import ForewordError

SIDE_BY_SIDE = 2
"""Methods whose rates are tried in turn."""
SHOWN = 6
"""Most label words of a wording on the terminal."""


@dataclass(frozen=True)
class Candidate:
    """One point of the space. ``lr`` 0: it stays as it begins."""

    method: str
    init: str
    virtual_tokens: int
    lr: float
    template: str = ""
    """Of a wording of its own, with ``words`` for the classes; empty: the search's."""
    words: tuple[str, ...] = ()

    @property
    def trained(self) -> bool:
        """Whether it takes steps."""
        return self.lr > 0

    @property
    def settings(self) -> dict[str, Any]:
        """How it is trained."""
        return {"method": self.method, "init": self.init, "virtual_tokens": self.virtual_tokens, "lr": self.lr}

    @property
    def wording(self) -> dict[str, Any]:
        """Its own, if it has one."""
        return {"template": self.template, "words": list(self.words)} if self.template else {}

    def __str__(self) -> str:
        """As in messages."""
        if not self.trained:
            asked = f", {shown(self.template, self.words)}" if self.template else ""
            return f"the model as it is, P={self.virtual_tokens}{asked}"
        return f"{self.method} init={self.init} P={self.virtual_tokens} lr={self.lr:g}"


UNTRAINED = Candidate("prompt-tuning", "text", 1, 0.0)
"""The model as it is, behind one virtual token that says nothing: all that is fitted is a bias for each class."""
UNTRAINED_TEXT = "\n"


def shown(template: str, words: Sequence[str]) -> str:
    """A wording in messages."""
    return f"{template!r} with {', '.join(words[:SHOWN])}{', ...' if len(words) > SHOWN else ''}"


@dataclass(frozen=True)
class Known:
    """What a method says itself: its learning rate; initialiser and length where it has its own."""

    lr: float
    init: str = ""
    virtual_tokens: int = 0


Judged = TypeVar("Judged")


def survivors(
    found: Sequence[Judged], count: int, loss: Callable[[Judged], float], method: Callable[[Judged], str]
) -> list[Judged]:
    """So many of what was tried: the best of every method as far as it goes, then the best of the others.

    One fold of few rows ranks methods badly, and different ones make the better ensemble (docs/log.md).
    """
    ranked = sorted(found, key=loss)
    best = {method(one): one for one in reversed(ranked)}
    return sorted(ranked, key=lambda one: one is not best[method(one)])[:count]


class Sampler(Protocol):
    """Proposes candidates and may learn from how they did."""

    def ask(self, count: int) -> list[Candidate]:
        """At most so many that were not asked for before."""

    def tell(self, candidate: Candidate, loss: float) -> None:
        """The loss of one of them on rows it was not trained on."""


class Listed:
    """The space as its lists go: the rates of a start, of two methods in turn, then other methods and starts."""

    def __init__(self, config: TuneConfig, known: Mapping[str, Known]) -> None:
        self._left = list(in_turn(candidates(config, known), len(config.lr_factors)))

    def ask(self, count: int) -> list[Candidate]:
        """See ``Sampler``."""
        asked, self._left = self._left[:count], self._left[count:]
        return asked

    def tell(self, candidate: Candidate, loss: float) -> None:
        """See ``Sampler``; a list learns nothing."""


def candidates(config: TuneConfig, known: Mapping[str, Known]) -> list[Candidate]:
    """Every combination, in the order of the lists.

    Args:
        config: the lists; ``lr_factors`` multiply each method's own rate.
        known: what the methods say themselves.
    """
    found = []
    for name in config.methods:
        own = known[name]
        inits = (own.init,) if own.init else config.inits
        lengths = (own.virtual_tokens,) if own.virtual_tokens else config.virtual_tokens
        # The rate changes first: it moves the score more than the others do (docs/log.md).
        product = itertools.product(inits, lengths, config.lr_factors)
        found += [Candidate(name, init, tokens, round(own.lr * f, 8)) for init, tokens, f in product]
    return found


def in_turn(found: Sequence[Candidate], rates: int) -> Iterator[Candidate]:
    """The first block of ``rates`` candidates of every method, the second of every method, and so on.

    Methods go two by two, rate by rate: an ensemble wants two that differ (docs/log.md).
    """
    by_method: dict[str, list[Candidate]] = {}
    for candidate in found:
        by_method.setdefault(candidate.method, []).append(candidate)
    methods = list(by_method.values())
    for at in range(0, max(map(len, methods)), rates):
        for first in range(0, len(methods), SIDE_BY_SIDE):
            blocks = [mine[at : at + rates] for mine in methods[first : first + SIDE_BY_SIDE]]
            for turn in itertools.zip_longest(*blocks):
                yield from filter(None, turn)


class Optuna:
    """The same space through optuna's tree-structured Parzen estimator (Bergstra et al. 2011)."""

    def __init__(self, config: TuneConfig, known: Mapping[str, Known], seed: int) -> None:
        try:
            import optuna
        except ImportError:
            fix = "pip install 'foreword[tune]', or tune.sampler=list"
            raise ForewordError("the sampler optuna needs the library optuna", "key tune.sampler", fix) from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._config, self._known = config, known
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
        own = self._known[method]
        return Candidate(
            method,
            own.init or trial.suggest_categorical("init", list(config.inits)),
            own.virtual_tokens or trial.suggest_categorical("virtual_tokens", list(config.virtual_tokens)),
            float(f"{own.lr * factor:.3g}"),
        )
