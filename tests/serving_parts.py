"""Soft prompts of the tiny model as folders, and an engine that only keeps books."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from functools import cache
from pathlib import Path
from typing import Any

import torch

import tiny
from foreword.artifact.folder import write_adapter
from foreword.artifact.peft_types import TENSOR, peft_config
from foreword.artifact.sidecar import Sidecar
from foreword.backbone.kv import Geometry
from foreword.backbone.load import Backbone
from foreword.config import PromptConfig
from foreword.records import Task
from foreword.serving.engine import Capabilities, EngineDown, EngineRefused, Request, Rows, ScoreRequest, Stats, Token

SOON = 60.0
"""Seconds after which a test gives up waiting."""
BIASES = (0.9, -0.4)
TASK = Task(
    "Tweet text : {text} Label :", " ", "label", ("complaint", "praise"), ("complaint", "thank you"), biases=BIASES
)
TOKENS = 4
NBYTES = TOKENS * tiny.HIDDEN * 4
GEOMETRY = Geometry(layers=2, heads=2, head_dim=8)


@cache
def backbone() -> Backbone:
    return tiny.backbone(dtype=torch.float32)


def capabilities(**changed: Any) -> Capabilities:
    known: dict[str, Any] = {
        "engine": "books", "model": "tiny-model", "vocab_size": tiny.VOCAB, "hidden_size": tiny.HIDDEN, "window": 64,
        "end_id": 0, "dtype": "float32", "kinds": ("rows", "prefix"), "prefix_width": GEOMETRY.width,
        "fingerprint": backbone().fingerprint.as_dict(),
    }  # fmt: skip
    return Capabilities(**{**known, **changed})


def values_of(seed: int, tokens: int = TOKENS, width: int = tiny.HIDDEN) -> torch.Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


def soft_prompt(
    folder: Path,
    seed: int = 0,
    tokens: int = TOKENS,
    task: Task | None = TASK,
    kind: str = "rows",
    width: int = 0,
    trained_for: Any = "tiny",
    **config: Any,
) -> Path:
    """Writes an adapter folder; ``trained_for``: a fingerprint, or tiny's own. A task of None: no sidecar."""
    rows = values_of(seed, tokens, width or (GEOMETRY.width if kind == "prefix" else tiny.HIDDEN))
    peft_type = "PREFIX_TUNING" if kind == "prefix" else "PROMPT_TUNING"
    more: dict[str, Any] = {"base": "user/base", "revision": None, "prompt": PromptConfig(), "geometry": GEOMETRY}
    made = peft_config(peft_type, {TENSOR: rows}, model_config=backbone().config, **more)
    print_of = backbone().fingerprint.as_dict() if trained_for == "tiny" else trained_for
    sidecar = Sidecar(task, {"name": "user/base", "fingerprint": print_of}) if task else None
    write_adapter(folder, {TENSOR: rows}, {**made, **config}, sidecar)
    return folder


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """Runs a test's coroutine; nothing may hang."""
    return asyncio.run(asyncio.wait_for(work, SOON))


class Books:
    """An engine that keeps books of soft prompts and runs nothing.

    ``gate``: puts wait for it. ``down``: everything raises EngineDown. ``room``: most bytes it takes.
    """

    def __init__(self, room: int = 1 << 40) -> None:
        self.held: dict[str, Rows] = {}
        self.events: list[tuple[str, str]] = []
        self.room, self.down, self.started = room, False, 1
        self.gate = asyncio.Event()
        self.gate.set()

    def restart(self) -> None:
        self.held.clear()
        self.started += 1

    async def start(self) -> Capabilities:
        return capabilities()

    async def close(self) -> None:
        self.held.clear()

    async def put(self, rows: Rows) -> None:
        await self.gate.wait()
        await asyncio.sleep(0)
        if self.down:
            raise EngineDown("it is down")
        if (
            rows.key not in self.held
            and sum(r.values.nbytes for r in self.held.values()) + rows.values.nbytes > self.room
        ):
            raise EngineRefused("it is full")
        self.events.append(("put", rows.key))
        self.held[rows.key] = rows

    async def drop(self, key: str) -> None:
        await asyncio.sleep(0)
        if self.down:
            raise EngineDown("it is down")
        self.events.append(("drop", key))
        self.held.pop(key, None)

    async def generate(self, request: Request) -> AsyncIterator[Token]:
        raise EngineRefused("it runs nothing")
        yield Token(-1)

    async def abort(self, request_id: str) -> None:
        return None

    async def score(self, request: ScoreRequest) -> list[float]:
        raise EngineRefused("it runs nothing")

    async def stats(self) -> Stats:
        return Stats()

    @property
    def alive(self) -> bool:
        return not self.down

    @property
    def epoch(self) -> int:
        return self.started
