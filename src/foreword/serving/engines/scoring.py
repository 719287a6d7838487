"""Scores of many requests in few forward passes: what waits is taken together, soft prompt by soft prompt.

Each pass packs the contexts of one soft prompt into a row (``backbone/forward.py``), label words as a trie.
The keys and values of a soft prompt that comes again are kept, with the template's constant opening behind it,
so neither is computed again.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from foreword.backbone.choose import Layout
from foreword.backbone.forward import Prefix, compute_prefix, micro_batches
from foreword.backbone.load import Backbone
from foreword.data.encode import common_opening
from foreword.evaluation.scoring import LOGPROBS, scoring_budget
from foreword.records import Segment
from foreword.serving.engines.ids import Slot


@dataclass(eq=False)
class Job:
    """One context with its branches. ``ids``: of the running model; the first ``opening`` are the soft prompt."""

    ids: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]
    slot: Slot | None
    opening: int
    done: Future[list[float]] = field(default_factory=Future)


MOST_SEEN = 4096
"""Soft prompts remembered by their ids alone."""


class Openings:
    """Keys and values of soft prompts read before, up to a number of bytes; the longest unused goes first."""

    def __init__(self, budget: int) -> None:
        self.budget, self.used = budget, 0
        self._kept: OrderedDict[tuple[int, ...], Prefix] = OrderedDict()
        self._seen: OrderedDict[tuple[int, ...], None] = OrderedDict()
        self._constant: OrderedDict[tuple[int, ...], tuple[int, ...]] = OrderedDict()

    def constant(self, ids: tuple[int, ...], contexts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """What all contexts behind the soft prompt ``ids`` began with so far: the template's opening, soon.

        It only ever shrinks, so the keys and values kept for it are found again by those who come later.
        """
        known = self._constant.pop(ids, None)
        # A context keeps a token of its own; what is known may be a context's whole beginning.
        found = common_opening([*contexts, (*known, -1)] if known is not None else contexts)
        self._constant[ids] = found
        _forget(self._constant)
        return found

    def find(self, backbone: Backbone, ids: tuple[int, ...]) -> Prefix | None:
        """Keys and values of ``ids``; None the first time they are asked for, when keeping may not pay."""
        if ids in self._kept:
            self._kept.move_to_end(ids)
            return self._kept[ids]
        if ids not in self._seen:
            self._seen[ids] = None
            _forget(self._seen)
            return None
        found = compute_prefix(backbone, ids)
        self._kept[ids] = found
        self.used += _nbytes(found)
        while self.used > self.budget:
            self.used -= _nbytes(self._kept.popitem(last=False)[1])
        return found


class Scorer:
    """A thread that scores what waits.

    Args:
        backbone: the model; its embedding answers the jobs' ids.
        layout: how contexts share a pass.
        alone: a context in which nobody else uses the model.
        budget: bytes of keys and values kept.
    """

    def __init__(
        self, backbone: Backbone, layout: Layout, alone: Callable[[], AbstractContextManager[None]], budget: int
    ) -> None:
        self.backbone, self.layout, self.alone = backbone, layout, alone
        self.openings = Openings(budget)
        self._waiting: list[Job] = []
        self._change = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="scorer", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Jobs not taken yet."""
        return len(self._waiting)

    def add(self, job: Job) -> None:
        """Scores a job; its ``done`` gets the sums."""
        with self._change:
            self._waiting.append(job)
            self._change.notify()

    def close(self) -> None:
        """Cancels what waits and ends the thread."""
        with self._change:
            self._closed = True
            for job in self._waiting:
                job.done.cancel()
            self._waiting.clear()
            self._change.notify()
        self._thread.join(timeout=60)

    def _run(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                jobs, self._waiting = self._waiting, []
            for batch, opening in self._batches([j for j in jobs if j.done.set_running_or_notify_cancel()]):
                self._score(batch, opening)

    def _batches(self, jobs: Sequence[Job]) -> Iterator[tuple[list[Job], int]]:
        """Jobs of one soft prompt at a time, those of about one length together, as many as fill a pass.

        Each with the number of tokens that all of them begin with.
        """
        budget = scoring_budget(self.backbone)
        groups: dict[tuple[int | None, int], list[Job]] = {}
        for job in jobs:
            groups.setdefault((id(job.slot) if job.slot else None, job.opening), []).append(job)
        for (_, before), group in groups.items():
            ordered = sorted(group, key=lambda j: len(j.ids))
            opening = before + self._shared(ordered, before)
            segments = [Segment(j.ids[opening:], j.branches) for j in ordered]
            for indices in micro_batches(segments, opening, budget):
                yield [ordered[i] for i in indices], opening

    def _shared(self, group: Sequence[Job], before: int) -> int:
        """Tokens behind the soft prompt that need not be read for every job."""
        slot = group[0].slot
        if self.layout != "packed" or not before or (slot and slot.layers):
            return 0
        return len(self.openings.constant(group[0].ids[:before], [j.ids[before:] for j in group]))

    def _score(self, batch: list[Job], opening: int) -> None:
        try:
            with self.alone(), torch.no_grad():
                sums = self._pass(batch, opening)
        except Exception as e:  # each waiting request is told; the thread goes on
            for job in batch:
                job.done.set_exception(e)
            return
        for job, found in zip(batch, sums, strict=True):
            job.done.set_result(found)

    def _pass(self, batch: list[Job], opening: int) -> list[list[float]]:
        """Summed log-probabilities of every job's branches, behind ``opening`` common tokens."""
        start, prefix = self._opening(batch[0].slot, batch[0].ids[:opening])
        rows = [(start, [Segment(j.ids[opening:], j.branches) for j in batch])]
        return _sums(LOGPROBS[self.layout](self.backbone, rows, prefix).double().tolist(), batch)

    def _opening(self, slot: Slot | None, before: tuple[int, ...]) -> tuple[tuple[int, ...], Prefix | None]:
        """What stands before every context: ids to read, or keys and values."""
        if slot is not None and slot.layers:
            layers = tuple((k[None], v[None]) for k, v in slot.layers)
            return before, Prefix(layers, len(slot.ids))
        if not before or self.layout != "packed":
            return before, None
        found = self.openings.find(self.backbone, before)
        return ((), found) if found else (before, None)


def _sums(values: Sequence[float], batch: Sequence[Job]) -> list[list[float]]:
    """Log-probabilities in the order job, branch, token, summed over the tokens."""
    found, at = [], 0
    for job in batch:
        sums = []
        for branch in job.branches:
            sums.append(sum(values[at : at + len(branch)]))
            at += len(branch)
        found.append(sums)
    return found


def _forget(kept: OrderedDict[tuple[int, ...], Any]) -> None:
    if len(kept) > MOST_SEEN:
        kept.popitem(last=False)


def _nbytes(prefix: Prefix) -> int:
    return sum(keys.nbytes + values.nbytes for keys, values in prefix.layers)
