"""Texts as they are written, given to the client whole or as a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from typing import Protocol

from starlette.responses import Response
from starlette.types import ASGIApp

from foreword.serving.gateway.logs import Call
from foreword.serving.gateway.schema import Generation
from foreword.serving.gateway.service import Gateway
from foreword.serving.gateway.sse import EventStream
from foreword.serving.gateway.texts import Order, Piece, Tally, write


class Reply(Protocol):
    """How texts look to a client: JSON of OpenAI's completions, or of its chats."""

    def whole(self, texts: Sequence[Piece], tally: Tally) -> str:
        """The answer of a request that is no stream."""

    def events(self, piece: Piece, first: bool) -> Iterable[str]:
        """The events of one piece; ``first`` of its text."""

    def last(self, tally: Tally) -> str:
        """The event that brings the usage."""


async def answer(gateway: Gateway, body: Generation, order: Order, reply: Reply, call: Call) -> ASGIApp:
    """Has an order written, and gives it as the request wants it."""
    tally = Tally()
    pieces = write(gateway, order, call, tally)
    if body.stream:
        settings, events = gateway.settings, _events(pieces, reply, tally, with_usage(body))
        return EventStream(events, call, settings.request_seconds, settings.stall_seconds)
    texts: dict[int, list[Piece]] = {}
    async with aclosing(pieces):
        async for piece in pieces:
            texts.setdefault(piece.index, []).append(piece)
    whole = reply.whole([joined(texts[i]) for i in sorted(texts)], tally)
    return Response(whole, media_type="application/json")


def with_usage(body: Generation) -> bool:
    """Whether a stream ends with its usage."""
    return bool(body.stream_options and body.stream_options.include_usage)


def joined(pieces: Sequence[Piece]) -> Piece:
    """A text from its pieces."""
    rows = tuple(row for piece in pieces for row in piece.rows)
    return Piece(pieces[0].index, "".join(p.text for p in pieces), rows, pieces[-1].finish)


async def _events(
    pieces: AsyncGenerator[Piece, None], reply: Reply, tally: Tally, usage: bool
) -> AsyncGenerator[str, None]:
    begun: set[int] = set()
    async with aclosing(pieces):
        async for piece in pieces:
            for event in reply.events(piece, piece.index not in begun):
                yield event
            begun.add(piece.index)
    if usage:
        yield reply.last(tally)
