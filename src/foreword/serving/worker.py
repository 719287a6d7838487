"""Hosts an engine in a process of its own: ``python -m foreword.serving.worker ENGINE FD``.

``FD`` is one end of a socket pair whose other end the gateway holds. A line of the gateway's is
``{"call": n, "op": name, "body": ...}``; the first is ``start`` with the engine's configuration. The worker
answers in lines ``{"events": [[n, kind, what], ...]}``: all that is ready at the same time travels together.
``kind`` is ``token`` (of a text; the last one says how it finished), ``value`` (what another call returns)
or ``error``. Standard library and numpy only, beside what the engine imports.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from typing import Any

from foreword.errors import ForewordError
from foreword.serving import wire
from foreword.serving.engine import Engine, EngineDown, EngineError, EngineRefused, UnknownPrompt

LOG = logging.getLogger(__name__)
CLOSING = 5.0
"""Seconds an engine has to close once the gateway is gone."""
ERRORS: dict[str, type[Exception]] = {
    c.__name__: c for c in (ForewordError, EngineError, EngineDown, EngineRefused, UnknownPrompt)
}

Make = Callable[[dict[str, Any]], Engine]


def pack_error(error: Exception) -> list[Any]:
    """An exception as JSON; one that is none of ours becomes an EngineError that names it."""
    ours = next((c for c in type(error).__mro__ if c in ERRORS.values()), None)
    if ours is None:
        LOG.error("the engine failed", exc_info=error)
        return [EngineError.__name__, [f"{type(error).__name__}: {error}"]]
    return [ours.__name__, [str(a) for a in error.args]]


def unpack_error(packed: list[Any]) -> Exception:
    """What ``pack_error`` wrote."""
    name, args = packed
    return ERRORS[name](*args)


class Worker:
    """Answers the gateway's calls with one engine."""

    def __init__(self, make: Make, writer: asyncio.StreamWriter) -> None:
        self._make, self._writer = make, writer
        self._engine: Engine | None = None
        self._running: dict[int, asyncio.Task[None]] = {}
        self._ready: list[str] = []

    def take(self, content: bytes) -> None:
        """Begins what a line asks for; one that cannot be read is passed over."""
        try:
            message = wire.parse(content)
            number, op, body = int(message["call"]), message["op"], message.get("body")
        except Exception as e:
            LOG.warning("a malformed line of %d bytes is passed over: %r", len(content), e)
            return
        if op != "abort":
            task = self._running[number] = asyncio.create_task(self._answer(number, op, body))
            task.add_done_callback(lambda _: self._running.pop(number, None))
        elif number in self._running:
            self._running[number].cancel()

    async def close(self) -> None:
        """Ends what is running, and the engine."""
        for task in self._running.values():
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)
        if self._engine is not None:
            await self._engine.close()

    async def _answer(self, number: int, op: str, body: Any) -> None:
        try:
            if op == "generate":
                await self._generate(number, body)
            else:
                self._emit(number, "value", await self._value(op, body))
        except asyncio.CancelledError:  # by the gateway, which no longer listens, or inside the engine
            self._emit(number, "error", pack_error(EngineDown("the engine gave this up")))
            raise
        except Exception as e:
            self._emit(number, "error", pack_error(e))

    async def _generate(self, number: int, body: Mapping[str, Any]) -> None:
        finish = None
        async for token in self._started().generate(wire.unpack_request(body)):
            self._emit(number, "token", wire.pack_token(token))
            finish = token.finish
        if finish is None:
            raise EngineError("the engine's text stopped without an end")

    async def _value(self, op: str, body: Any) -> Any:
        if op == "start":
            self._engine = self._make(body)
            return wire.pack_capabilities(await self._engine.start())
        engine = self._started()
        if op == "score":
            return await engine.score(wire.unpack_score(body))
        if op == "stats":
            return wire.pack_stats(await engine.stats())
        if op == "put":
            await engine.put(wire.unpack_rows(body))
        elif op == "drop":
            await engine.drop(body)
        elif op != "ping":
            raise EngineError(f"unknown operation {op!r}")
        return None

    def _started(self) -> Engine:
        if self._engine is None or not self._engine.alive:
            raise EngineDown("the engine is not running")
        return self._engine

    def _emit(self, number: int, kind: str, what: Any) -> None:
        """Sends an event with all others of this turn of the event loop."""
        event = json.dumps([number, kind, what], separators=(",", ":"))
        if not self._ready:
            asyncio.get_running_loop().call_soon(self._flush)
        self._ready.append(event)

    def _flush(self) -> None:
        self._writer.write(f'{{"events":[{",".join(self._ready)}]}}\n'.encode())
        self._ready.clear()


async def serve(make: Make, fd: int) -> None:
    """Answers until the gateway closes its end or is gone."""
    reader, writer = await asyncio.open_unix_connection(sock=socket.socket(fileno=fd), limit=wire.LINE_LIMIT)
    worker = Worker(make, writer)
    with suppress(ConnectionError):
        while not reader.at_eof():
            if content := await _line(reader):
                worker.take(content)
    await worker.close()
    writer.close()


async def _line(reader: asyncio.StreamReader) -> bytes:
    """The next line; empty at the end, and for one that is too long."""
    try:
        return await reader.readline()
    except ValueError:
        return b""


def _never_outlive_the_gateway(fd: int) -> None:
    """Waits for its end to close, gives the engine some time, and ends all.

    A signal upon the parent's death (PR_SET_PDEATHSIG) would end this process alone and at once, and leave
    vLLM's own processes behind for good: they do not notice.
    """
    poll = select.poll()
    poll.register(fd, 0)  # asks for nothing, so only a hang-up wakes it
    poll.poll()
    time.sleep(CLOSING)
    _end_group()


def _end_group() -> None:
    """Kills this process and all that the engine started, without a word from anybody's exit handlers."""
    os.killpg(os.getpid(), signal.SIGKILL)


def host(make: Make, fd: int) -> None:
    """Runs the worker of an engine that ``make`` makes, in a process that leads its group; does not return."""
    os.set_inheritable(fd, False)
    threading.Thread(target=_never_outlive_the_gateway, args=(fd,), daemon=True).start()
    try:
        asyncio.run(serve(make, fd))
        sys.stdout.flush()
    except Exception:  # also of an engine that prints on closing, when nobody is left to read it
        LOG.exception("the worker failed")
    finally:
        _end_group()


def main(engine: str, fd: str) -> None:
    """Hosts ``foreword.serving.engines.ENGINE``."""
    host(lambda config: import_module(f"foreword.serving.engines.{engine}").make(config), int(fd))


if __name__ == "__main__":
    main(*sys.argv[1:])
