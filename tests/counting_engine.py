"""A small engine without a model, for what the transport does: repeats a context's ids.

What a request's id begins with says how it behaves. As a script: hosts itself as a worker.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foreword.errors import ForewordError
from foreword.serving import worker
from foreword.serving.engine import (
    Capabilities,
    EngineDown,
    EngineRefused,
    Request,
    Rows,
    ScoreRequest,
    Stats,
    Token,
    UnknownPrompt,
)


@dataclass
class CountingEngine:
    """``step``: seconds between two tokens; ``fault``: what goes wrong while it loads; ``needs``: a file."""

    step: float = 0.0
    fault: str = ""
    child: bool = False
    needs: str = "."
    alive: bool = False
    epoch: int = 0
    running: int = 0
    held: dict[str, Rows] = field(default_factory=dict)

    async def start(self) -> Capabilities:
        if self.fault == "foreword" or not Path(self.needs).exists():
            raise ForewordError("no such model", "/nowhere", "give another")
        if self.fault == "exit":
            sys.stderr.write("out of memory\nthat was all\n")
            os._exit(3)
        if self.fault == "slow":
            time.sleep(60)
        if self.child:
            subprocess.Popen(["sleep", "60"])
        self.alive = True
        return Capabilities("counting", "none", 1000, 4, 10**9, 0, "float32", fingerprint={"pid": os.getpid()})

    async def close(self) -> None:
        self.alive = False
        sys.stderr.write("closed in peace\n")

    async def put(self, rows: Rows) -> None:
        self.held[rows.key] = rows

    async def drop(self, key: str) -> None:
        self.held.pop(key, None)

    async def generate(self, request: Request) -> AsyncIterator[Token]:
        self.fail(request.id)
        if request.key is not None and request.key not in self.held:
            raise UnknownPrompt(request.key)
        self.running += 1
        try:
            for i in range(request.decoding.max_tokens):
                await asyncio.sleep(self.step)
                last = i + 1 == request.decoding.max_tokens and request.id != "endless"
                yield Token(request.ids[i % len(request.ids)], -0.5, ((1, -0.5),), "length" if last else None, i)
        finally:
            self.running -= 1

    def fail(self, how: str) -> None:
        if how == "refused":
            raise EngineRefused("too long", "by far")
        if how == "broken":
            raise ZeroDivisionError("of the model")
        if how == "exit":
            os._exit(7)
        if how == "hang":
            time.sleep(60)
        if how == "dead":
            self.alive = False
            raise EngineDown("the loop ended")
        if how == "cancelled":
            raise asyncio.CancelledError
        if how == "loud":
            print('{"events":[[1,"value",1]]}', flush=True)  # noqa: T201

    async def abort(self, request_id: str) -> None:
        raise AssertionError("the transport closes iterators")

    async def score(self, request: ScoreRequest) -> list[float]:
        self.fail(request.id)
        await asyncio.sleep(self.step)
        return [float(sum(b)) for b in request.branches]

    async def stats(self) -> Stats:
        return Stats(running=self.running, prompt_bytes=sum(r.values.nbytes for r in self.held.values()))


def make(config: dict[str, Any]) -> CountingEngine:
    return CountingEngine(**config)


if __name__ == "__main__":
    worker.CLOSING = 0.5
    worker.host(make, int(sys.argv[-1]))
