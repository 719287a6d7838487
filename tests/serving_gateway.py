"""A gateway with a real engine in a thread of its own, on free loopback ports."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import httpx
import uvicorn

import serving_parts as parts
from foreword.artifact.ensemble import write_ensemble
from foreword.records import Task
from foreword.serving.engine import Engine
from foreword.serving.engines.transformers import TransformersConfig, TransformersEngine
from foreword.serving.gateway.app import create_app
from foreword.serving.gateway.server import bound, server_config
from foreword.serving.gateway.service import Gateway
from foreword.serving.registry import Registry
from foreword.serving.settings import MB, ServeSettings
from foreword.serving.store import Store
from foreword.serving.text import Base, open_base

T = TypeVar("T")
SOON = 30.0
"""Seconds after which a test gives up waiting."""
BASE = "tiny-llama"
CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
FREE_TEXT = Task("Say : {text}", " ", "answer")
PAIRS = Task("{title} : {body} Label :", " ", "label", ("complaint", "praise"), ("complaint", "thank you"))


def make_store(folder: Path) -> Path:
    """Soft prompts of many kinds below a folder."""
    parts.soft_prompt(folder / "tweets", seed=1)
    parts.soft_prompt(folder / "other", seed=2, tokens=7)
    parts.soft_prompt(folder / "bare", seed=3, task=None)
    parts.soft_prompt(folder / "writes", seed=4, task=FREE_TEXT)
    parts.soft_prompt(folder / "pairs", seed=5, task=PAIRS)
    parts.soft_prompt(folder / "prefix", seed=6, kind="prefix")
    write_ensemble(folder / "both", [folder / "tweets", folder / "other"])
    return folder


@dataclass
class World:
    """An engine, its soft prompts and the event loop that all of it lives on."""

    loop: asyncio.AbstractEventLoop
    engine: Engine
    base: Base
    registry: Registry
    settings: ServeSettings

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of something done on the loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(SOON)

    @contextmanager
    def server(self, **changed: Any) -> Iterator[Served]:
        """A server over the engine with these settings."""
        settings = replace(self.settings, **changed)
        app = create_app(settings, self.engine, self.registry, self.base)
        listener = bound("127.0.0.1", 0, settings.stall_seconds)
        server = uvicorn.Server(server_config(app, 1.0))
        done = asyncio.run_coroutine_threadsafe(server.serve(sockets=[listener]), self.loop)
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            with httpx.Client(base_url=address, timeout=SOON) as client:
                _wait_for(client)
                yield Served(address, client, app.state.gateway, self, server)
        finally:
            server.should_exit = True
            done.result(SOON)
            listener.close()


@dataclass
class Served:
    """A running server, and a client of it."""

    address: str
    client: httpx.Client
    gateway: Gateway
    world: World
    server: uvicorn.Server

    def post(self, path: str, /, **body: Any) -> httpx.Response:
        """A request with a JSON body."""
        return self.client.post(path, json=body)


def _wait_for(client: httpx.Client) -> None:
    deadline = threading.Event()
    for _ in range(200):
        try:
            client.get("/health")
            return
        except httpx.ConnectError:
            deadline.wait(0.02)
    raise AssertionError("the server does not listen")


@contextmanager
def world(engine: Engine, model: Path, store: Path, **settings: Any) -> Iterator[World]:
    """Starts an engine on an event loop in another thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    chosen = ServeSettings(model=str(model), prompts=(str(store),), **settings)

    async def begin() -> World:
        return World(loop, engine, *await opened(engine, chosen), chosen)

    try:
        yield asyncio.run_coroutine_threadsafe(begin(), loop).result(2 * SOON)
    finally:
        asyncio.run_coroutine_threadsafe(engine.close(), loop).result(SOON)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(SOON)
        loop.close()


async def opened(engine: Engine, settings: ServeSettings) -> tuple[Base, Registry]:
    """The model and the soft prompts of an engine, which is started."""
    base = await open_base(settings.model, await engine.start(), BASE)
    return base, Registry(engine, base, Store(settings.prompts), settings.prompt_memory * MB)


def with_chat_template(model: Path, folder: Path) -> Path:
    """The same model in another folder, with a chat template."""
    shutil.copytree(model, folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


def tiny_engine(model: Path) -> TransformersEngine:
    """The embedded engine over a tiny model."""
    return TransformersEngine(TransformersConfig(str(model), kv_memory=8, prompt_memory=4))


@contextmanager
def tiny_world(model: Path, store: Path, **settings: Any) -> Iterator[World]:
    """The same, started."""
    with world(tiny_engine(model), model, store, **settings) as made:
        yield made
