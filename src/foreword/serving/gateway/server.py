"""A server from its settings: socket, engine, application, and how it stops."""

from __future__ import annotations

import asyncio
import math
import signal
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import uvicorn
from starlette.applications import Starlette

from foreword.errors import ForewordError
from foreword.serving.engine import Engine
from foreword.serving.gateway.app import create_app
from foreword.serving.gateway.service import Gateway
from foreword.serving.registry import Registry
from foreword.serving.settings import MB, ServeSettings, check_settings
from foreword.serving.store import Store
from foreword.serving.text import open_base

LAST_SECONDS = 5.0
"""For streams to say how they end, once the time for finishing is over."""
KEEP_ALIVE_SECONDS = 65
"""Longer than the usual 60 of proxies in front, which must be the first to close."""
LOOK_SECONDS = 0.1
Say = Callable[[str], None]


def run(settings: ServeSettings, engine: Engine, say: Say) -> None:
    """Serves until it is told to stop.

    Args:
        settings: what to serve, to whom.
        engine: not started yet.
        say: told where it can be reached, once it can.

    Raises:
        SystemExit: SIGTERM came; code 0.
        KeyboardInterrupt: Ctrl-C came.
    """
    # uvicorn raises a signal again once it has stopped gently: then this one ends the process in peace.
    signal.signal(signal.SIGTERM, _leave)
    asyncio.run(serve(settings, engine, say))


def _leave(number: int, frame: Any) -> None:
    raise SystemExit(0)


async def serve(settings: ServeSettings, engine: Engine, say: Say) -> None:
    """The same on an event loop that is there already."""
    store = Store(check_settings(settings).prompts)
    listener = bound(settings.host, settings.port, settings.stall_seconds)
    try:
        known = await engine.start()
        base = await open_base(settings.model, known, settings.name, settings.revision)
        registry = Registry(engine, base, store, settings.prompt_memory * MB)
        app = create_app(settings, engine, registry, base)
        say(start_line(settings, app.state.gateway, listener))
        await until_stopped(app, listener, settings.grace)
        await registry.close()
    finally:
        listener.close()
        await to_its_end(engine.close())


async def to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Waits for work that Ctrl-C must not leave half done; asyncio makes a cancellation of it."""
    task, cancelled = asyncio.create_task(work), False
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            cancelled = True
    task.result()
    if cancelled:
        raise asyncio.CancelledError


def start_line(settings: ServeSettings, gateway: Gateway, listener: socket.socket) -> str:
    """What a person wants to know of a server that has started."""
    host, port = listener.getsockname()[:2]
    count = len(gateway.registry.cards())
    prompts = f"{count} soft prompt{'' if count == 1 else 's'}"
    keys = "no key needed from this machine" if settings.open else "keys needed"
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    return f"{address} serves {gateway.base.name} with {prompts} ({gateway.base.capabilities.engine}; {keys})"


def bound(host: str, port: int, unread: float) -> socket.socket:
    """A socket that has its address but does not listen yet: until the model is there, nobody gets through.

    A client that leaves its bytes unread for ``unread`` seconds loses its connection, which closing alone would
    not take from it (where the system knows how: Linux).
    """
    listener = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(unread * 1000))
        listener.bind(address)
    except OSError as e:
        if listener is not None:
            listener.close()
        raise ForewordError(
            f"cannot listen on {host}, port {port}: {e.strerror}", "--host, --port", "give another --port; 0: any"
        ) from None
    return listener


async def until_stopped(app: Starlette, listener: socket.socket, grace: float) -> None:
    """Serves on a bound socket until SIGTERM or Ctrl-C; then running requests have ``grace`` seconds to end."""
    server = uvicorn.Server(server_config(app, grace))
    ending = asyncio.create_task(_end_gently(server, app.state.gateway, grace))
    try:
        await server.serve(sockets=[listener])
    finally:
        ending.cancel()


def server_config(app: Starlette, grace: float) -> uvicorn.Config:
    """uvicorn without what the gateway does itself."""
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=math.ceil(grace + LAST_SECONDS),
    )


async def _end_gently(server: uvicorn.Server, gateway: Gateway, grace: float) -> None:
    """Refuses new requests as soon as the server stops, and ends what still runs after ``grace`` seconds."""
    while not server.should_exit:
        await asyncio.sleep(LOOK_SECONDS)
    gateway.closing = True
    await asyncio.sleep(grace)
    await gateway.abort_all()
