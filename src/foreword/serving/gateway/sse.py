"""Server-sent events: a stream that a client cannot stall, and that says how it ended."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing

import anyio
from starlette.types import Receive, Scope, Send

from foreword.serving.gateway.errors import ApiError, as_api_error
from foreword.serving.gateway.limits import Gone, watched
from foreword.serving.gateway.logs import LOG, Call

DONE = "[DONE]"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # a proxy in front passes each event on as it comes
]


class EventStream:
    """A response of events. The status is sent with the first one, so what fails before is a plain error.

    Args:
        events: JSON texts; closed when the client goes away, stalls or is out of time.
        call: the request.
        seconds: most time of the whole stream.
        stall: most seconds that a client leaves it unread once the connection's buffers are full.
    """

    def __init__(self, events: AsyncGenerator[str, None], call: Call, seconds: float, stall: float) -> None:
        self.events, self.call, self.seconds, self.stall = events, call, seconds, stall
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        try:
            await watched(self._pass_on(send), receive, max(self.seconds - self.call.seconds, 0.0))
        except Exception as e:
            error = as_api_error(e)
            if not self._begun:
                raise
            if error is None:
                LOG.exception("request %s failed in its stream", self.call.id)
            await self._break_off(send, error or ApiError(500, "internal error; the server's log has it"))

    async def _pass_on(self, send: Send) -> None:
        async with aclosing(self.events) as events:
            async for event in events:
                await self._send(send, event)
        await self._send(send, DONE, more=False)

    async def _break_off(self, send: Send, error: ApiError) -> None:
        """Says what happened, and ends the stream."""
        self.call.error = error.code or str(error.status)
        if not isinstance(error, Gone):
            await self._send(send, json.dumps(error.body()))
            await self._send(send, DONE, more=False)

    async def _send(self, send: Send, event: str, more: bool = True) -> None:
        if not self._begun:
            self._begun = True
            await send({"type": "http.response.start", "status": 200, "headers": list(_HEADERS)})
        try:
            with anyio.fail_after(self.stall):
                await send({"type": "http.response.body", "body": f"data: {event}\n\n".encode(), "more_body": more})
        except TimeoutError:
            raise Gone from None
