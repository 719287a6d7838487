"""What all endpoints share: the engine, the soft prompts, and how a model's name becomes one of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from foreword.records import Row
from foreword.serving.engine import Engine, UnknownPrompt
from foreword.serving.gateway.errors import refused, unavailable
from foreword.serving.gateway.limits import Queue
from foreword.serving.gateway.logprobs import Vocabulary
from foreword.serving.gateway.metrics import Metrics
from foreword.serving.registry import Loaded, Member, Registry
from foreword.serving.settings import ServeSettings
from foreword.serving.text import Base, Reader

T = TypeVar("T")
Ids = tuple[int, ...]
QUICK = 8192
"""Characters that are tokenised on the spot (a millisecond or two); more go to another thread."""
MOST_PER_TOKEN = 32
"""Characters a token may have on average before a text is refused unread."""


@dataclass
class Gateway:
    """A running gateway. ``running``: ids of texts being written. ``closing``: no more requests are taken."""

    settings: ServeSettings
    engine: Engine
    registry: Registry
    base: Base
    metrics: Metrics
    queue: Queue
    vocabulary: Vocabulary
    running: set[str] = field(default_factory=set)
    closing: bool = False

    def check_open(self) -> None:
        """Refuses new work while the engine is down or the server is stopping."""
        if self.closing:
            raise unavailable("the server is stopping")
        if not self.engine.alive:
            raise unavailable("the model is starting again; try again in a moment")

    @asynccontextmanager
    async def target(self, model: str) -> AsyncIterator[Target]:
        """What a request's ``model`` means, kept loaded until the block ends."""
        if model == self.base.name:
            yield Target(model, self.base)
            return
        async with self.registry.lease(model) as loaded:
            yield Target(loaded.name, self.base, loaded)

    @contextmanager
    def writing(self, request_id: str) -> Iterator[None]:
        """A text under way."""
        self.running.add(request_id)
        try:
            yield
        finally:
            self.running.discard(request_id)

    async def abort_all(self) -> None:
        """Ends all texts being written, each with finish "abort"."""
        await asyncio.gather(*(self.engine.abort(i) for i in list(self.running)))


@dataclass(frozen=True)
class Target:
    """The plain model, or what a soft prompt's name stands for."""

    name: str
    base: Base
    loaded: Loaded | None = None

    @property
    def members(self) -> tuple[Member | None, ...]:
        """The soft prompts that answer together; None: the plain model."""
        return self.loaded.members if self.loaded else (None,)

    def writer(self) -> Writer:
        """The only member, for writing text."""
        if len(self.members) != 1:
            raise refused(f"'{self.name}' is an ensemble, which classifies and writes no text", "model")
        return Writer(self.base, self.members[0])


@dataclass(frozen=True)
class Writer:
    """Reads contexts for the plain model or for one soft prompt."""

    base: Base
    member: Member | None

    @property
    def key(self) -> str | None:
        """The engine's name of the soft prompt."""
        return self.member.key if self.member else None

    @property
    def tokens(self) -> int:
        """Virtual tokens."""
        return self.member.tokens if self.member else 0

    @property
    def unseen(self) -> int:
        """Those of them that have no ids in a context: a prefix."""
        return self.member.unseen if self.member else 0

    @property
    def reader(self) -> Reader | None:
        """The soft prompt's reader."""
        return self.member.reader if self.member else None

    def text(self, text: str) -> Ids:
        """A text as it is."""
        return self.reader.raw(text) if self.reader else self.base.raw_ids(text)

    def ids(self, ids: Sequence[int]) -> Ids:
        """Token ids as they are, the virtual ones in front."""
        vocab = self.base.capabilities.vocab_size
        if any(i >= vocab for i in ids):
            raise refused(f"token ids must be below {vocab}", "prompt")
        task = self.reader.task if self.reader else None
        if task is not None and (task.placement != "front" or "{soft:" in task.template):
            raise refused("this soft prompt's virtual tokens do not stand in front: give a text", "prompt")
        virtual = self.tokens - self.unseen
        return (*range(vocab, vocab + virtual), *ids)

    def row(self, row: Row) -> Ids:
        """Columns through the soft prompt's template."""
        if self.reader is None:
            raise refused("the plain model has no template: give a prompt", "columns")
        return self.reader.row(row)

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> Ids:
        """A chat."""
        return self.reader.chat(messages) if self.reader else self.base.chat_ids(messages)


async def reading(base: Base, texts: Sequence[str], read: Callable[[], T]) -> T:
    """What ``read`` makes of texts; long ones do not hold up the others' streams.

    A text far too long for the model is refused unread: reading it would take seconds.
    """
    window = base.capabilities.window
    if any(len(t) > window * MOST_PER_TOKEN for t in texts):
        longest = max(map(len, texts))
        raise refused(f"a text of {longest} characters is too long for a model that reads {window} tokens")
    if sum(map(len, texts)) <= QUICK:
        return read()
    return await asyncio.to_thread(read)


async def retried(work: Callable[[], Awaitable[T]]) -> T:
    """Does it again where the engine has forgotten the soft prompt, which the next lease gives it anew."""
    try:
        return await work()
    except UnknownPrompt:
        return await work()


async def retried_stream(open_stream: Callable[[], AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """The same for a stream of which nothing has come yet."""
    begun = False
    try:
        async with aclosing(open_stream()) as stream:
            async for item in stream:
                begun = True
                yield item
        return
    except UnknownPrompt:
        if begun:
            raise
    async with aclosing(open_stream()) as stream:
        async for item in stream:
            yield item
