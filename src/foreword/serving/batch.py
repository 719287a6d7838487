"""Rows of a file through an engine: each with the soft prompt that it names, many at once, answered in order."""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager, aclosing, suppress
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from foreword.data.labels import is_missing, require_text
from foreword.data.template import require_columns
from foreword.errors import ForewordError, nearest
from foreword.evaluation.scoring import rebalanced, scored_branches, softmax
from foreword.jobs.load import Prediction
from foreword.records import Table
from foreword.serving.engine import (
    Decoding,
    Engine,
    EngineDown,
    EngineRefused,
    Request,
    ScoreRequest,
    Token,
    UnknownPrompt,
)
from foreword.serving.registry import Loaded, Member
from foreword.serving.store import Store
from foreword.serving.text import Base

AHEAD = 1024
"""Rows begun and not yet written, at most: a long text holds up those behind it, but not before so many."""
TRIES = 3
WAIT_SECONDS = 300.0
"""How long an engine that went down may take to come back."""

T = TypeVar("T")


class Leases(Protocol):
    """Where soft prompts come from by name; a ``Registry`` is one."""

    def lease(self, name: str) -> AbstractAsyncContextManager[Loaded]:
        """The content of a name, kept in the engine until the block ends."""


@dataclass(frozen=True)
class NamedRows:
    """Rows and, for each, the name of its soft prompt. ``place``: what named them, for messages."""

    table: Table
    names: tuple[str, ...]
    place: str

    @property
    def by_name(self) -> dict[str, list[int]]:
        """Indices of each name's rows, names in order of appearance."""
        return group_by_name(self.names, range(len(self.names)))


def group_by_name(names: tuple[str, ...], indices: Iterable[int]) -> dict[str, list[int]]:
    """These indices by the name of their row, names in order of appearance."""
    found: dict[str, list[int]] = {}
    for i in indices:
        found.setdefault(names[i], []).append(i)
    return found


def named_by_column(table: Table, column: str, store: Store) -> NamedRows:
    """Rows whose soft prompt is named in a column.

    Raises:
        ForewordError: no such column, a row without a name, or with one that the store does not know.
    """
    require_columns([column], table.columns, table.origin)
    place = f"{table.origin}, column '{column}'"
    for row, number in zip(table.rows, table.numbers, strict=True):
        if is_missing(row[column]):
            raise ForewordError(f"row {number} names no soft prompt", place, "fill it in")
    rows = NamedRows(table, tuple(str(row[column]).strip() for row in table.rows), place)
    for name, indices in rows.by_name.items():
        if not store.knows(name):
            known = store.names()
            raise ForewordError(
                f"row {table.numbers[indices[0]]} names the soft prompt '{name}', which is not there",
                place,
                nearest(name, known) or f"there are: {', '.join(known[:20])}",
            )
    return rows


async def in_order(
    work: Callable[[int], Awaitable[T]], indices: Iterable[int], window: int, ahead: int = AHEAD
) -> AsyncGenerator[T, None]:
    """Results of ``work`` in the order of the indices, ``window`` of them under way at once.

    Finished ones wait for their turn; when ``ahead`` of them and of those under way have gathered, no further one
    begins. Closing the iterator ends what is under way.
    """
    gate = asyncio.Semaphore(window)
    begun: deque[asyncio.Task[T]] = deque()

    async def one(index: int) -> T:
        async with gate:
            return await work(index)

    try:
        for index in indices:
            begun.append(asyncio.create_task(one(index)))
            if len(begun) == ahead:
                yield await begun.popleft()
        while begun:
            yield await begun.popleft()
    finally:
        for task in begun:
            task.cancel()
        await asyncio.gather(*begun, return_exceptions=True)


class Batch:
    """Runs rows on an engine; a row is told by its index.

    Args:
        engine: started.
        base: the plain model.
        leases: the soft prompts that the rows name.
        rows: the rows.
    """

    def __init__(self, engine: Engine, base: Base, leases: Leases, rows: NamedRows) -> None:
        self.engine, self.base, self.leases, self.rows = engine, base, leases, rows

    async def check(self, max_tokens: int = 0) -> dict[str, str]:
        """Loads every soft prompt and reads every row once; returns the revision of each name.

        Args:
            max_tokens: to be written after a row; 0: rows are to be classified.

        Raises:
            ForewordError: a soft prompt that cannot do that, or a row that cannot be read, by its number.
        """
        revisions: dict[str, str] = {}
        for name, indices in self.rows.by_name.items():
            async with self.leases.lease(name) as loaded:
                revisions[name] = loaded.revision
                _check_use(loaded, self.rows.place, bool(max_tokens))
                for member in loaded.members:
                    self._check_rows(member, indices, max_tokens)
        return revisions

    def _check_rows(self, member: Member, indices: Iterable[int], max_tokens: int) -> None:
        table, window = self.rows.table, self.base.capabilities.window
        columns = member.reader.columns
        require_columns(columns, table.columns, table.origin)
        require_text(table.pick(list(indices)), columns)
        for i in indices:
            size = len(self._ids(member, i)) + member.unseen
            if max_tokens and size + max_tokens > window:
                raise ForewordError(
                    f"row {table.numbers[i]} has {size} tokens: with {max_tokens} new ones they pass {window}",
                    table.origin,
                    "shorten it, or lower --max-new-tokens",
                )

    async def predict(self, index: int) -> Prediction:
        """Label and probabilities of a row: of an ensemble, the mean of its members'."""

        async def once(loaded: Loaded) -> Prediction:
            each = await asyncio.gather(*(self._probabilities(m, index) for m in loaded.members))
            return mean_prediction(loaded.members[0].reader.classes, each)

        return await self._steadily(index, once)

    async def write(self, index: int, decoding: Decoding) -> str:
        """What the model writes after a row. Every row draws by a seed of its own, made of ``decoding.seed``."""
        own = replace(decoding, seed=random.Random(f"{decoding.seed}/{index}").getrandbits(31))

        async def once(loaded: Loaded) -> str:
            (member,) = loaded.members
            ids = await self._tokens(Request(f"row-{index}", self._ids(member, index), member.key, own))
            text: str = self.base.tokenizer.decode(ids, skip_special_tokens=True)
            return text.removeprefix(member.reader.task.separator if member.reader.task else " ")

        return await self._steadily(index, once)

    async def _tokens(self, request: Request) -> list[int]:
        tokens: AsyncGenerator[Token, None] = self.engine.generate(request)  # type: ignore[assignment]
        async with aclosing(tokens):
            return [token.id async for token in tokens if token.id >= 0]

    async def _steadily(self, index: int, once: Callable[[Loaded], Awaitable[T]]) -> T:
        """Runs a row, and again if the engine went down meanwhile."""
        for _ in range(TRIES - 1):
            with suppress(EngineDown, UnknownPrompt):
                return await self._leased(index, once)
            await self._back()
        return await self._leased(index, once)

    async def _leased(self, index: int, once: Callable[[Loaded], Awaitable[T]]) -> T:
        try:
            async with self.leases.lease(self.rows.names[index]) as loaded:
                return await once(loaded)
        except UnknownPrompt:
            raise
        except EngineRefused as e:
            what = f"row {self.rows.table.numbers[index]} is refused: {e}"
            raise ForewordError(what, self.rows.table.origin, "mend it and start again") from None

    async def _back(self) -> None:
        """Waits for the engine to take requests again, if it does."""
        until = time.monotonic() + WAIT_SECONDS
        while not self.engine.alive and time.monotonic() < until:
            await asyncio.sleep(0.1)

    async def _probabilities(self, member: Member, index: int) -> NDArray[np.float64]:
        """Of the classes ``[C]``; end tokens are only read where they decide."""
        branches = tuple(map(tuple, scored_branches(member.reader.label_ids)))
        request = ScoreRequest(f"row-{index}-{member.key}", self._ids(member, index), branches, member.key)
        scores = np.asarray(await self.engine.score(request))
        (found,) = rebalanced(softmax(scores[None]), member.reader.biases)
        return np.asarray(found)

    def _ids(self, member: Member, index: int) -> tuple[int, ...]:
        table = self.rows.table
        try:
            return member.reader.row(table.rows[index])
        except ForewordError as e:  # a reader is given one row, and calls it the first
            what = f"row {table.numbers[index]}: {e.what.removeprefix('row 1 ')}"
            raise ForewordError(what, table.origin, e.fix) from None


def mean_prediction(classes: tuple[str, ...], each: list[NDArray[np.float64]]) -> Prediction:
    """Of the mean of the members' probabilities ``[C]``."""
    mean = np.mean(each, axis=0)
    return Prediction(classes[int(mean.argmax())], dict(zip(classes, map(float, mean), strict=True)))


def _check_use(loaded: Loaded, place: str, writes: bool) -> None:
    name = loaded.name
    if not writes and not all(m.reader.classes for m in loaded.members):
        raise ForewordError(f"the soft prompt '{name}' writes text and has no classes", place, "use generate")
    if writes and len(loaded.members) > 1:
        raise ForewordError(f"'{name}' is an ensemble, which classifies and writes no text", place, "use predict")
