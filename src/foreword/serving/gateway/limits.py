"""How much, how long, and for whom: bodies, the queue, deadlines, and clients that go away."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from foreword.serving.gateway.errors import ApiError, refused, unavailable
from foreword.serving.gateway.metrics import Metrics

T = TypeVar("T")
AT_ONCE = 32
"""Inputs of one request that are in the engine at the same time."""


class Gone(ApiError):
    """The client closed the connection; nobody reads the answer."""

    def __init__(self) -> None:
        super().__init__(499, "the client went away", None, "client_gone")


class TooLate(ApiError):
    """The time for a request is over."""

    def __init__(self, seconds: float) -> None:
        super().__init__(504, f"not done within {seconds:g} s", None, "timeout")


class Queue:
    """Counts texts and inputs under way, and takes no more of them than fit."""

    def __init__(self, most: int, metrics: Metrics) -> None:
        self._most, self._metrics = most, metrics
        self._taken = 0

    @contextmanager
    def place(self, count: int) -> Iterator[None]:
        """A place for ``count`` texts or inputs.

        Raises:
            ApiError: there will never be so many places (400), or there are not now (503).
        """
        if count > self._most:
            raise refused(f"{count} texts or inputs in one request; at most {self._most}")
        if self._taken + count > self._most:
            raise unavailable(f"the queue is full ({self._taken} of {self._most}); try again in a moment")
        self._take(count)
        try:
            yield
        finally:
            self._take(-count)

    def _take(self, count: int) -> None:
        self._taken += count
        self._metrics.queued.set(self._taken)


async def read_body(request: Request, most: int, seconds: float) -> bytes:
    """The request's body of at most ``most`` bytes, whether it says its length before or not."""
    too_large = ApiError(413, f"the body is larger than {most} bytes", None, "body_too_large")
    said = request.headers.get("content-length", "")
    if said.isdecimal() and int(said) > most:
        raise too_large
    try:
        body = await asyncio.wait_for(_collected(request, most), seconds)
    except TimeoutError:
        raise TooLate(seconds) from None
    except ClientDisconnect:
        raise Gone from None
    if body is None:
        raise too_large
    return body


async def _collected(request: Request, most: int) -> bytes | None:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            return None
    return bytes(body)


async def watched(work: Coroutine[Any, Any, T], receive: Receive, seconds: float) -> T:
    """The result of ``work``, which is cancelled when the client goes away or its time is over.

    Args:
        work: what to do.
        receive: of the request, its body read.
        seconds: from now.

    Raises:
        Gone: the client closed the connection.
        TooLate: it took longer.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Gone if gone.done() else TooLate(seconds)
    finally:
        await cancelled((task, gone))


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def cancelled(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancels tasks and waits until they have cleaned up."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def all_of(work: Iterable[Awaitable[T]]) -> list[T]:
    """The results of all, a few at a time and in order; the first failure cancels the others."""
    places = asyncio.Semaphore(AT_ONCE)

    async def one(awaitable: Awaitable[T]) -> T:
        async with places:
            return await awaitable

    tasks = [asyncio.ensure_future(one(w)) for w in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await cancelled(tasks)
