"""One training in one folder: fresh or resumed, with its metrics file and checkpoints."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from rich.console import Console

from foreword.backbone.choose import Choice
from foreword.backbone.load import Backbone
from foreword.config import TrainConfig
from foreword.evaluation.evaluate import run_rows, scores_of
from foreword.records import Example
from foreword.training.checkpoint import read_checkpoint, write_checkpoint
from foreword.training.loop import Event, State, Validate, make_plan, start, train
from foreword.training.progress import Display, MetricsFile


def train_in(
    folder: Path,
    backbone: Backbone,
    rows: torch.Tensor,
    examples: Sequence[Example],
    config: TrainConfig,
    layout: Choice,
    console: Console,
    validate: Validate | None = None,
    title: str = "training",
) -> tuple[torch.Tensor, State]:
    """Trains from ``rows`` ``[P, H]`` or from the folder's checkpoint; returns the kept rows."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = make_plan(len(examples), config)
    state = start(rows, config, plan, backbone.device)
    if (checkpoint := read_checkpoint(folder)) is not None:
        state.restore(checkpoint)
        console.print(f"resumed after step {state.step} of {plan.steps}", highlight=False, soft_wrap=True)
    metrics = MetricsFile(folder, state.metrics_bytes)

    def save(state: State) -> None:
        state.metrics_bytes = metrics.size
        write_checkpoint(folder, state.checkpoint())

    try:
        with Display(console, title).showing() as display, interruptible() as interrupted:

            def tell(event: Event) -> None:
                metrics(event)
                display(event)

            kept = train(backbone, examples, state, config, plan, layout.train, validate, tell, save, interrupted)
    finally:
        metrics.close()
    return kept, state


def validator(
    backbone: Backbone,
    examples: Sequence[Example],
    classes: Sequence[str],
    label_ids: Sequence[Sequence[int]],
    layout: Choice,
) -> Validate:
    """Scores rows ``[P, H]`` on validation examples."""

    def validate(rows: torch.Tensor) -> dict[str, float]:
        scores = scores_of(run_rows(backbone, rows, examples, label_ids, layout.score), classes)
        return {k: scores[k] for k in ("loss", "accuracy", "macro_f1", "exact_match") if k in scores}

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
