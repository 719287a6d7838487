"""Writing texts: from contexts to pieces of text as they come, for completions and chats alike."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TypeVar, cast

from foreword.serving.engine import Decoding, Finish, Request, Token
from foreword.serving.gateway.errors import refused
from foreword.serving.gateway.limits import cancelled
from foreword.serving.gateway.logs import Call
from foreword.serving.gateway.service import Gateway, Ids, Writer, reading, retried_stream
from foreword.serving.gateway.stops import Stops
from foreword.serving.text import Base

T = TypeVar("T")
BUFFER = 64
"""Pieces of several texts that wait for their client; beyond it they wait in the engine's queues."""


@dataclass(frozen=True)
class Order:
    """What a request wants written.

    ``texts``: what is to be read, for its length alone. ``contexts``: reads it for a soft prompt. ``count``: how
    many contexts that gives. ``n``: texts of each. ``max_tokens``: None for as many as fit.
    """

    model: str
    texts: Sequence[str]
    contexts: Callable[[Writer], list[Ids]]
    count: int
    n: int
    stops: tuple[str, ...]
    decoding: Decoding
    max_tokens: int | None


@dataclass(frozen=True)
class Row:
    """A token with its log-probability and its alternatives', likeliest first."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Piece:
    """More of text ``index``. The last one says how it finished."""

    index: int
    text: str = ""
    rows: tuple[Row, ...] = ()
    finish: Finish | None = None


@dataclass
class Tally:
    """Tokens of a request so far."""

    prompt: int = 0
    virtual: int = 0
    cached: int = 0
    completion: int = 0


@dataclass
class Shown:
    """What of a text may be shown: its pieces without stop strings, and the tokens they are made of.

    A token is shown with the last of its text; tokens of a stop string never are.
    """

    base: Base
    stops: Stops
    hidden: frozenset[int]
    """Tokens that end a text and are no part of it."""
    _rows: list[tuple[int, Row]] = field(default_factory=list)
    _read: int = 0
    _shown: int = 0

    def __post_init__(self) -> None:
        self._decoder = self.base.decoder()

    def step(self, token: Token) -> tuple[str, tuple[Row, ...]]:
        """What a token brings."""
        came = "" if token.id < 0 or token.id in self.hidden else self._decoder.step(token.id)
        self._read += len(came)
        if token.id >= 0 and token.logprob is not None and token.id not in self.hidden:
            self._rows.append((self._read, Row(token.id, token.logprob, token.top)))
        text = self.stops.feed(came)
        if token.finish and not self.stops.found:
            left = self._decoder.finish()
            self._read += len(left)
            text += self.stops.feed(left) + ("" if self.stops.found else self.stops.rest())
        self._shown += len(text)
        return text, self._ready()

    def _ready(self) -> tuple[Row, ...]:
        ready = tuple(row for end, row in self._rows if end <= self._shown)
        self._rows = self._rows[len(ready) :]
        return ready


async def write(gateway: Gateway, order: Order, call: Call, tally: Tally) -> AsyncGenerator[Piece, None]:
    """All texts of an order, piece by piece as they come. Closing it aborts them."""
    gateway.check_open()
    with gateway.queue.place(order.count * order.n):
        async with aclosing(retried_stream(lambda: _attempt(gateway, order, call, tally))) as pieces:
            async for piece in pieces:
                yield piece


async def _attempt(gateway: Gateway, order: Order, call: Call, tally: Tally) -> AsyncGenerator[Piece, None]:
    async with gateway.target(order.model) as target:
        call.model = target.name
        writer = target.writer()
        contexts = await reading(gateway.base, order.texts, lambda: order.contexts(writer))
        rooms = [_room(gateway, order, len(ids) + writer.unseen) for ids in contexts]
        tally.prompt = call.prompt_tokens = sum(len(ids) + writer.unseen for ids in contexts)
        tally.virtual = writer.tokens * len(contexts)
        requests = [
            _request(order, writer, call, ids, room, at)
            for ids, room in zip(contexts, rooms, strict=True)
            for at in range(order.n)
        ]
        streams = [_text(gateway, r, i, order.stops, call, tally) for i, r in enumerate(requests)]
        async with aclosing(streams[0] if len(streams) == 1 else merged(streams)) as pieces:
            async for piece in pieces:
                yield piece


def _room(gateway: Gateway, order: Order, context: int) -> int:
    """Tokens a text may have behind this context."""
    window, wanted = gateway.base.capabilities.window, order.max_tokens
    room = window - context
    if room < 1 or (wanted is not None and wanted > room):
        asked = f"and {wanted} for the answer" if wanted is not None else "leaving none for the answer"
        raise refused(
            f"the model's context has {window} tokens; this request has {context} (virtual ones included) {asked}",
            "max_tokens" if room > 0 else None,
            "context_length_exceeded",
        )
    return min(room, gateway.settings.max_tokens) if wanted is None else wanted


def _request(order: Order, writer: Writer, call: Call, ids: Ids, room: int, at: int) -> Request:
    seed = order.decoding.seed
    decoding = replace(order.decoding, max_tokens=room, seed=None if seed is None else (seed + at) % 2**63)
    return Request(uuid.uuid4().hex, ids, writer.key, decoding, call.caller.salt)


async def _text(
    gateway: Gateway, request: Request, index: int, stops: Sequence[str], call: Call, tally: Tally
) -> AsyncGenerator[Piece, None]:
    """One text; leaving it early makes the engine stop."""
    shown = Shown(gateway.base, Stops(stops), frozenset(request.decoding.stop_ids))
    with gateway.writing(request.id), gateway.metrics.text(call.model, len(request.ids), call.seconds) as record:
        tokens = cast("AsyncGenerator[Token, None]", gateway.engine.generate(request))
        async with aclosing(tokens):
            async for token in tokens:
                record.token(token)
                tally.cached += token.cached
                tally.completion += token.id >= 0
                call.completion_tokens = tally.completion
                text, rows = shown.step(token)
                finish = "stop" if shown.stops.found else token.finish
                record.finish = finish or record.finish
                if text or rows or finish:
                    yield Piece(index, text, rows, finish)
                if finish:
                    return


async def merged(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """Items of several streams as they come. The first failure, or closing it, closes all of them."""
    queue: asyncio.Queue[T | Exception | None] = asyncio.Queue(BUFFER)

    async def pump(stream: AsyncGenerator[T, None]) -> None:
        try:
            async with aclosing(stream) as items:
                async for item in items:
                    await queue.put(item)
            await queue.put(None)
        except Exception as e:
            await queue.put(e)

    tasks = [asyncio.create_task(pump(s)) for s in streams]
    left = len(tasks)
    try:
        while left:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        await cancelled(tasks)
