"""One line of JSON on stderr for every request: never a key, never a text."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from dataclasses import dataclass, field

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from foreword.serving.gateway.auth import Caller
from foreword.serving.gateway.errors import ApiError
from foreword.serving.gateway.metrics import Metrics

LOG = logging.getLogger("foreword.serving.requests")
_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


@dataclass
class Call:
    """A request as it is remembered: filled in while it is answered."""

    id: str
    caller: Caller = field(default_factory=Caller)
    began: float = field(default_factory=time.perf_counter)
    model: str = ""
    """The soft prompt's or plain model's name, once it is known to be one."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str = ""
    """What ended it otherwise than its status says."""

    @property
    def seconds(self) -> float:
        """Since it came."""
        return time.perf_counter() - self.began


class RequestLog:
    """Numbers requests, answers what nobody else has caught, and writes a line for each."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        call = Call(request_id(Headers(scope=scope)))
        scope.setdefault("state", {})["call"] = call
        status = 0

        async def numbered(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = call.id
                MutableHeaders(scope=message)["X-Content-Type-Options"] = "nosniff"
            await send(message)

        try:
            await self.app(scope, receive, numbered)
        except Exception:
            LOG.exception("request %s failed", call.id)
            call.error = "internal"
            if not status:
                await ApiError(500, "internal error; the server's log has it").response()(scope, receive, numbered)
        finally:
            self._write(scope, call, status)

    def _write(self, scope: Scope, call: Call, status: int) -> None:
        self.metrics.answered(scope["path"], status)
        line = {
            "request": call.id,
            "method": scope["method"],
            "path": scope["path"][:256],
            "status": status,
            "model": call.model,
            "prompt_tokens": call.prompt_tokens,
            "completion_tokens": call.completion_tokens,
            "ms": round(call.seconds * 1000, 1),
            "key": call.caller.fingerprint,
            "error": call.error,
        }
        LOG.info("%s", json.dumps({k: v for k, v in line.items() if v != ""}))


def request_id(headers: Headers) -> str:
    """The client's own id where it is a plain word, else a new one."""
    given = headers.get("x-request-id", "")
    return given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex
