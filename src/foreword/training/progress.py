"""What a person sees while a run trains, and the metrics file that is always written."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from foreword.errors import ForewordError
from foreword.training.loop import Event

METRICS = "metrics.jsonl"
PLAIN_SECONDS = 10.0
"""Where output is no terminal, one line at most so often (and at every epoch's validation)."""


class MetricsFile:
    """Appends events to ``metrics.jsonl``, flushed line by line."""

    def __init__(self, folder: Path, keep_bytes: int) -> None:
        self.path = folder / METRICS
        try:
            self._file = self.path.open("ab")
            # Lines after the checkpoint will be written again; other processes than the first have none before it.
            self._file.truncate(min(keep_bytes, self.size))
        except OSError as e:
            raise self._failed(e) from None

    def __call__(self, event: Event) -> None:
        """Writes one event as one line."""
        try:
            self._file.write(json.dumps(dict(event)).encode() + b"\n")
            self._file.flush()
        except OSError as e:
            raise self._failed(e) from None

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Closes the file; what could not be flushed was reported before."""
        try:
            self._file.close()
        except OSError:
            return

    def _failed(self, e: OSError) -> ForewordError:
        return ForewordError(f"cannot write: {e.strerror}", str(self.path), "free some space, then go on with --resume")


class Display:
    """A rich progress bar on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console, title: str = "training") -> None:
        self.console, self.title = console, title
        self._bar: Progress | None = None
        self._task: Any = None
        self._printed = -PLAIN_SECONDS
        self._score = ""
        self._smooth = 0.0
        self._rate = 0.0

    def __call__(self, event: Event) -> None:
        """Shows a step or a validation."""
        if event["event"] == "validation":
            scores = [f"{k.replace('_', '-')} {event[k]:.3f}" for k in ("accuracy", "macro_f1") if k in event]
            self._score = " ".join(["val", *scores[:1], f"loss {event['loss']:.3f}"])
        elif event["event"] == "step":
            self._step(event)

    def _step(self, event: Event) -> None:
        first = self._smooth == 0.0
        self._smooth = event["loss"] if first else 0.9 * self._smooth + 0.1 * event["loss"]
        rate = event["tokens"] / max(event["seconds"], 1e-9)
        self._rate = rate if first else 0.9 * self._rate + 0.1 * rate
        text = " ".join(filter(None, [f"loss {self._smooth:.3f}", self._score, f"{self._rate:.0f} tok/s"]))
        if self._bar is not None:
            self._bar.update(self._task, total=event["steps"], completed=event["step"], text=text)
            return
        now = time.monotonic()
        if now - self._printed >= PLAIN_SECONDS or event["step"] == event["steps"]:
            self._printed = now
            left = (event["steps"] - event["step"]) * event["tokens"] / max(self._rate, 1e-9)
            self.console.print(
                f"{self.title} step {event['step']}/{event['steps']} epoch {event['epoch']}/{event['epochs']} "
                f"{text}, {left:.0f} s left",
                highlight=False,
                soft_wrap=True,
            )

    @contextmanager
    def showing(self) -> Iterator[Display]:
        """Shows the bar for as long as the block runs, where there is a terminal."""
        if not self.console.is_terminal:
            yield self
            return
        with _bar(self.console) as bar:
            self._bar, self._task = bar, bar.add_task(self.title, total=None, text="")
            yield self
            self._bar = None


@contextmanager
def counting(console: Console, title: str, total: int | None) -> Iterator[Any]:
    """A bar over ``total`` rows (if known); yields a callable that takes the rows just done."""
    if not console.is_terminal:
        rows = "" if total is None else f" {total} rows"
        console.print(f"{title}{rows}", highlight=False, soft_wrap=True)
        yield lambda rows: None
        return
    with _bar(console) as bar:
        task = bar.add_task(title, total=total, text="rows")
        yield lambda rows: bar.advance(task, rows)


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(compact=True),
        console=console,
    )
