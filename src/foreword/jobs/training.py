"""One training in one folder: fresh or resumed, with its metrics file and checkpoints."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from foreword.backbone.choose import Choice
from foreword.backbone.load import Backbone
from foreword.backbone.memory import MB, Peak
from foreword.config import Member, TrainConfig
from foreword.evaluation.evaluate import run_rows, validation_scores
from foreword.prompts.methods.base import Method
from foreword.prompts.soft import SoftPrompt
from foreword.records import Example, Segment
from foreword.training.checkpoint import read_checkpoint, write_checkpoint
from foreword.training.loop import Event, Hooks, Validate, train
from foreword.training.prepare import Leads, prepared
from foreword.training.progress import Display, MetricsFile
from foreword.training.state import Population, start, trained_rows


@dataclass(frozen=True)
class Trained:
    """A population at its end, and what training took."""

    population: Population
    engine: str
    peak_bytes: int | None

    @property
    def kept(self) -> SoftPrompt:
        """The soft prompt of the best member."""
        return self.population.states[self.population.best].kept.soft_prompt()

    @property
    def figures(self) -> dict[str, Any]:
        """For metrics.jsonl and the sidecar."""
        return {
            "steps": self.population.step,
            "seconds": round(self.population.seconds, 1),
            "peak_memory_mb": None if self.peak_bytes is None else round(self.peak_bytes / MB),
            "engine": self.engine,
        }


def train_in(
    folder: Path,
    backbone: Backbone,
    methods: Sequence[Method],
    members: Sequence[Member],
    rows: Sequence[Segment],
    config: TrainConfig,
    layout: Choice,
    console: Console,
    validate: Validate | None = None,
    title: str = "training",
    leads: Leads = (),
    shown: Sequence[Collection[int]] = (),
) -> Trained:
    """Trains a population from ``methods``, or from the folder's checkpoint, on rows with whole contexts.

    ``shown`` are the indices of the rows that each member shows and does not train on, as many of each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plan, left = trained_rows(len(rows), shown, config)
    population = start(methods, members, config, plan, backbone.device, left)
    world = backbone.world
    if (checkpoint := world.said_by_first(read_checkpoint(folder))) is not None:
        population.restore(checkpoint)
        say(console, f"resumed after step {population.step} of {population.plan.steps}")
    metrics = MetricsFile(folder, population.metrics_bytes)

    def save(population: Population) -> None:
        population.metrics_bytes = metrics.size
        write_checkpoint(folder, population.checkpoint())

    try:
        with prepared(backbone, rows, population, config, layout.train, leads) as ready:
            for note in ready.notes:
                say(console, note)
            peak = Peak(backbone.device)
            with Display(console, title).showing() as display, interruptible() as interrupted:

                def tell(event: Event) -> None:
                    metrics(event)
                    display(event)

                hooks = Hooks(validate, tell, save, interrupted, world)
                train(ready.engine, ready.segments, population, config, hooks)
        trained = Trained(population, ready.name, peak.size)
        metrics({"event": "end", **trained.figures})
    finally:
        metrics.close()
    return trained


def say(console: Console, line: str) -> None:
    """Prints a line as it is, however long."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def validator(
    backbone: Backbone,
    examples: Sequence[Example],
    label_ids: Sequence[Sequence[int]],
    layout: Choice,
) -> Validate:
    """Scores a soft prompt on validation examples."""

    def validate(prompt: SoftPrompt) -> dict[str, float]:
        return validation_scores(run_rows(backbone, prompt, examples, label_ids, layout.score))

    return validate


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Inside, Ctrl-C and SIGTERM only raise a flag, so that the step in hand can be finished.

    A second Ctrl-C interrupts at once. Outside the main thread nothing is installed.
    """
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(s, ask) for s in signals]
    try:
        yield lambda: asked
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
