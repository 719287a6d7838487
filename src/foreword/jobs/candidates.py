"""Candidates of ``foreword tune`` trained and scored, each group of them in one population.

What was finished stays in its folder as JSON, so that a stopped search goes on where it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console

from foreword.artifact.atomic import write_atomic
from foreword.backbone.choose import Choice, choose_layout
from foreword.backbone.load import Backbone
from foreword.config import Member, PromptConfig, Recipe
from foreword.data.encode import Encoder
from foreword.evaluation.evaluate import Outcome, run_rows
from foreword.evaluation.scoring import target_logprobs
from foreword.jobs.data import Splits
from foreword.jobs.prepare import Beginnings, beginnings, make_encoder
from foreword.jobs.training import Trained, train_in
from foreword.prompts.methods.base import Method
from foreword.prompts.methods.registry import METHODS
from foreword.prompts.soft import SoftPrompt
from foreword.records import Example, Segment
from foreword.training.prepare import prepared
from foreword.training.state import epochs_for, start, trained_rows
from foreword.tuning.space import UNTRAINED_TEXT, Candidate

DONE = "done.json"
PROBE_STEPS = 3
MOST_EPOCHS, LEAST_EPOCHS, ROWS_READ = 15, 2, 800
"""Half of a lone training's or fewer: more candidates and members do more than longer trainings (docs/log.md)."""
ROWS_READ_A_CLASS = 160
"""At least: ten classes want more steps than two."""


class Group(NamedTuple):
    """What soft prompts of one pass have in common."""

    method: str
    virtual_tokens: int
    trained: bool
    template: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Ready:
    """What all candidates of a group share."""

    prompt: PromptConfig
    encoder: Encoder
    examples: list[Example]


@dataclass(frozen=True)
class Task:
    """One training of candidates that share its passes, each with its seed.

    Args:
        name: its folder below the search's.
        group: candidates of one group, with seeds.
        keep: rows to train on.
        out: rows to score; none: the weights are what is wanted.
        epochs: of the training.
        title: as on the terminal.
    """

    name: str
    group: tuple[tuple[Candidate, int], ...]
    keep: tuple[int, ...]
    out: tuple[int, ...]
    epochs: int
    title: str
    words: tuple[str, ...] = ()
    """Label words; none: the task's."""


@dataclass(frozen=True)
class Done:
    """What a task left: outcomes on the rows left out, or the tensors of each candidate's method."""

    seconds: float
    outcomes: list[Outcome]
    weights: list[dict[str, torch.Tensor]]
    figures: dict[str, Any]

    def write(self, folder: Path) -> None:
        """Keeps the outcomes, so that a stopped search does not do them again."""
        stored = {"seconds": self.seconds, "outcomes": [_as_json(o) for o in self.outcomes]}
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / DONE, json.dumps(stored).encode())


def read_done(folder: Path) -> Done | None:
    """What ``Done.write`` kept, or None."""
    if not (folder / DONE).is_file():
        return None
    stored = json.loads((folder / DONE).read_text())
    return Done(float(stored["seconds"]), [_outcome(o) for o in stored["outcomes"]], [], {})


class Workshop:
    """Trains candidates on some of the rows and scores them on others.

    Args:
        recipe: all that the candidates do not say.
        splits: the rows.
        backbone: the model.
        console: where progress goes.
    """

    def __init__(self, recipe: Recipe, splits: Splits, backbone: Backbone, console: Console) -> None:
        self.recipe, self.splits, self.backbone, self.console = recipe, splits, backbone, console
        self._ready: dict[Group, Ready] = {}
        self._layouts: dict[str, Choice] = {}

    def epochs(self, rows: int) -> int:
        """Of a training on so many rows."""
        return self.recipe.train.epochs or search_epochs(rows, len(self.splits.task.classes))

    @property
    def groups(self) -> Collection[Ready]:
        """All groups made so far."""
        return self._ready.values()

    def ready(self, candidate: Candidate, words: tuple[str, ...] = ()) -> Ready:
        """Settings, encoder and encoded training rows of its group, with its own label words unless others."""
        task = self.splits.task
        group = group_of(candidate)._replace(words=words or self.words(candidate))
        if group not in self._ready:
            prompt = replace(self.recipe.prompt, method=group.method, virtual_tokens=group.virtual_tokens)
            prompt = prompt if group.trained else replace(prompt, init_text=UNTRAINED_TEXT)
            task = replace(task, template=group.template or task.template, words=group.words)
            encoder = make_encoder(task, self.backbone, group.virtual_tokens, METHODS[group.method].kind)
            self._ready[group] = Ready(prompt, encoder, encoder.examples(self.splits.train))
        return self._ready[group]

    def words(self, candidate: Candidate) -> tuple[str, ...]:
        """Its label words: the task's unless it has its own."""
        return candidate.words or self.splits.task.words

    def method(self, candidate: Candidate, seed: int) -> Method:
        """Its soft prompt before the first step on all rows."""
        ready = self.ready(candidate)
        return self._beginnings([(candidate, seed)], ready, ready.examples)[0][0]

    def layout(self, candidate: Candidate) -> Choice:
        """How its rows share a pass, proved once for each kind of soft prompt."""
        kind = METHODS[candidate.method].kind
        if kind not in self._layouts:
            ready = self.ready(candidate)
            rows = [Segment(e.context, ready.encoder.label_ids or (e.target,)) for e in ready.examples]
            self._layouts[kind] = choose_layout(self.backbone, self.method(candidate, 0).soft_prompt(), rows)
        return self._layouts[kind]

    def train(self, folder: Path, task: Task) -> Trained:
        """Trains a task's candidates, each with its seed, on its rows."""
        first = task.group[0][0]
        ready = self.ready(first, task.words)
        examples = [ready.examples[i] for i in task.keep]
        methods, shown = self._beginnings(task.group, ready, examples)
        return train_in(
            folder, self.backbone, methods, [member_of(c, s) for c, s in task.group], [e.segment for e in examples],
            replace(self.recipe.train, epochs=task.epochs), self.layout(first), self.console, title=task.title,
            shown=shown,
        )  # fmt: skip

    def _beginnings(
        self, group: Sequence[tuple[Candidate, int]], ready: Ready, examples: Sequence[Example]
    ) -> Beginnings:
        """The group's soft prompts before the first step on these rows, and which of them these show."""
        members = [member_of(c, s) for c, s in group]
        return beginnings(ready.prompt, ready.encoder.task, ready.encoder, self.backbone, members, examples)

    def carry_out(self, task: Task, folder: Path) -> Done:
        """Trains a task's candidates, from the folder's checkpoint if there is one, and scores the rows left out."""
        began, first = time.monotonic(), task.group[0][0]
        kept, before, figures = self._made(folder, task)
        outcomes, weights = [], []
        if task.out:
            ready = self.ready(first, task.words)
            outcomes = [self._outcome(first, ready, method.soft_prompt(), task.out) for method in kept]
        else:
            weights = [{n: t.detach().cpu() for n, t in method.state_dict().items()} for method in kept]
        return Done(max(time.monotonic() - began, before), outcomes, weights, figures)

    def _made(self, folder: Path, task: Task) -> tuple[list[Method], float, dict[str, Any]]:
        """A task's candidates, trained if they are; seconds that the steps took, which may be of an earlier run."""
        if not task.group[0][0].trained:
            return [self.method(candidate, seed) for candidate, seed in task.group], 0.0, {"epochs": 0}
        found = self.train(folder, task)
        return [state.kept for state in found.population.states], found.population.seconds, found.figures

    def _outcome(self, candidate: Candidate, ready: Ready, prompt: SoftPrompt, rows: Sequence[int]) -> Outcome:
        """What a soft prompt says of these rows; of free text only how likely it is, as writing takes long."""
        layout = self.layout(candidate).score
        held = [ready.examples[i] for i in rows]
        if ready.encoder.label_ids:
            return run_rows(self.backbone, prompt, held, ready.encoder.label_ids, layout)
        return Outcome([], [len(e.target) for e in held], target_logprobs(self.backbone, prompt, held, layout))

    def untrained(self, candidate: Candidate, rows: Sequence[int], words: tuple[str, ...]) -> Outcome:
        """What the model as it is says of rows, with these label words."""
        return self._outcome(candidate, self.ready(candidate, words), self.method(candidate, 0).soft_prompt(), rows)

    def unit_seconds(self, candidate: Candidate) -> float:
        """What one training on all rows for all epochs would take, from a few steps of it."""
        ready = self.ready(candidate)
        examples = ready.examples
        config = replace(self.recipe.train, epochs=self.epochs(len(examples)))
        probe = replace(config, engine="eager")
        segments, member = [e.segment for e in examples], member_of(candidate, 0)
        methods, shown = self._beginnings([(candidate, member.seed)], ready, examples)
        plan, left = trained_rows(len(segments), shown, config)
        population = start(methods, [member], config, plan, self.backbone.device, left)
        times = []
        with prepared(self.backbone, segments, population, probe, self.layout(candidate).train) as able:
            for step in range(PROBE_STEPS):
                batch = [able.segments[i] for i in population.batch(population.states[0], step % plan.steps)]
                able.engine.load(population.states, [[batch]])
                began = time.perf_counter()
                float(able.engine.step().loss.sum())  # waits for the device
                times.append(time.perf_counter() - began)
        return median(times[1:]) * plan.steps  # the first step also warms up


def search_epochs(rows: int, classes: int) -> int:
    """Epochs of a whole training in a search, where the recipe leaves them open."""
    return epochs_for(rows, MOST_EPOCHS, LEAST_EPOCHS, max(ROWS_READ, classes * ROWS_READ_A_CLASS))


def group_of(candidate: Candidate) -> Group:
    """What it must have in common with those it trains with."""
    return Group(candidate.method, candidate.virtual_tokens, candidate.trained, candidate.template, candidate.words)


def grouped(candidates: Sequence[Candidate]) -> dict[Group, list[int]]:
    """Indices of the candidates of each group, in order."""
    found: dict[Group, list[int]] = {}
    for i, candidate in enumerate(candidates):
        found.setdefault(group_of(candidate), []).append(i)
    return found


def member_of(candidate: Candidate, seed: int) -> Member:
    """A candidate with a seed, as training knows it."""
    return Member(candidate.init, seed, candidate.lr)


def _as_json(outcome: Outcome) -> dict[str, Any]:
    """What a search needs of an outcome again."""
    table = outcome.probabilities
    return {
        "truth": outcome.truth,
        "target_tokens": outcome.target_tokens,
        "logprobs": outcome.logprobs,
        "probabilities": None if table is None else table.tolist(),
    }


def _outcome(stored: dict[str, Any]) -> Outcome:
    """The outcome that ``_as_json`` stored, to the last bit."""
    table = stored["probabilities"]
    return Outcome(
        stored["truth"], stored["target_tokens"], stored["logprobs"], None if table is None else np.array(table)
    )
