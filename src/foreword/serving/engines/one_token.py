"""Scores out of requests that write one token: the branches as a trie, one request for each inner node.

An engine that reports log-probabilities of chosen tokens answers label words of one token each with one
request, and longer ones with as many as they have different beginnings.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager

from foreword.serving.engine import Decoding

Path = tuple[int, ...]
Ask = Callable[[Path, tuple[int, ...]], Awaitable[Mapping[int, float]]]
"""Log-probabilities of tokens after the context and a path."""


def steps_of(branches: Sequence[Path]) -> dict[Path, tuple[int, ...]]:
    """What comes after each beginning of the branches."""
    steps: dict[Path, dict[int, None]] = {}
    for branch in branches:
        for i, token in enumerate(branch):
            steps.setdefault(branch[:i], {})[token] = None
    return {path: tuple(ids) for path, ids in steps.items()}


async def summed(branches: Sequence[Path], ask: Ask, most: int) -> list[float]:
    """Summed log-probability of each branch; ``most`` tokens are asked for at a time.

    When one question fails the others are given up.
    """
    asked = [(path, ids[at : at + most]) for path, ids in steps_of(branches).items() for at in range(0, len(ids), most)]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_answer(ask, *question)) for question in asked]
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None
    known = {(path, i): p for (path, _), task in zip(asked, tasks, strict=True) for i, p in task.result().items()}
    return [sum(known[branch[:i], token] for i, token in enumerate(branch)) for branch in branches]


async def _answer(ask: Ask, path: Path, ids: tuple[int, ...]) -> Mapping[int, float]:
    return await ask(path, ids)


class Turns:
    """Keeps texts that list alternatives and requests that name tokens out of each other's batches.

    vLLM's first model runner (on CPU the only one without a CPU build of Triton) reports for a whole batch
    either the likeliest tokens or named ones, so a text would lose its alternatives in that step.
    """

    def __init__(self) -> None:
        self._listing = self._naming = 0
        self._none_named = asyncio.Event()
        self._none_named.set()

    @asynccontextmanager
    async def text(self, decoding: Decoding) -> AsyncIterator[None]:
        """A text runs inside; one with alternatives waits for requests that name tokens to end."""
        if not decoding.top_logprobs:
            yield
            return
        self._listing += 1
        try:
            await self._none_named.wait()
            yield
        finally:
            self._listing -= 1

    @contextmanager
    def naming(self) -> Iterator[bool]:
        """Whether tokens may be named inside; else they must be forced one by one."""
        if self._listing:
            yield False
            return
        self._naming += 1
        self._none_named.clear()
        try:
            yield True
        finally:
            self._naming -= 1
            if not self._naming:
                self._none_named.set()
