"""How ``foreword tune`` puts the question: label words and the text before them, chosen before the search.

On the 50 RAFT complaints rows the wording moves macro-F1 more than method or learning rate (docs/log.md). Choices are
compared by what the plain model says of rows that had no part in them, the last two by what a training makes of them.
A template that somebody wrote stays.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from foreword.backbone.load import Backbone
from foreword.config import DataConfig, Recipe
from foreword.data.raft import is_task, read_task
from foreword.data.template import default_template, with_closing
from foreword.evaluation.biases import PLAIN, biased_by_others, logarithms
from foreword.evaluation.evaluate import run_plain
from foreword.evaluation.scoring import Floats
from foreword.evaluation.words import learnt_words, next_logprobs
from foreword.jobs.data import Splits
from foreword.jobs.prepare import make_encoder
from foreword.jobs.training import say
from foreword.records import Table, Task
from foreword.tuning.ensemble import beyond_chance, weighted_losses
from foreword.tuning.space import Candidate, shown

CLOSINGS = ("\nThis is", "\nThis is a", "\nIt is about", "\nOverall, it is", "\nType:", "\nTopic:")
"""What may stand behind the text instead of a closing that nobody chose."""
ROWS = 128
"""Most rows that are looked at."""
LETTERS = 3
"""Least length of a learnt word."""
OTHERS = 3
"""Wordings beside the chosen one in which the model as it is may be a member, where all rows are looked at."""

Fold = tuple[list[int], list[int]]


class Free(NamedTuple):
    """What may be chosen: the text behind the last column, and the label words."""

    closing: bool
    words: bool


@dataclass(frozen=True)
class Wording:
    """A template with label words: ``words`` of all rows, ``fold_words`` as the rows of each fold give them."""

    template: str
    words: tuple[str, ...]
    fold_words: tuple[tuple[str, ...], ...]
    seconds: float = 0.0
    """That it took to find."""
    trained: str = ""
    """Name of the trainings in it, if they are those of the search's first candidate on its folds."""
    trained_seconds: float = 0.0
    """That those took."""

    def __str__(self) -> str:
        """As on the terminal."""
        return shown(self.template, self.words)

    @property
    def key(self) -> tuple[str, tuple[str, ...]]:
        """What it is known by."""
        return self.template, self.words

    def task(self, task: Task) -> Task:
        """The task in this wording."""
        return replace(task, template=self.template, words=self.words)

    def asked(self, candidate: Candidate) -> Candidate:
        """A candidate in this wording instead of the search's."""
        return replace(candidate, template=self.template, words=self.words)


@dataclass(frozen=True)
class Judged:
    """A wording and its weighted losses ``[n]`` of rows left out, in nats."""

    wording: Wording
    losses: Floats

    def __str__(self) -> str:
        """As on the terminal."""
        return f"loss {self.losses.mean():.3f}: {self.wording}"


def settle_wording(
    recipe: Recipe, splits: Splits, backbone: Backbone, folds: Sequence[Fold],
    decided: Callable[[str, Callable[[], dict[str, Any]]], dict[str, Any]],
    trained: Callable[[str, Wording, Sequence[Fold]], Floats], console: Console,
) -> list[Wording]:  # fmt: skip
    """The wording of a search, given or better by what its rows say; then ``OTHERS`` at most that do next best.

    Args:
        recipe: of the search.
        splits: its rows.
        backbone: the model.
        folds: training and held-out rows of each fold.
        decided: takes a decision once, for all processes and for a resumed search.
        trained: trains the first candidate in a wording, by this name; gives the weighted losses of the rows left out.
        console: is told what was compared.
    """
    task, data = splits.task, recipe.data
    free = Free(unsaid_template(data) == task.template, not data.label_words)
    if recipe.tune.wording == "given" or not task.classifies or not any(free):
        return [Wording(task.template, task.words, (task.words,) * len(folds))]

    def decide() -> dict[str, Any]:
        began, looked = time.monotonic(), thinned(folds)
        say(console, "wording: what the plain model says of rows left out")
        found = compared(backbone, task, splits.train, looked, free, recipe.tune.balance)
        ranked = sorted(found, key=_loss)
        for judged in ranked:
            say(console, f"  {judged}")

        def after_training(name: str, judged: Judged) -> Judged:
            start, wording = time.monotonic(), judged.wording
            losses = trained(name, wording, looked)
            if looked == folds:
                wording = replace(wording, trained=name, trained_seconds=round(time.monotonic() - start, 1))
            again = Judged(wording, losses)
            say(console, f"  {again}")
            return again

        best, *rival = finalists(found, task)
        if rival:
            say(console, "wording: what a soft prompt that was trained in it says")
            best = preferred(after_training("own", best), after_training("learnt", rival[0]))
        say(console, f"wording: {best.wording}")
        chosen = replace(best.wording, seconds=round(time.monotonic() - began, 1))
        # Many rows choose well, and asking the plain model takes a pass a wording and fold.
        others = [j.wording for j in ranked if j.wording.key != chosen.key][: OTHERS if looked == folds else 0]
        return {"wordings": [asdict(w) for w in (chosen, *others)]}

    return [Wording(**{k: _tuples(v) for k, v in w.items()}) for w in decided("wording", decide)["wordings"]]


def unsaid_template(data: DataConfig) -> str:
    """The template that rows have which nobody wrote one for."""
    folder = Path(data.path).expanduser()
    return read_task(folder).template if data.path and is_task(folder) else default_template(data.text or "")


def thinned(folds: Sequence[Fold]) -> list[Fold]:
    """The folds with at most ``ROWS`` rows in all, of each fold the same share."""
    count = sum(len(out) for _, out in folds)
    looked = {i for _, out in folds for i in out[:: -(-count // ROWS)]}
    return [([i for i in keep if i in looked], [i for i in out if i in looked]) for keep, out in folds]


def compared(
    backbone: Backbone, task: Task, table: Table, folds: Sequence[Fold], free: Free, balance: float
) -> list[Judged]:
    """All wordings, the given one first.

    Args:
        backbone: the model.
        task: as given.
        table: the training rows.
        folds: training and held-out rows of each fold.
        free: what may be others.
        balance: of the rows' weights (``row_weights``).
    """
    templates = [task.template, *(with_closing(task.template, c) for c in CLOSINGS if free.closing)]
    found: list[Judged] = []
    for template in dict.fromkeys(templates):
        found += _Trial(backbone, replace(task, template=template), table, folds, balance).wordings(free.words)
    return found


def finalists(found: Sequence[Judged], task: Task) -> list[Judged]:
    """The best with the task's own words, and the best of all if it has learnt ones and is better by more than chance.

    So much for the plain model: training may turn it round, as it does on TREC (docs/log.md). So both are trained, and
    the plain model has no say any more: on SST-2 it liked words that chance had taught it ("error", "Fantasy").
    """
    own = min((j for j in found if j.wording.words == task.words), key=_loss)
    best = min(found, key=_loss)
    return [own] if preferred(own, best) is own else [own, best]


def preferred(own: Judged, learnt: Judged) -> Judged:
    """The one with the task's own words, unless the other is better by more than chance: many were tried."""
    return learnt if beyond_chance(own.losses - learnt.losses) else own


def _tuples(value: Any) -> Any:
    """Lists of JSON, as tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _loss(judged: Judged) -> float:
    return float(judged.losses.mean())


class _Trial:
    """One template: the given words and the learnt ones on it."""

    def __init__(self, backbone: Backbone, task: Task, table: Table, folds: Sequence[Fold], balance: float) -> None:
        self.backbone, self.task, self.balance = backbone, task, balance
        rows = sorted(i for _, out in folds for i in out)
        place = {row: i for i, row in enumerate(rows)}
        self.folds = [([place[i] for i in keep], [place[i] for i in out]) for keep, out in folds]
        self.encoder = make_encoder(task, backbone, 0)
        self.examples = self.encoder.examples(table.pick(rows))
        self.labels = [e.label or 0 for e in self.examples]
        self.names = [ids[0] for ids in self.encoder.label_ids]
        """First token of each class's words as given."""

    def wordings(self, learnt: bool) -> list[Judged]:
        """Each, judged."""
        outcome = run_plain(self.backbone, self.examples, self.encoder.label_ids, "rows")
        assert outcome.probabilities is not None, "the task has classes"
        given = logarithms(outcome.probabilities)
        same = (self.task.words,) * len(self.folds)
        found = [self._judged(self.task.words, same, [given] * len(self.folds))]
        if learnt:
            table = next_logprobs(self.backbone, [e.context for e in self.examples])
            whole = self._learnt(table, range(len(self.labels)))
            parts = [self._learnt(table, keep) for keep, _ in self.folds]
            words, fold_words = self._texts(whole), [self._texts(p) for p in parts]
            if words != self.task.words:  # else there are too few rows of each class to learn any
                found.append(self._judged(words, fold_words, [table[:, p] for p in parts]))
        return found

    def _judged(
        self, words: tuple[str, ...], fold_words: Sequence[tuple[str, ...]], scores: Sequence[Floats]
    ) -> Judged:
        said = biased_by_others(scores, self.labels, self.folds, PLAIN, self.balance)
        losses = weighted_losses(self.labels, said, self.balance)
        return Judged(Wording(self.task.template, words, tuple(fold_words)), losses)

    def _learnt(self, table: Floats, rows: Sequence[int]) -> list[int]:
        return learnt_words(table[list(rows)], [self.labels[i] for i in rows], self.names, self._usable)

    def _usable(self, token: int) -> bool:
        word = self._text(token)
        return len(word) >= LETTERS and word.isalpha() and self.encoder.target_ids(word)[:-1] == (token,)

    def _text(self, token: int) -> str:
        return str(self.backbone.tokenizer.decode([token])).strip()

    def _texts(self, tokens: Sequence[int]) -> tuple[str, ...]:
        return tuple(
            name if token == first else self._text(token)
            for name, token, first in zip(self.task.words, tokens, self.names, strict=True)
        )
