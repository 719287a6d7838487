"""What lies in the engine: soft prompts in use, and of the others the last used, as many as the budget holds."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foreword.prompts.soft import Kind
from foreword.records import Task
from foreword.serving.engine import Engine, EngineDown, EngineError, EngineRefused, Rows
from foreword.serving.text import Reader


@dataclass(frozen=True, slots=True)
class Member:
    """One soft prompt in the engine. ``key`` is the engine's name for it; ``tokens`` is its length ``P``."""

    key: str
    reader: Reader
    tokens: int
    kind: Kind
    nbytes: int

    @property
    def unseen(self) -> int:
        """Virtual tokens that have no ids in a context: those of a prefix."""
        return self.tokens if self.kind == "prefix" else 0


@dataclass(frozen=True, slots=True)
class Loaded:
    """A name's content: one member, or those of an ensemble.

    ``revision``: first 12 hexadecimal digits of the SHA-256 over weights, configuration and sidecar.
    ``created``: when its configuration was written, in seconds since 1970.
    """

    name: str
    revision: str
    members: tuple[Member, ...]
    created: int

    @property
    def task(self) -> Task | None:
        """What it does; None where no sidecar says it. An ensemble's members have the same classes and columns."""
        return self.members[0].reader.task

    @property
    def nbytes(self) -> int:
        """Bytes of its rows in float32."""
        return sum(m.nbytes for m in self.members)


class Background:
    """Work that goes on when whoever waits for it is cancelled."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Begins work; wait for it with ``asyncio.shield``."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    async def settle(self) -> None:
        """Returns when all of it is done."""
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # seen: those who wait for it get it too


class Entry:
    """One content of one name, from the beginning of its loading until nobody uses it.

    ``leases`` counts who uses it or waits for it, its own loading included: what is leased is not dropped.
    """

    __slots__ = ("epoch", "leases", "loaded", "loading", "name", "retired")

    def __init__(self, name: str) -> None:
        self.name = name
        self.loaded: Loaded | None = None
        self.loading: asyncio.Task[None] | None = None
        self.leases = 0
        self.epoch = -1
        """The engine's start in which its rows were put."""
        self.retired = False
        """No new lease is given out; it is dropped when the last one ends."""


class Shelf:
    """Entries by name, each with its rows in the engine."""

    def __init__(self, engine: Engine, budget: int, background: Background) -> None:
        self._engine, self._budget, self._background = engine, budget, background
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        """The longest unused first."""
        self.used = 0
        """Bytes in the engine, those of retired entries in use included."""
        self.evictions = 0

    def get(self, name: str) -> Entry | None:
        """What the name has now, be it still on its way."""
        return self._entries.get(name)

    def loaded(self, name: str) -> Loaded | None:
        """The content of the name, if it is there."""
        entry = self._entries.get(name)
        return entry.loaded if entry else None

    def all_loaded(self) -> Iterator[Loaded]:
        """All contents that are there."""
        return (e.loaded for e in self._entries.values() if e.loaded is not None)

    def add(self, entry: Entry) -> None:
        """Gives the name this entry; the one it had is retired."""
        self.remove(entry.name)
        self._entries[entry.name] = entry

    def remove(self, name: str) -> None:
        """Takes the name away at once, and its content when nobody uses it any more."""
        entry = self._entries.pop(name, None)
        if entry is not None:
            entry.retired = True
            if entry.leases == 0:
                self._discard(entry)

    def lease(self, entry: Entry) -> None:
        """Keeps it until it is released, and makes it the last used."""
        entry.leases += 1
        if self._entries.get(entry.name) is entry:
            self._entries.move_to_end(entry.name)

    def release(self, entry: Entry) -> None:
        """Ends one lease."""
        entry.leases -= 1
        if entry.leases == 0 and entry.retired:
            self._discard(entry)
        elif entry.leases == 0 and self.used > self._budget:
            self._background.spawn(self._shrink())

    def fail(self, entry: Entry) -> None:
        """Retires a leased entry that could not be loaded."""
        if self._entries.get(entry.name) is entry:
            del self._entries[entry.name]
        entry.retired = True

    async def put(self, entry: Entry, loaded: Loaded, values: Sequence[NDArray[np.float32]]) -> None:
        """Puts a content into the engine under a leased entry, in place of one that an earlier start had."""
        before = entry.loaded
        self.used += loaded.nbytes - (before.nbytes if before else 0)
        entry.loaded = loaded
        if before is not None and before is not loaded:
            await self._drop(before)  # it is there if the engine began anew while it was read
        await self._shrink()
        for member, rows in zip(loaded.members, values, strict=True):
            packed = Rows(member.key, rows, member.kind)
            try:
                await self._engine.put(packed)
            except EngineRefused as e:
                await self._put_again(packed, e)

    async def _put_again(self, rows: Rows, refused: EngineRefused) -> None:
        """Into an engine with less room than the budget says: the longest unused make place."""
        await self._evict(rows.values.nbytes)
        try:
            await self._engine.put(rows)
        except EngineRefused:
            raise EngineDown(f"no room beside the soft prompts in use: {refused}") from refused

    async def _shrink(self) -> None:
        await self._evict(self.used - self._budget)

    async def _evict(self, excess: int) -> None:
        """Drops what is longest unused until so many bytes are free; what is leased stays."""
        victims = []
        for entry in self._entries.values():
            if excess <= 0:
                break
            if entry.leases == 0 and entry.loaded is not None:
                victims.append(entry.loaded)
                excess -= entry.loaded.nbytes
        for loaded in victims:
            del self._entries[loaded.name]
            self.used -= loaded.nbytes
            self.evictions += 1
        for loaded in victims:
            await self._drop(loaded)

    def _discard(self, entry: Entry) -> None:
        if entry.loaded is not None:
            self.used -= entry.loaded.nbytes
            self._background.spawn(self._drop(entry.loaded))

    async def _drop(self, loaded: Loaded) -> None:
        for member in loaded.members:
            with suppress(EngineError):  # an engine that is gone has forgotten it
                await self._engine.drop(member.key)
