"""Soft prompts by name: loaded when first asked for, kept while in use, the longest unused forgotten first.

Only facts are kept here, about a kB a soft prompt: its rows lie in the engine, and are read again from disk
when the engine starts anew.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from weakref import WeakValueDictionary

from foreword.errors import ForewordError
from foreword.prompts.soft import Kind
from foreword.serving.engine import Engine
from foreword.serving.reading import Content, read_content
from foreword.serving.shelf import Background, Entry, Loaded, Member, Shelf
from foreword.serving.store import NAME_LIMIT, Store, UnknownName, is_name
from foreword.serving.text import Base

__all__ = ["Card", "Loaded", "Member", "Registry", "UnknownName", "Usage"]

log = logging.getLogger("foreword")

READS_AT_ONCE = 4
"""Soft prompts whose rows are in memory at once, between disk and engine."""
_REVISION = re.compile(r"(.+)@([0-9a-f]{12})")


@dataclass(frozen=True)
class Card:
    """What is known of a name: nothing but the name until it is loaded.

    ``tokens``: virtual tokens, the most of any member. ``members``: 1 for a single soft prompt.
    """

    name: str
    loaded: bool = False
    revision: str | None = None
    tokens: int | None = None
    kind: Kind | None = None
    classes: tuple[str, ...] | None = None
    nbytes: int | None = None
    members: int | None = None
    created: int = 0


class Usage(NamedTuple):
    """Bytes of rows in the engine, names loaded, and counters since the start.

    ``hits``: leases that waited for nothing; ``misses``: times that something was read from disk.
    """

    bytes: int
    loaded: int
    hits: int
    misses: int
    evictions: int


class Registry:
    """Soft prompts by name over one engine. For one event loop.

    ``name@revision`` asks for exactly that content; ``BASE:name`` is an alias (BASE: the base's name).

    Args:
        engine: started.
        base: the plain model; its name is no soft prompt's.
        store: where they come from.
        budget_bytes: most bytes of soft prompts in the engine; passed only while all of them are in use.
    """

    def __init__(self, engine: Engine, base: Base, store: Store, budget_bytes: int) -> None:
        if store.knows(base.name):
            raise _called_like_base(base.name)
        self._engine, self._base, self._store, self._budget = engine, base, store, budget_bytes
        self._background = Background()
        self._shelf = Shelf(engine, budget_bytes, self._background)
        self._paths: dict[str, Path] = {}
        """Folders that ``load`` was given for a name."""
        self._unloaded: set[str] = set()
        """Names of the store that are not to be loaded when asked for."""
        self._hits = self._misses = self._serial = 0
        self._reading = asyncio.Semaphore(READS_AT_ONCE)
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @asynccontextmanager
    async def lease(self, name: str) -> AsyncIterator[Loaded]:
        """The content of a name, loaded if need be, and kept in the engine until the block ends.

        Raises:
            UnknownName: there is none, or not of this revision.
            ForewordError: it is damaged, too large, or for another model.
            EngineDown: the engine is not there now, or full of soft prompts that are all in use.
        """
        plain, revision = self._parsed(name)
        entry = await self._acquire(plain)
        try:
            loaded = entry.loaded
            if loaded is None or revision not in ("", loaded.revision):
                raise UnknownName(name)
            yield loaded
        finally:
            self._shelf.release(entry)

    async def load(self, name: str, path: str | None = None, inplace: bool = False) -> Loaded:
        """Loads a name now; one that is loaded already stays as it is, unless ``inplace``.

        Args:
            name: its name.
            path: relative to a folder of the store; None: where the name was found before.
            inplace: read it again: requests that begin later get the new content, running ones keep the old.

        Raises:
            UnknownName: no path given, and the store does not know the name.
            ForewordError: as ``lease``, or the name stands for another folder and not ``inplace``.
            EngineDown: as ``lease``.
        """
        name = self._unaliased(name)
        if not is_name(name):
            fix = f"give 1 to {NAME_LIMIT} printable characters"
            raise ForewordError(f"{name[:NAME_LIMIT]!r} is no name", "name", fix)
        if name == self._base.name:
            raise _called_like_base(name)
        async with self._lock(name):
            folder = await asyncio.to_thread(self._folder, name, path, inplace)
            if not inplace and self._shelf.loaded(name) is not None:
                async with self.lease(name) as loaded:
                    return loaded
            work = self._background.spawn(self._switch(name, folder, keep=path is not None))
            return await asyncio.shield(work)

    async def unload(self, name: str) -> None:
        """Takes a name away until it is loaded again; requests that run with it go on to their end.

        Raises:
            UnknownName: there is none.
        """
        plain = self._unaliased(name)
        async with self._lock(plain):
            if not await self._is_known(plain):
                raise UnknownName(name)
            if await asyncio.to_thread(self._store.knows, plain):
                self._unloaded.add(plain)
            self._paths.pop(plain, None)
            self._shelf.remove(plain)

    def cards(self) -> list[Card]:
        """All names, sorted. Blocks for some 10 ms per 1,000."""
        loaded = {found.name: found for found in self._shelf.all_loaded()}
        names = (set(self._store.names()) - self._unloaded) | self._paths.keys() | loaded.keys()
        return [_card(name, loaded.get(name)) for name in sorted(names)]

    async def card(self, name: str) -> Card:
        """What is known of one name, without loading it; raises UnknownName."""
        plain, revision = self._parsed(name)
        if not await self._is_known(plain):
            raise UnknownName(name)
        found = _card(plain, self._shelf.loaded(plain))
        if revision not in ("", found.revision):
            raise UnknownName(name)
        return found

    def usage(self) -> Usage:
        """What is held now, and how it went so far."""
        loaded = sum(1 for _ in self._shelf.all_loaded())
        return Usage(self._shelf.used, loaded, self._hits, self._misses, self._shelf.evictions)

    async def close(self) -> None:
        """Waits for what is still being read or dropped."""
        await self._background.settle()

    # --- names -----------------------------------------------------------------------------------

    def _unaliased(self, name: str) -> str:
        return name.removeprefix(f"{self._base.name}:")

    def _parsed(self, name: str) -> tuple[str, str]:
        """Name and revision (empty: whichever)."""
        name = self._unaliased(name)
        found = _REVISION.fullmatch(name) if self._shelf.loaded(name) is None else None
        return (found[1], found[2]) if found else (name, "")

    async def _is_known(self, name: str) -> bool:
        if name in self._paths or self._shelf.loaded(name) is not None:
            return True
        return name not in self._unloaded and await asyncio.to_thread(self._store.knows, name)

    def _folder(self, name: str, path: str | None, inplace: bool) -> Path:
        """The folder to load; blocks."""
        if path is None:
            if inplace:
                self._store.renew(name)
            return self._paths.get(name) or self._store.find(name)
        folder = self._store.inside(path)
        taken = self._paths.get(name) or (self._store.find(name) if self._store.knows(name) else None)
        if taken not in (None, folder) and not inplace:
            raise ForewordError(
                f"the name {name!r} stands for another folder", "path", "load_inplace: true, or another name"
            )
        return folder

    # --- loading ---------------------------------------------------------------------------------

    async def _acquire(self, name: str) -> Entry:
        """The entry of a name, ready and leased."""
        entry = self._shelf.get(name)
        if entry is None:
            if name in self._unloaded or not is_name(name):
                raise UnknownName(name)
            entry = Entry(name)
            self._shelf.add(entry)
        elif entry.loading is None and entry.epoch == self._engine.epoch:
            self._hits += 1
        self._shelf.lease(entry)
        try:
            while entry.loading is not None or entry.epoch != self._engine.epoch:
                if entry.loading is None:
                    entry.loading = self._background.spawn(self._bring(entry, None))
                await asyncio.shield(entry.loading)
        except BaseException:
            self._shelf.release(entry)
            raise
        return entry

    async def _switch(self, name: str, folder: Path, keep: bool) -> Loaded:
        """Loads a folder beside what the name has now, then puts it in its place."""
        old, entry = self._shelf.get(name), Entry(name)
        if old is not None:
            self._shelf.lease(old)  # making room for the new content must not cost the old one
        try:
            await self._bring(entry, folder)
        finally:
            if old is not None:
                self._shelf.release(old)
        loaded = entry.loaded
        assert loaded is not None, "bringing it sets it, or raises"
        self._shelf.add(entry)
        self._unloaded.discard(name)
        if keep:
            self._paths[name] = folder
        return loaded

    async def _bring(self, entry: Entry, folder: Path | None) -> None:
        """Reads a content and puts it into the engine; again, when the engine has started anew."""
        self._shelf.lease(entry)
        try:
            epoch = self._engine.epoch
            folder = folder or self._paths.get(entry.name)
            if folder is None:
                folder = await asyncio.to_thread(self._store.find, entry.name)
            async with self._reading:
                content = await asyncio.to_thread(self._read, entry.name, folder)
                loaded = self._described(entry, content)
                await self._shelf.put(entry, loaded, [p.values for p in content.parts])
            entry.epoch = epoch
            self._misses += 1
        except BaseException:
            self._shelf.fail(entry)
            raise
        finally:
            entry.loading = None
            self._shelf.release(entry)

    def _read(self, name: str, folder: Path) -> Content:
        """The content of a folder; blocks. Its errors name the soft prompt and not the server's folders."""
        try:
            return read_content(folder, self._store.home(folder), self._base.capabilities, self._budget)
        except ForewordError as e:
            log.warning("soft prompt %r is not loaded: %s (%s)", name, e.what, e.where)
            raise ForewordError(e.what, f"soft prompt {name!r}", e.fix) from e

    def _described(self, entry: Entry, content: Content) -> Loaded:
        """The facts of a content. Keys are new with every loading, so that dropping an old one never hits a new one."""
        if entry.loaded is not None and entry.loaded.revision == content.revision:
            return entry.loaded
        self._serial += 1
        stem = f"{entry.name}@{content.revision}.{self._serial}"
        members = []
        for i, part in enumerate(content.parts):
            tokens = len(part.values)
            reader = self._base.reader(part.task, tokens, part.kind)
            members.append(Member(f"{stem}/{i}", reader, tokens, part.kind, part.values.nbytes))
        return Loaded(entry.name, content.revision, tuple(members), content.created)

    def _lock(self, name: str) -> asyncio.Lock:
        """One ``load`` or ``unload`` of a name at a time."""
        found = self._locks.get(name)
        if found is None:
            found = self._locks[name] = asyncio.Lock()
        return found


def _card(name: str, loaded: Loaded | None) -> Card:
    if loaded is None:
        return Card(name)
    first = loaded.members[0]
    tokens = max(m.tokens for m in loaded.members)
    return Card(
        name, True, loaded.revision, tokens, first.kind, first.reader.classes, loaded.nbytes, len(loaded.members),
        loaded.created,
    )  # fmt: skip


def _called_like_base(name: str) -> ForewordError:
    return ForewordError("a soft prompt is called like the plain model", name, "rename its folder, or the model")
