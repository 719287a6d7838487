"""From rows alone to one good, honest answer: search by cross-validation, then an ensemble trained on all rows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from foreword.artifact.atomic import write_atomic
from foreword.backbone.load import Backbone, load_backbone
from foreword.checks import check, check_tune
from foreword.config import Recipe
from foreword.data.labels import label_names
from foreword.data.raft import filled_in
from foreword.data.splits import k_folds, sample
from foreword.errors import ForewordError
from foreword.evaluation.biases import says_shares
from foreword.evaluation.evaluate import pooled
from foreword.evaluation.scoring import Floats
from foreword.evaluation.together import averaged
from foreword.jobs.candidates import Done, Task, Workshop, grouped, read_done
from foreword.jobs.crew import Crew, OneByOne, Ranks, RayWorkers
from foreword.jobs.data import Splits, read_splits
from foreword.jobs.proposals import proposals
from foreword.jobs.train import begun, check_names, mark_started
from foreword.jobs.training import say
from foreword.jobs.trial import Trial
from foreword.jobs.tuned import Expected, Made, write_tuned
from foreword.jobs.untrained import untrained_too, untrained_trial
from foreword.jobs.wording import Fold, Wording, settle_wording
from foreword.parallel.world import ALONE, World
from foreword.records import Row
from foreword.training.progress import METRICS
from foreword.tuning.ensemble import select, weighted_losses
from foreword.tuning.halving import Budget, Rung, cost, plan
from foreword.tuning.space import UNTRAINED, Candidate, survivors

SEARCH = "search"
SEED_STRIDE = 1000
"""Between the seeds of two searches: their members share none."""


Shared = tuple[Task, list[int]]
"""A task of several candidates, and which of those proposed they are."""


def tune(
    recipe: Recipe,
    out: Path,
    resume: bool = False,
    console: Console | None = None,
    rows: Sequence[Row] | None = None,
    eval_rows: Sequence[Row] | None = None,
) -> Backbone:
    """Searches, trains the winners on all rows, scores and writes a run; returns the backbone.

    Args:
        recipe: all choices; what the ``tune`` section lists is searched.
        out: the run folder; new or empty unless ``resume``.
        resume: go on with the search in ``out``.
        console: where progress goes; None: nowhere.
        rows: training rows in memory, instead of ``recipe.data.path``.
        eval_rows: held-out rows in memory. They are scored at the end and choose nothing.
    """
    console = console or Console(quiet=True)
    recipe = replace(recipe, data=filled_in(recipe.data))
    check(recipe)
    check_tune(recipe)
    check_names(recipe)
    splits = read_splits(recipe.data, rows, eval_rows)
    splits = replace(splits, task=replace(splits.task, placement=recipe.prompt.placement))
    if len(splits.train) < recipe.tune.folds:
        what = f"{len(splits.train)} rows cannot be parted in {recipe.tune.folds}"
        raise ForewordError(what, "key tune.folds", "give more rows, or tune.folds=2")
    with begun(recipe, splits.data_hash, out, resume) as (world, folder):
        search = _Search(recipe, splits, folder, console if world.first else Console(quiet=True), world)
        mark_started(recipe, splits.data_hash, folder)
        search.run()
    return replace(search.workshop.backbone, world=ALONE)


class _Search:
    """One search in its folder; each of several processes runs it, and they decide the same."""

    def __init__(self, recipe: Recipe, splits: Splits, out: Path, console: Console, world: World) -> None:
        self.recipe, self.splits, self.out, self.console, self.world = recipe, splits, out, console, world.waiting
        together = world.layout.sharded
        backbone = load_backbone(recipe.model, world if together else ALONE)
        task, table = splits.task, splits.train
        labels = label_names(table, task.label_column, task.names) if task.classifies else [""] * len(table)
        self.searched = sample(labels, recipe.tune.rows, recipe.tune.seed)
        self.folds = [
            ([self.searched[i] for i in keep], [self.searched[i] for i in out])
            for keep, out in k_folds([labels[i] for i in self.searched], recipe.tune.folds, recipe.tune.seed)
        ]
        self.workshop = Workshop(recipe, splits, backbone, console)
        self.sampler, self.size, self.first = proposals(recipe, self.workshop)
        self.wording, *self.other_wordings = settle_wording(
            recipe, splits, backbone, self.folds, self._decided, self._losses_in, self.console
        )
        self.splits = replace(splits, task=self.wording.task(task))
        self.workshop = Workshop(recipe, self.splits, backbone, console)
        self.crew = self._crew(together)
        counts = [labels.count(name) for name in set(labels)]
        self.biasing = recipe.tune.biases == "auto" and says_shares(counts)
        self.share = self._rows_read(len(self.searched)) / self._rows_read(len(table))
        self.trials: list[Trial] = []

    def run(self) -> None:
        """Search, members, scores, files."""
        budget = self._budget()
        found = self._first_rung(budget.rungs[0])
        for number, rung in enumerate(self._later_rungs(budget), start=1):
            kept = survivors(found, rung.candidates, lambda t: t.loss, lambda t: t.candidate.method)
            found = self._rung(number, kept, rung.folds)
        found += self._untrained()
        chosen = self._chosen(found, self._affordable(budget))
        members = self._members(found, chosen)
        if not (self.world.first or self.world.layout.sharded):
            return  # what is left to do is the first process's
        order = [i for _, out in self.folds for i in out]
        together = averaged([found[i].outcome for i in chosen])
        expected = Expected(together, found[chosen[0]].outcome, order, len(self.folds), self._protocol())
        write_tuned(self.workshop, self.out, members, expected, [t.facts() for t in self.trials])

    def _losses_in(self, name: str, wording: Wording, folds: Sequence[Fold]) -> Floats:
        """Weighted losses of the rows left out, fold by fold, after the first candidate was trained in a wording."""
        task = wording.task(self.splits.task)
        workshop = Workshop(self.recipe, replace(self.splits, task=task), self.workshop.backbone, self.console)
        outcomes = []
        for number, fold in enumerate(folds):
            one = self._first_task(name, number, fold, wording.fold_words[number])
            done = workshop.carry_out(one, self.out / SEARCH / one.name)
            done.write(self.out / SEARCH / one.name)
            outcomes += done.outcomes
        found = pooled(outcomes)
        assert found.probabilities is not None, "the task has classes"
        return weighted_losses(found.truth, found.probabilities, self.recipe.tune.balance)

    def _first_task(self, name: str, number: int, fold: Fold, words: tuple[str, ...]) -> Task:
        """The first candidate in a wording of this name, as a search on the rows of the folds trains it."""
        keep, out = fold
        epochs, group = self.workshop.epochs(len(keep) + len(out)), ((self.first, self.recipe.tune.seed),)
        folder, title = f"wording/{name}/fold-{number + 1}", f"wording, fold {number + 1}"
        return Task(folder, group, tuple(keep), tuple(out), epochs, title, words)

    def _rows_read(self, rows: int) -> int:
        """In a whole training on so many."""
        return rows * self.workshop.epochs(rows)

    def _crew(self, together: bool) -> Crew:
        tune = self.recipe.tune
        if tune.ray:
            return RayWorkers(self.recipe, self.splits, tune.ray, tune.ray_workers)
        return Ranks(self.workshop, self.world) if self.world.several and not together else OneByOne(self.workshop)

    def _budget(self) -> Budget:
        """Rungs and members that the budget allows, decided once by the time that the first candidate takes."""
        config = self.recipe.tune

        def decide() -> dict[str, Any]:
            second = self.workshop.unit_seconds(self.first)
            units = self._seconds / second if config.minutes else config.trainings
            found = plan(units, self.size, config.folds, self._most_members(), self.share)
            return {"unit_seconds": second, "units": units, "rungs": [asdict(r) for r in found.rungs],
                    "members": found.members}  # fmt: skip

        facts = self._decided("budget", decide)
        budget = Budget(tuple(Rung(**r) for r in facts["rungs"]), facts["members"], self.share)
        start, *later = budget.rungs
        rungs = "".join(f", the best {r.candidates} on {r.folds} more" for r in later)
        count = len(self.splits.train)
        of = "" if len(self.searched) == count else f" of {len(self.searched)} rows"
        say(self.console, f"a training on all {count} rows takes about {facts['unit_seconds']:.0f} s: "
            f"{start.candidates} candidates on {start.folds} of {config.folds} folds{of}{rungs}; "
            f"then up to {budget.members} on all rows")  # fmt: skip
        if (wanted := budget.units(config.folds)) > facts["units"] + 1e-9:
            much = f"{wanted:.1f} trainings on all rows instead of {facts['units']:.1f}"
            say(self.console, f"that is the least, and more than the budget: {much}")
        return budget

    def _most_members(self) -> int:
        return self.recipe.tune.members if self.splits.task.classifies else 1

    def _first_rung(self, rung: Rung) -> list[Trial]:
        """Two halves, so that a sampler that learns has something to learn from."""
        learns = self.recipe.tune.sampler != "list"
        counts = [rung.candidates - rung.candidates // 2, rung.candidates // 2] if learns else [rung.candidates]
        found: list[Trial] = []
        for count in filter(None, counts):
            asked = [self._new(candidate) for candidate in self.sampler.ask(count)]
            fresh = self._rung(0, asked, rung.folds)
            for trial in fresh:
                self.sampler.tell(trial.candidate, trial.loss)
            found += fresh
        return found

    def _later_rungs(self, budget: Budget) -> Iterator[Rung]:
        """The rungs after the first, with as many candidates as the time that is left allows beside the members."""
        for number, rung in enumerate(budget.rungs[1:], start=1):

            def decide(rung: Rung = rung) -> dict[str, Any]:
                each = self.share * cost(rung.folds, self.recipe.tune.folds)
                affordable = int((self._units_left() - budget.members) / each)
                return {"candidates": max(1, min(rung.candidates, affordable))}

            yield Rung(self._decided(f"rung-{number}", decide)["candidates"], rung.folds)

    def _affordable(self, budget: Budget) -> int:
        """Members that the rest of the budget pays for: at least one, at most what is wanted."""
        most = self._most_members()
        facts = self._decided("members", lambda: {"count": max(1, min(most, math.floor(self._units_left())))})
        return int(facts["count"])

    def _units_left(self) -> float:
        """Of the budget, in trainings on all rows; by minutes, as long as the trials really took."""
        tune = self.recipe.tune
        trained = [t for t in self.trials if t.candidate.trained]
        done = sum(self.share * cost(t.fresh, tune.folds) for t in trained)
        if not tune.minutes:
            return tune.trainings - done
        spent = sum(t.seconds for t in trained)
        return (self._seconds - spent) * done / max(spent, 1e-9)

    @property
    def _seconds(self) -> float:
        """The budget by minutes without what the wording took, as time of all workers together.

        Trainings that the search goes on with count when it does.
        """
        left = self.recipe.tune.minutes * 60 - self.wording.seconds
        return max(0.0, left * self.crew.workers + self.wording.trained_seconds)

    def _new(self, candidate: Candidate) -> Trial:
        """A candidate before its first fold."""
        epochs = self.workshop.epochs(len(self.searched))
        return Trial(0, candidate, epochs, (), 0, 0.0, self.biasing, self.recipe.tune.balance)

    def _untrained(self) -> list[Trial]:
        """The model as it is, if it is a candidate, in each of the wordings: few rows often choose the wrong one.

        It leans to some class however many rows of each were drawn.
        """
        if not untrained_too(self.recipe, self.splits.task):
            return []
        mine: list[Trial] = []
        if self.world.first or self.world.layout.sharded:
            asked = [(UNTRAINED, self.wording), *((w.asked(UNTRAINED), w) for w in self.other_wordings)]
            mine = [untrained_trial(self.workshop, c, self.folds, w.fold_words) for c, w in asked]
        found = self.world.said_by_first(mine)
        assert found is not None, "the first process has them"
        self._tell(found)
        return found

    def _rung(self, number: int, before: Sequence[Trial], folds: int) -> list[Trial]:
        """The candidates on so many more folds; tells how each did."""
        outcomes = [list(t.folds) for t in before]
        proposed, seconds = [(t.candidate, self.recipe.tune.seed) for t in before], [0.0] * len(before)
        first, mine = len(before[0].folds), self._trained_already(proposed)
        wanted: list[Shared] = []
        for fold in range(first, first + folds):
            # A first rung may come in two halves, whose candidates are counted from 0 both.
            name, title = f"rung-{number}/{len(self.trials)}/fold-{fold + 1}", f"rung {number + 1}, fold {fold + 1}"
            words = self.wording.fold_words[fold]
            wanted += [(self._first_task(self.wording.trained, fold, self.folds[fold], words), [i]) for i in mine]
            wanted += self._shared(proposed, *self.folds[fold], before[0].epochs, name, title, words, mine)
        for indices, done in self._carried_out(wanted):
            for i, outcome in zip(indices, done.outcomes, strict=True):
                outcomes[i].append(outcome)
                seconds[i] += done.seconds / len(indices)
        trials = [
            replace(t, rung=number, folds=tuple(o), fresh=folds, seconds=s)
            for t, o, s in zip(before, outcomes, seconds, strict=True)
        ]
        self._tell(trials)
        return trials

    def _trained_already(self, proposed: Sequence[tuple[Candidate, int]]) -> list[int]:
        """Which of them was trained on every fold to settle the wording: the first, if the wording needed that."""
        return [i for i, (c, _) in enumerate(proposed) if self.wording.trained and c == self.first]

    def _tell(self, trials: Sequence[Trial]) -> None:
        """Adds a rung's trials to what is known, in metrics.jsonl and on the terminal."""
        self.trials += trials
        lines = "".join(json.dumps(t.facts()) + "\n" for t in self.trials)
        write_atomic(self.out / METRICS, lines.encode())
        for trial in sorted(trials, key=lambda t: t.loss):
            accuracy = f", accuracy {trial.facts()['accuracy']:.3f}" if self.splits.task.classifies else ""
            say(self.console, f"  {trial.candidate}: loss {trial.loss:.3f}{accuracy}")

    def _chosen(self, found: Sequence[Trial], count: int) -> list[int]:
        """Which of what is left the members are, by out-of-fold probabilities; of free text the best alone.

        ``count`` of them take a training; the model as it is comes on top.
        """
        tables = [t.outcome.probabilities for t in found]
        if tables[0] is None:
            return [min(range(len(found)), key=lambda i: found[i].loss)]
        told, truth = [t for t in tables if t is not None], found[0].outcome.truth
        kinds = [t.candidate.trained for t in found]
        chosen = select(truth, told, self._most_members(), self.recipe.tune.balance, kinds)
        trained = np.cumsum([kinds[i] for i in chosen])
        # Trained again it is another soft prompt; the model as it is stays the same one.
        return chosen[: np.searchsorted(trained, count, side="right")] if trained[-1] else chosen[:1]

    def _members(self, found: Sequence[Trial], chosen: Sequence[int]) -> list[Made]:
        """The chosen, trained on all rows, each with a seed of its own; in the order in which they were chosen."""
        first = self.recipe.tune.seed * SEED_STRIDE
        picked = [(found[i].candidate, first + number) for number, i in enumerate(chosen)]
        made: dict[int, Made] = {}
        rows = range(len(self.splits.train))
        wanted = self._shared(picked, rows, (), self.workshop.epochs(len(rows)), "members", "members")
        for indices, done in self._carried_out(list(wanted)):
            for i, weights in zip(indices, done.weights, strict=True):
                kept = self.workshop.method(*picked[i])
                kept.load_state_dict(weights)
                made[i] = Made(*picked[i], found[chosen[i]].biases, kept, done.figures)
        return [made[i] for i in range(len(picked))]

    def _shared(
        self, proposed: Sequence[tuple[Candidate, int]], keep: Sequence[int], out: Sequence[int], epochs: int,
        name: str, title: str, words: tuple[str, ...] = (), but: Collection[int] = (),
    ) -> Iterator[Shared]:  # fmt: skip
        """Candidates with seeds as tasks of those that train in the same passes, each beside their indices.

        With several workers a group is as many tasks. ``but`` are not asked for.
        """
        for group, together in grouped([candidate for candidate, _ in proposed]).items():
            indices = [i for i in together if i not in but]
            parts = min(self.crew.workers, len(indices))
            for mine in (indices[k::parts] for k in range(parts)):
                folder = f"{name}/{group.method}-{group.virtual_tokens}-{mine[0]}"
                members = tuple(proposed[i] for i in mine)
                yield Task(folder, members, tuple(keep), tuple(out), epochs, f"{title}, {group.method}", words), mine

    def _carried_out(self, wanted: Sequence[Shared]) -> list[tuple[list[int], Done]]:
        """The outcome of every task beside its indices; what an interrupted search had finished is not done again."""
        folder, tasks = self.out / SEARCH, [task for task, _ in wanted]
        found = self.world.said_by_first({i: d for i, t in enumerate(tasks) if (d := read_done(folder / t.name))})
        left = [i for i in range(len(tasks)) if i not in found]
        for at, done in self.crew.results([tasks[i] for i in left], folder):
            found[left[at]] = done
            if done.outcomes:
                done.write(folder / tasks[left[at]].name)
        return [(indices, found[i]) for i, (_, indices) in enumerate(wanted)]

    def _protocol(self) -> str:
        count, tune = len(self.splits.train), self.recipe.tune
        rows = f"the {count}" if len(self.searched) == count else f"{len(self.searched)} of the {count}"
        parted = f"{tune.folds}-fold cross-validation on {rows} training rows (seed {tune.seed})"
        return f"expected: {parted}, intervals for new rows"

    def _decided(self, name: str, decide: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A decision that rests on time, taken once and kept for a resumed search."""
        file, world = self.out / SEARCH / f"{name}.json", self.world
        kept = world.said_by_first(json.loads(file.read_text()) if file.is_file() else None)
        if kept is None:
            mine = decide() if world.first or world.layout.sharded else {}
            kept = world.said_by_first(mine)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, json.dumps(kept).encode())
        return kept
