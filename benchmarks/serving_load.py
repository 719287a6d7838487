"""A real HTTP client in a process of its own, which notes when every piece of every answer came.

As a script it reads one job a line, sends its calls with as many under way as asked for, and writes one line of
answers. It imports no torch and takes part in nothing else, so its clock is a user's clock.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

LIMIT_SECONDS = 900.0
"""Most that one job may take; what is not answered then counts as an error."""
EVENT = "data: "
LAST_EVENT = "[DONE]"
NO_ANSWER = 0
"""Status of a call that the connection failed."""


@dataclass(frozen=True)
class Call:
    """One request: a path of the gateway and its JSON body."""

    path: str
    body: Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """What came back, with times in seconds since the job began.

    ``pieces``: when each piece of text came (one where it is not streamed); ``reply``: the whole JSON, for calls
    that are not streamed.
    """

    status: int
    began: float
    ended: float
    pieces: Sequence[float] = ()
    text: str = ""
    tokens: int = 0
    reply: Any = None
    error: str = ""


@dataclass(frozen=True)
class Round:
    """One job: how long it took from its first call to its last answer, and the answers in order."""

    seconds: float
    answers: Sequence[Answer]


@dataclass
class _Stream:
    """What a stream of events has brought so far."""

    pieces: list[float] = field(default_factory=list)
    text: str = ""
    tokens: int = 0
    error: str = ""

    def take(self, line: str, now: float) -> None:
        """One line of the stream."""
        if not line.startswith(EVENT) or line == EVENT + LAST_EVENT:
            return
        event = json.loads(line[len(EVENT) :])
        self.error = self.error or (json.dumps(event["error"]) if "error" in event else "")
        self.tokens = (event.get("usage") or {}).get("completion_tokens", self.tokens)
        for choice in event.get("choices", ()):
            piece = said(choice)
            self.text += piece
            if piece:
                self.pieces.append(now)


class Client:
    """The client's process, used inside a ``with`` block."""

    def __enter__(self) -> Client:
        command = [sys.executable, str(Path(__file__).resolve())]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def run(self, url: str, calls: Sequence[Call], concurrency: int, key: str = "") -> Round:
        """Sends all calls, so many at once, and waits for the last answer."""
        job = {"url": url, "key": key, "concurrency": concurrency, "calls": [asdict(c) for c in calls]}
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the client's process has ended; its last words are above")
        found = json.loads(line)
        return Round(found["seconds"], [Answer(**a) for a in found["answers"]])


def said(choice: Mapping[str, Any]) -> str:
    """The text of a choice: of a completion, a chat message, or a piece of either."""
    message = choice.get("delta") or choice.get("message") or {}
    return choice.get("text") or message.get("content") or ""


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Median and 99th percentile (nearest rank) in milliseconds; nothing of nothing."""
    ranked = sorted(seconds)
    return {f"p{p}": float(f"{1e3 * ranked[len(ranked) * p // 100]:.4g}") for p in (50, 99) if ranked}


def opened(url: str, concurrency: int, key: str = "", limit: float = LIMIT_SECONDS) -> httpx.AsyncClient:
    """A client with room for so many connections, that waits at most ``limit`` seconds; it asks no proxy."""
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.AsyncClient(base_url=url, limits=limits, timeout=limit, headers=headers, trust_env=False, verify=False)


async def send(client: httpx.AsyncClient, call: Call, zero: float) -> Answer:
    """One call to its end; a failed connection is an answer too."""
    began = time.perf_counter() - zero
    try:
        if call.body.get("stream"):
            return await _streamed(client, call, zero, began)
        response = await client.post(call.path, json=dict(call.body))
    except httpx.HTTPError as e:
        return Answer(NO_ANSWER, began, time.perf_counter() - zero, error=f"{type(e).__name__}: {e}")
    ended = time.perf_counter() - zero
    if response.status_code != httpx.codes.OK:
        return Answer(response.status_code, began, ended, error=response.text[:500])
    reply = response.json()
    text = "".join(said(c) for c in reply.get("choices", ()))
    tokens = (reply.get("usage") or {}).get("completion_tokens", 0)
    return Answer(response.status_code, began, ended, [ended], text, tokens, reply)


async def _streamed(client: httpx.AsyncClient, call: Call, zero: float, began: float) -> Answer:
    found = _Stream()
    async with client.stream("POST", call.path, json=dict(call.body)) as response:
        if response.status_code != httpx.codes.OK:
            content = (await response.aread()).decode(errors="replace")
            return Answer(response.status_code, began, time.perf_counter() - zero, error=content[:500])
        async for line in response.aiter_lines():
            found.take(line, time.perf_counter() - zero)
    ended = time.perf_counter() - zero
    return Answer(response.status_code, began, ended, found.pieces, found.text, found.tokens, error=found.error)


async def perform(job: Mapping[str, Any]) -> dict[str, Any]:
    """All calls of a job as ``{"seconds", "answers"}``."""
    calls = [Call(**c) for c in job["calls"]]
    answers: list[Answer | None] = [None] * len(calls)
    queue = iter(enumerate(calls))

    async def worker(client: httpx.AsyncClient, rest: Iterator[tuple[int, Call]], zero: float) -> None:
        for i, call in rest:
            answers[i] = await send(client, call, zero)

    async with opened(job["url"], job["concurrency"], job["key"]) as client:
        zero = time.perf_counter()
        workers = [
            asyncio.ensure_future(worker(client, queue, zero)) for _ in range(min(job["concurrency"], len(calls)))
        ]
        done, late = await asyncio.wait(workers, timeout=LIMIT_SECONDS)
        for task in late:
            task.cancel()
        for task in done:
            task.result()
        seconds = time.perf_counter() - zero
    missing = Answer(NO_ANSWER, 0.0, seconds, error="no answer in time")
    return {"seconds": seconds, "answers": [asdict(a or missing) for a in answers]}


def main() -> None:
    """Performs the jobs that come on stdin, until it is closed."""
    for line in sys.stdin:
        print(json.dumps(asyncio.run(perform(json.loads(line)))), flush=True)


if __name__ == "__main__":
    main()
