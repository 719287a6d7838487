"""Scores of many requests in few forward passes: what waits is taken together, soft prompt by soft prompt.

Each pass packs the contexts of one soft prompt into a row (``backbone/forward.py``), label words as a trie.
The keys and values of a soft prompt that comes again are kept, so its rows are not computed again.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch

from foreword.backbone.choose import Layout
from foreword.backbone.forward import Prefix, compute_prefix, micro_batches
from foreword.backbone.load import Backbone
from foreword.evaluation.scoring import GPU_BUDGET, LOGPROBS, SCORING_BUDGET
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


class Openings:
    """Keys and values of soft prompts read before, up to a number of bytes; the longest unused goes first."""

    def __init__(self, budget: int) -> None:
        self.budget, self.used = budget, 0
        self._kept: OrderedDict[tuple[int, ...], Prefix] = OrderedDict()
        self._seen: OrderedDict[tuple[int, ...], None] = OrderedDict()

    def find(self, backbone: Backbone, ids: tuple[int, ...]) -> Prefix | None:
        """Keys and values of ``ids``; None the first time they are asked for, when keeping may not pay."""
        if ids in self._kept:
            self._kept.move_to_end(ids)
            return self._kept[ids]
        if ids not in self._seen:
            self._seen[ids] = None
            if len(self._seen) > 4096:
                self._seen.popitem(last=False)
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
            for batch in self._batches([j for j in jobs if j.done.set_running_or_notify_cancel()]):
                self._score(batch)

    def _batches(self, jobs: Sequence[Job]) -> Iterator[list[Job]]:
        """Jobs of one soft prompt at a time, those of about one length together, as many as fill a pass."""
        budget = SCORING_BUDGET if self.backbone.device.type == "cpu" else GPU_BUDGET
        groups: dict[tuple[int | None, int], list[Job]] = {}
        for job in jobs:
            groups.setdefault((id(job.slot) if job.slot else None, job.opening), []).append(job)
        for (_, opening), group in groups.items():
            ordered = sorted(group, key=lambda j: len(j.ids))
            segments = [Segment(j.ids[opening:], j.branches) for j in ordered]
            for indices in micro_batches(segments, opening, budget):
                yield [ordered[i] for i in indices]

    def _score(self, batch: list[Job]) -> None:
        try:
            with self.alone(), torch.no_grad():
                sums = self._pass(batch)
        except Exception as e:  # each waiting request is told; the thread goes on
            for job in batch:
                job.done.set_exception(e)
            return
        for job, found in zip(batch, sums, strict=True):
            job.done.set_result(found)

    def _pass(self, batch: list[Job]) -> list[list[float]]:
        """Summed log-probabilities of every job's branches."""
        first = batch[0]
        before = first.ids[: first.opening]
        start, prefix = self._opening(first.slot, before)
        rows = [(start, [Segment(j.ids[first.opening :], j.branches) for j in batch])]
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


def _nbytes(prefix: Prefix) -> int:
    return sum(keys.nbytes + values.nbytes for keys, values in prefix.layers)
